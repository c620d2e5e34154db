"""Pictures of a run, each readable in grey and with 64 ranks: shades differ in lightness, labels are thinned out.

Where there are few ranks each has a panel of its own; where there are many they become the rows of one map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lightning_async.cli.story import Points, Story
from lightning_async.strategies.course import WrongInput

SHADES = {"compute": "#1f4e79", "exchange": "#e69f00", "waiting": "#d2d2d2"}
LINES = (("#1f4e79", "-", "o"), ("#d55e00", "--", "s"), ("#a6a6a6", ":", "^"), ("#000000", "-.", "D"))
MAP = "cividis_r"  # it grows evenly darker: the more, the farther from the white of nothing at all
DOTS = 110  # an inch
BINS, PIXELS = 480, 480  # of the timeline, across and down; down, each rank has at least 12
DECADE = 10  # losses within a factor of this have a linear axis: a logarithmic one would show two numbers
PANELS = 8  # ranks with a panel of their own
ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False}  # a legend beside no curve


def draw(story: Story, folder: Path) -> dict[str, Path]:
    """Draw all that there is something to show of; the files by what they show."""
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, (has, picture) in PICTURES.items():
        if has(story):
            figure = picture(plt, story)
            files[name] = folder / f"{name}.png"
            figure.savefig(files[name], dpi=DOTS, bbox_inches="tight", facecolor="white")
            plt.close(figure)
    return files


def timeline(plt: Any, story: Story) -> Any:
    """Each rank's time from left to right; the height of a shade is its part of that moment."""
    ranks = sorted(story.pieces)
    figure, axes = plt.subplots(figsize=(10, 1.2 + min(9.0, max(0.9, 0.34 * len(ranks)))))
    image = np.concatenate([_row(story, rank) for rank in ranks])
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, story.end, len(ranks) - 0.5, -0.5))
    axes.set(xlabel="seconds of the run", ylabel="rank")
    _thin(axes.yaxis, [str(rank) for rank in ranks], 20)
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in SHADES.values()]
    axes.legend(handles, list(SHADES), ncols=3, **ABOVE)
    axes.set_title("Where the time went", loc="left")
    return figure


def delays(plt: Any, story: Story) -> Any:
    """How late what each rank sent was folded."""
    senders = sorted(story.delays)
    most = max(max(counts) for counts in story.delays.values())
    edges = _edges(most)
    shares = np.array([_shares(story.delays[rank], edges) for rank in senders])
    labels = [f"{a}" if b - a == 1 else f"{a}+" for a, b in pairwise(edges)]
    if len(senders) > PANELS:
        return _delay_map(plt, senders, shares, labels)
    columns = min(4, len(senders))
    rows = -(-len(senders) // columns)
    size = (1.2 + 2.6 * columns, 1.0 + 2.0 * rows)
    figure, panels = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    for panel, rank, share in zip(panels.flat, senders, shares, strict=False):
        panel.bar(range(len(share)), 100 * share, color=SHADES["compute"], width=0.85)
        panel.set_title(f"from rank {rank}", fontsize=10)
        _thin(panel.xaxis, labels, 6, last=True)
    for panel in list(panels.flat)[len(senders) :]:
        panel.axis("off")
    figure.supxlabel("delay in steps of the receiver", fontsize=10)
    figure.supylabel("% of its messages", fontsize=10)
    return figure


def _delay_map(plt: Any, senders: Sequence[int], shares: Any, labels: Sequence[str]) -> Any:
    from matplotlib.colors import PowerNorm  # by roots: a few per cent far out are what a straggler's row shows

    figure, axes = plt.subplots(figsize=(10, 1.4 + min(8.0, 0.2 * len(senders))))
    some = np.where(shares > 0, 100 * shares, np.nan)
    shown = axes.imshow(some, aspect="auto", cmap=MAP, interpolation="nearest", norm=PowerNorm(0.5, vmin=0))
    axes.set(xlabel="delay in steps of the receiver", ylabel="sent by rank")
    axes.set_title("How late messages were", loc="left")
    _thin(axes.yaxis, [str(rank) for rank in senders], 20)
    _thin(axes.xaxis, labels, 14, last=True)
    figure.colorbar(shown, ax=axes, label="% of its messages")
    return figure


def learning(plt: Any, story: Story) -> Any:
    """Losses above, the distance of the replicas below, over the same seconds."""
    curves = dict(sorted(_curves(story).items(), key=lambda one: one[0] != "training loss"))
    parts = [part for part in (curves, story.spread or story.sketches) if part]
    figure, panels = plt.subplots(
        len(parts), 1, figsize=(10, 0.6 + 2.6 * len(parts)), sharex=True, squeeze=False, constrained_layout=True
    )
    panels = list(panels.flat)
    if curves:
        panel = panels.pop(0)
        for (name, points), (colour, line, mark) in zip(curves.items(), LINES, strict=False):
            mark = "" if len(points) > 40 else mark
            _curve(panel, points, color=colour, linestyle=line, marker=mark, label=name)
        panel.set(ylabel="loss")
        panel.legend(ncols=len(LINES), **ABOVE)
        values = [value for points in curves.values() for _, value in points]
        if min(values) > 0 and max(values) > DECADE * min(values):
            panel.set_yscale("log")
            _plain_log(plt, panel)
    if panels:
        panel = panels.pop(0)
        if story.sketches:
            _curve(panel, story.sketches, color=LINES[2][0], linestyle=":", label="sketch in between")
        if story.spread:
            _curve(panel, story.spread, color=LINES[0][0], marker="o", label="at meetings")
        panel.set(ylabel="rms distance to the\nconsensus, by weight")
        panel.set_ylim(bottom=0)
        panel.legend(ncols=2, **ABOVE)
    figure.axes[-1].set(xlabel="seconds of the run")
    figure.axes[0].set_xlim(left=0)
    for panel in figure.axes:
        panel.grid(axis="y", color="#e4e4e4")
    return figure


def traffic(plt: Any, story: Story) -> Any:
    """Who sent how much to whom, and of what kind."""
    kinds = _by_kind(story)
    total = np.zeros((story.world, story.world))
    for (rank, peer), row in story.links.items():
        total[rank, peer] = sum(sent for sent, _ in row.values())
    factor, unit = _unit(total.max())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.25, 1), constrained_layout=True)
    figure.get_layout_engine().set(wspace=0.08)  # between the label of the colours and that of the kinds
    shown = left.imshow(np.where(total > 0, total / factor, np.nan), cmap=MAP, interpolation="nearest", vmin=0)
    left.set(xlabel="to rank", ylabel="from rank")
    names = [str(rank) for rank in range(story.world)]
    _thin(left.xaxis, names, 12)
    _thin(left.yaxis, names, 12)
    figure.colorbar(shown, ax=left, label=f"{unit} sent", shrink=0.85)
    factor, unit = _unit(max(kinds.values()))
    bars = right.barh(list(kinds), [value / factor for value in kinds.values()], color=SHADES["compute"])
    right.bar_label(bars, fmt="%.3g", padding=3)  # what is too short to be seen has a number at least
    right.margins(x=0.15)
    right.invert_yaxis()
    right.set(xlabel=f"{unit} sent, all ranks", ylabel="kind of message")
    return figure


