"""A run becomes one page that needs nothing else: from its events, from its journal, with 2 ranks and with 64."""

from __future__ import annotations

import json
import os
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from lightning_async.arrival import Arrival
from lightning_async.cli import main, pictures
from lightning_async.cli.pictures import _thin, draw
from lightning_async.cli.report import headlines, page
from lightning_async.cli.story import tell, trained
from lightning_async.metrics import DelayMetric, pack
from lightning_async.strategies.recording import log_name
from tests.cli.invented import invented


class Page(HTMLParser):
    """What a page needs and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.sources += [named[key] or "" for key in ("src", "href") if key in named]
        self.alts += [named.get("alt") or ""] if tag == "img" else []
        self.rows += tag == "tr"


@pytest.fixture
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn coarsely: this is about what is drawn, and a machine looks at it."""
    monkeypatch.setattr(pictures, "DOTS", 40)


@pytest.mark.few(1)
@pytest.mark.usefixtures("few_pixels")
@pytest.mark.parametrize("world", [2, 64])
def test_a_page_of_any_size(world: int, tmp_path: Path) -> None:
    story = invented(world)
    files = draw(story, tmp_path)
    assert list(files) == ["timeline", "delays", "learning", "traffic"]
    text = page(story, files)
    found = Page(text)
    assert len(found.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert not re.search(r"https?://|<script", text)
    assert all(found.alts)
    assert found.rows == 1 + world
    assert len(text) < 1_000_000
    for file in files.values():
        height, width = image.imread(file).shape[:2]
        assert 60 < height < 500
        assert 100 < width < 500


def test_shades_differ_in_lightness() -> None:
    """As grey they are still three, and none of them is white."""
    lightness = sorted(float(np.dot(pictures._rgb(s), (0.299, 0.587, 0.114))) for s in pictures.SHADES.values())
    assert all(b - a > 0.12 for a, b in pairwise([*lightness, 1.0]))


def test_labels_are_thinned_out() -> None:
    class Axis:
        ticks: list[int]

        def set_ticks(self, places: range, labels: list[str]) -> None:
            self.ticks = list(places)
            assert labels == [str(place) for place in places]

    axis = Axis()
    for n in (1, 2, 12, 13, 64, 1000):
        _thin(axis, [str(i) for i in range(n)], 12)
        assert len(axis.ticks) <= 12
        assert axis.ticks[0] == 0
        _thin(axis, [str(i) for i in range(n)], 12, last=True)
        assert len(axis.ticks) <= 12
        assert axis.ticks[-1] == n - 1


def test_what_to_know_at_a_glance() -> None:
    said = list(headlines(invented(8)))
    assert any("slow: rank 7" in line for line in said)
    assert any(re.search(r"\d+% of all ranks' time was compute", line) for line in said)
    assert any("3 refused" in line for line in said)


def test_a_page_does_not_say_what_was_not_measured() -> None:
    story = invented(8)
    story.split = False
    text = page(story, {})
    assert "who worked and who waited is not known" in text
    assert not re.search(r"was compute|slow: |no rank is slow|class=.slow|\d%<", text)


@pytest.mark.usefixtures("few_pixels")
def test_from_events(ordinary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = tell(ordinary)
    assert (story.world, story.strategy) == (2, "gossip_ring")
    for rank, log in story.logs.items():
        batches = [batch for epoch in trained(log) for batch in epoch]
        assert story.steps[rank] == len(batches) == log.batches()
        assert story.samples[rank] == sum(map(len, batches))
        pieces = story.pieces[rank]
        assert all(a.end <= b.begin + 1e-9 for a, b in pairwise(pieces))
        assert all(piece.exchange + piece.waited <= piece.end - piece.begin + 1e-5 for piece in pieces)
    assert sum(counts.total() for counts in story.delays.values()) == story.fates["folded"] > 0
    assert len(story.losses["training loss"]) == story.steps.total()
    assert {kind for row in story.links.values() for kind in row} >= {"ask", "answer"}
    assert main(["report", str(ordinary), "--out", str(tmp_path / "out")]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file == tmp_path / "out" / "report.html"
    assert {f.name for f in file.parent.iterdir()} >= {"report.html", "timeline.png", "delays.png", "learning.png"}


@pytest.mark.usefixtures("few_pixels")
def test_from_a_journal(tmp_path: Path) -> None:
    line = {"run": 1, "step": 9, "epoch": 0}
    word = {"trained": [9, 9, 72], "seconds": 1.0, "exchange": 0.1, "waited": 0.2, "idle": 0.5, "until": 1.0}
    word |= {"compute": 0.7, "skipped": 0, "accounts": {}, "delays": {"delays": [[3], [5]], "fates": [[0], [5]]}}
    lines = [
        {**line, "run": 0, "group": "delay", "at": 1.0, "words": {"0": word, "1": word, "2": word}},  # an older run
        {**line, "group": "delay", "at": 1.5, "words": {"0": word, "1": word}},
        {**line, "group": "logged", "at": 1.5, "words": {"val_loss": 0.3}},
        {**line, "group": "spread", "at": 1.5, "words": {"0": {"": [4.0, 9.0, 100.0]}, "1": {"": [4.0, 9.0, 100.0]}}},
        {**line, "group": "shrink", "at": 1.5, "words": {"0": {"1": [3, 2.5, 0.5, 4]}}},
    ]
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "meetings.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut": ')
    story = tell(tmp_path)
    assert story.world == 2
    assert story.steps == {0: 9, 1: 9}
    assert story.delays == {0: {3: 10}}
    assert story.spread == [(1.5, 0.2)]
    assert [piece.waited for piece in story.pieces[0]] == [0.2, 0.5]
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.usefixtures("few_pixels")
def test_from_a_journal_in_which_fewer_ranks_have_a_word_than_have_sent(tmp_path: Path) -> None:
    """Callbacks may differ by rank: of the others it is known what they sent, and what was sent to them."""
    metric = DelayMetric(4, sync_on_compute=False)
    metric.update([Arrival(peer, 0, 0, 5 + peer, 0.1) for peer in (1, 3, 3)])
    word = {"trained": [9, 9, 72], "seconds": 1.0, "exchange": 0.1, "waited": 0.2, "idle": 0.5, "until": 1.0}
    word |= {"compute": 0.7, "skipped": 0, "accounts": {"mass": [3, 4]}, "delays": pack(metric)}
    count = {"bytes_out": 700.0, "messages_out": 7}
    lines = [
        {
            "run": 1,
            "step": 9,
            "epoch": 0,
            "at": 1.5,
            "group": "traffic",
            "words": {"0": {"links": {"2": {"ask": count}}}},
        },
        {"run": 1, "step": 9, "epoch": 0, "at": 1.5, "group": "delay", "words": {"0": word}},
    ]
    (tmp_path / "meetings.jsonl").write_text("\n".join(map(json.dumps, lines)))
    story = tell(tmp_path)
    assert story.world == 4
    assert story.delays == {1: {6: 1}, 3: {8: 2}}
    assert main(["report", str(tmp_path)]) == 0
    assert {file.name for file in (tmp_path / "report").iterdir()} >= {"report.html", "delays.png", "traffic.png"}
    assert main(["audit", str(tmp_path), "--max-delay", "8"]) == 0  # whose mass is not told is not missing
    assert main(["audit", str(tmp_path), "--max-delay", "7"]) == 1


def test_the_newest_fit_is_told_or_the_one_that_was_named(
    ordinary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        lines = (ordinary / log_name(rank)).read_text()
        (tmp_path / log_name(rank)).write_text(lines.splitlines()[0] + "\n")
        (tmp_path / log_name(rank, 2)).write_text(lines)
    assert tell(tmp_path).steps == tell(ordinary).steps
    assert capsys.readouterr().out == "fit 2 is read, the newest of 1, 2 (--fit N for another)\n"
    assert not tell(tmp_path, 1).steps.total()
    assert not capsys.readouterr().out


def test_the_newest_record_is_told(ordinary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, seconds in (("a", 2), ("b", 3), ("c", 1)):  # neither the first by its name nor the last is the newest
        _recorded(ordinary, tmp_path / place, seconds, whole=place == "b")
    assert tell(tmp_path).steps == tell(ordinary).steps
    assert f"{tmp_path / 'b'} is read, the newest of several records" in capsys.readouterr().out
    assert not tell(tmp_path / "a").steps.total()
    assert not capsys.readouterr().out


def test_a_journal_goes_with_its_own_fit_only(ordinary: Path, tmp_path: Path) -> None:
    for fit in (1, 2):
        _recorded(ordinary, tmp_path, seconds=10 * fit, fit=fit)
    journal = tmp_path / "meetings.jsonl"
    line = {"run": 1, "group": "logged", "step": 9, "epoch": 0, "at": 1.5, "words": {"val_loss": 0.3}}
    journal.write_text(json.dumps(line) + "\n")
    for seconds, fit, known in ((5, None, False), (15, None, True), (15, 2, True), (15, 1, False)):
        os.utime(journal, (seconds, seconds))
        assert ("val_loss" in tell(tmp_path, fit).losses) == known, (seconds, fit)


def test_a_fit_is_named_and_nothing_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "meetings.jsonl"
    journal.write_text("")
    for command in ("report", "audit"):
        assert main([command, str(tmp_path), "--fit", "1"]) == 2
        assert f"there is no whole line in {journal}" in capsys.readouterr().err
    line = {"group": "run", "step": 0, "epoch": 0, "at": 0.0, "words": {"strategy": "ddp", "world": 2}}
    rows = ({**line, "run": 1}, {**line, "run": 2, "words": {"strategy": "gossip_ring", "world": 3}})
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tell(tmp_path, 1).strategy == "ddp"
    assert list(headlines(tell(tmp_path, 1))) == ["nothing was told: the run ended before its first meeting"]
    assert not capsys.readouterr().out
    assert tell(tmp_path).world == 3
    assert capsys.readouterr().out == "fit 2 is read, the newest of 1, 2 (--fit N for another)\n"
    assert main(["report", str(tmp_path), "--fit", "3"]) == 2
    assert "there is no event record of fit 3" in capsys.readouterr().err


def _recorded(ordinary: Path, folder: Path, seconds: int, fit: int = 1, whole: bool = True) -> None:
    """A copy of a run, or of its headers only, that was last written to so many seconds after the beginning of time."""
    folder.mkdir(exist_ok=True)
    for rank in range(2):
        text, path = (ordinary / log_name(rank)).read_text(), folder / log_name(rank, fit)
        path.write_text(text if whole else text.splitlines()[0] + "\n")
        os.utime(path, (seconds, seconds))


def test_nothing_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "there is neither an event record" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"run": 1, "group": "run", "step": 0, "epoch": 0, "at": 0.0, "words": {"strategy": "ddp", "world": 2}}
    (tmp_path / "meetings.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "report").write_text("no folder")
    assert main(["report", str(tmp_path)]) == 2
    assert "say by --out where the page may be written" in capsys.readouterr().err


def test_without_matplotlib(
    ordinary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(ordinary)]) == 2
    assert "pip install 'lightning-async[report]'" in capsys.readouterr().err
