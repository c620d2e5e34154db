"""Epochs with callbacks and without take turns in one run, and a ratio is made of neighbours."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.by_turns import Ratio, by_turns, drawn, epochs_of, told
from benchmarks.rank import FOLDER
from benchmarks.work import Record, Work
from lightning_async.callbacks.journal import read
from tests.strategies.ranks import run


def test_of_each_pair_one_has_them() -> None:
    order = drawn(40)
    assert order == drawn(40)
    assert len(order) == 82
    assert order[0]
    assert order[-1]
    pairs = list(zip(order[1:-1:2], order[2:-1:2], strict=True))
    assert set(pairs) == {(True, False), (False, True)}


def _record(starts: list[float], steps: int) -> Record:
    """Epochs that begin at these seconds, of so many steps of a tenth each."""
    marks = [start + 0.1 * (at + 1) for start in starts for at in range(steps)]
    return Record(marks=marks, first=starts, epochs=[steps * (at + 1) for at in range(len(starts))])


def test_what_is_slower_by_a_known_part_comes_out_as_that() -> None:
    order = [True, True, False, False, True, True]
    lasts = [4.0, 2.2, 2.0, 3.0, 3.3, 5.0]  # with them a tenth longer, whatever the mood
    starts = [sum(lasts[:at]) for at in range(len(lasts))]
    records = [_record(starts, 20) for _ in range(2)]
    assert [epoch.whole for epoch in epochs_of(records)] == pytest.approx(lasts[1:-1])
    assert [epoch.steps for epoch in epochs_of(records)] == pytest.approx([1.6] * 4)  # 17 of 20, and not the first
    assert [epoch.ends for epoch in epochs_of(records)] == pytest.approx([last - 2.0 for last in lasts[1:-1]])
    ratio, cells = told(records, order, 80)
    assert ratio.mean == pytest.approx(1 / 1.1)
    assert ratio.half == pytest.approx(0, abs=1e-9)
    assert cells["without"]["samples/s"] == pytest.approx(80 / 2.5)
    assert cells["with"]["samples/s"] == pytest.approx(80 / 2.75)


def test_the_interval_is_that_of_the_mean() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = Ratio.of(np.exp(draw.normal(0.01, 0.02, 45)).tolist(), [1.0] * 45)
        held += abs(math.log(found.mean) - 0.01) <= found.half
    assert 0.92 < held / 400 < 0.97


def _turns(folder: str, order: list[bool]) -> Record:
    os.environ[FOLDER] = folder  # where ranks say that they train
    work = Work(16, step=0.0)
    return Record(**by_turns(work.arguments({})["work"], {}, folder, order))


def test_who_is_out_says_nothing(tmp_path: Path) -> None:
    order = [True, False, True, False]
    records = run(2, _turns, str(tmp_path), order)
    assert [len(record.epochs) for record in records] == [len(order)] * 2
    told_in = {line["group"]: [] for line in read(tmp_path / "meetings.jsonl")}  # type: ignore[var-annotated]
    for line in read(tmp_path / "meetings.jsonl"):
        told_in[line["group"]].append(line["epoch"])
    assert [told_in[group] for group in ("delay", "traffic", "spread", "shrink")] == [[0, 2]] * 4