PICTURES: dict[str, tuple[Callable[[Story], bool], Callable[[Any, Story], Any]]] = {
    "timeline": (lambda story: story.end > 0, timeline),
    "delays": (lambda story: any(story.delays.values()), delays),
    "learning": (lambda story: bool(_curves(story) or story.spread or story.sketches), learning),
    "traffic": (lambda story: sum(_by_kind(story).values()) > 0, traffic),
}


# -- inside -----------------------------------------------------------------------------------------------------------


def _row(story: Story, rank: int) -> Any:
    """One rank's pixels: in each column its three shades stacked, white where it neither trains nor waits."""
    seconds, width = np.zeros((BINS, len(SHADES))), story.end / BINS
    for piece in story.pieces[rank]:
        length = piece.end - piece.begin
        if length <= 0:
            continue
        parts = np.array([piece.compute, piece.exchange, piece.waited]) / length
        first, last = piece.begin / width, min(piece.end / width, BINS)
        for at in range(int(first), min(BINS, math.ceil(last))):
            seconds[at] += parts * width * max(0.0, min(last, at + 1) - max(first, at))
    thick = max(12, PIXELS // len(story.pieces))
    filled = np.rint(np.cumsum(seconds, 1) / width * (0.85 * thick)).astype(int)
    pixels, foot = np.ones((thick, BINS, 3)), thick - thick // 12
    shades = [_rgb(shade) for shade in SHADES.values()]
    for at in range(BINS):
        begin = 0
        for shade, end in zip(shades, filled[at], strict=True):
            pixels[foot - end : foot - begin, at] = shade
            begin = end
    return pixels


def _edges(most: int) -> list[int]:
    """One delay each up to 15, then ever wider bins."""
    edges = list(range(min(most, 15) + 2))
    while edges[-1] <= most:
        edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * 1.5)))
    return edges


def _shares(counts: Any, edges: Sequence[int]) -> Any:
    values, weights = list(counts.keys()), list(counts.values())
    found, _ = np.histogram(values, bins=np.array(edges) - 0.5, weights=weights)
    return found / max(1, sum(weights))


def _curves(story: Story) -> dict[str, Points]:
    """Up to four losses. Those of single batches are averaged over a fiftieth of the run."""
    found = {name: points for name, points in story.losses.items() if "loss" in name and points}
    if (single := found.get("training loss")) is not None and len(single) > 100:
        width = max(story.end, 1e-9) / 50
        bins: dict[int, list[float]] = {}
        for at, value in single:
            bins.setdefault(int(at / width), []).append(value)
        found["training loss"] = [((at + 0.5) * width, sum(v) / len(v)) for at, v in sorted(bins.items())]
    return dict(list(found.items())[: len(LINES)])


def _by_kind(story: Story) -> dict[str, float]:
    sums: dict[str, float] = {}
    for row in story.links.values():
        for kind, (sent, _) in row.items():
            sums[kind] = sums.get(kind, 0.0) + sent
    return dict(sorted(((kind, sent) for kind, sent in sums.items() if sent), key=lambda one: -one[1]))


def _unit(most: float) -> tuple[float, str]:
    return next(
        ((size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= size), (1.0, "bytes")
    )


def _curve(panel: Any, points: Points, **style: Any) -> None:
    times, values = zip(*points, strict=True)
    panel.plot(times, values, markersize=4, linewidth=1.5, **style)


def _thin(axis: Any, labels: Sequence[str], most: int, *, last: bool = False) -> None:
    """As many labels as can be read beside each other; the first of them, or the last, is always there."""
    every = -(-len(labels) // most)
    places = range((len(labels) - 1) % every if last else 0, len(labels), every)
    axis.set_ticks(places, [labels[at] for at in places])


def _plain_log(plt: Any, panel: Any) -> None:
    """Numbers as people write them, and few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _rgb(shade: str) -> tuple[float, ...]:
    return tuple(int(shade[at : at + 2], 16) / 255 for at in (1, 3, 5))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise WrongInput(
            "the report is drawn by matplotlib, which is not installed: pip install 'lightning-async[report]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
