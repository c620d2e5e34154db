"""Pictures that people can read: no label on another, a unit on each axis, colours that are still several in grey."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from lightning_async.cli import pictures
from lightning_async.cli.pictures import LINES, MAP, PICTURES, SHADES
from lightning_async.cli.story import Story
from tests.cli.invented import invented

WORLDS = [2, 8, 64]  # 8: as many as have a panel of their own
GREY = np.array([0.299, 0.587, 0.114])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Story], tuple[Any, dict[Text, Any]]]:
    """Draws a picture; every text that was really drawn, and where."""
    matplotlib.use("Agg")
    seen: dict[Text, Any] = {}
    draw = Text.draw

    def noted(text: Text, renderer: Any, *arguments: Any, **options: Any) -> Any:
        if text.get_visible() and text.get_text().strip():
            seen[text] = text.get_window_extent(renderer)
        return draw(text, renderer, *arguments, **options)

    def picture(name: str, story: Story) -> tuple[Any, dict[Text, Any]]:
        monkeypatch.setattr(Text, "draw", noted)
        figure = PICTURES[name][1](pyplot, story)
        figure.canvas.draw()
        pyplot.close(figure)
        return figure, seen

    return picture


@pytest.mark.few(5)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", PICTURES)
def test_no_text_lies_on_another_and_each_axis_says_what_it_counts(name: str, world: int, drawn: Any) -> None:
    figure, texts = drawn(name, invented(world))
    assert len(texts) > 4
    for one, other in combinations(texts, 2):
        a, b = texts[one], texts[other]
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(width, height) < 1, f"{one.get_text()!r} lies on {other.get_text()!r}"
    said = {text.get_text() for text in texts}
    for axes in figure.axes:
        for axis, shared in ((axes.xaxis, figure.get_supxlabel()), (axes.yaxis, figure.get_supylabel())):
            ticks = {label.get_text() for label in axis.get_ticklabels() if label in texts}
            siblings = [getattr(other, f"{axis.axis_name}axis") for other in figure.axes]
            shares = getattr(axes, f"get_shared_{axis.axis_name}_axes")()
            labels = [a.get_label_text() for a in siblings if a.axes is axes or shares.joined(a.axes, axes)]
            assert not ticks or any(label in said for label in [*labels, shared] if label), (name, axis.axis_name)


def grey(shade: str) -> float:
    return float(np.dot(pictures._rgb(shade), GREY))


def test_colours_differ_in_lightness() -> None:
    """Of what lies beside each other; none of them is lost on white."""
    for shades in (list(SHADES.values()), [colour for colour, _, _ in LINES]):
        lightness = sorted(map(grey, shades))
        assert all(b - a > 0.12 for a, b in pairwise([*lightness, 1.0]))


def test_the_more_the_darker_and_nothing_is_white(drawn: Any) -> None:
    lightness = matplotlib.colormaps[MAP](np.linspace(0, 1, 64))[:, :3] @ GREY
    steps = -np.diff([1.0, *lightness])
    assert (steps > 0).all()
    assert steps[1:].max() < 2.5 * steps[1:].mean()
    for name in ("delays", "traffic"):
        figure, _ = drawn(name, invented(16))
        (image,) = figure.axes[0].images
        seen, blank = np.asarray(image.get_array(), dtype=float), np.ma.getmaskarray(image.get_array())
        assert blank.any()
        assert (seen[~blank] > 0).all()


def test_losses_near_each_other_have_more_than_two_numbers(drawn: Any) -> None:
    story = invented(2)
    story.losses = {"val_loss": [(1.0, 0.2), (2.0, 0.1), (3.0, 0.08)]}
    figure, texts = drawn("learning", story)
    axis = figure.axes[0].yaxis
    assert sum(label in texts for label in axis.get_ticklabels(which="both")) > 2
