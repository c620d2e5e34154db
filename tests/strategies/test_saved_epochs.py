"""Wherever in an epoch a run is saved, the epochs that follow are those that would have followed, and no more."""

from __future__ import annotations

import csv
import os
import signal
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run
from tests.strategies.stores import AtTheEnd
from tests.strategies.test_streams import Batches, ByEpoch, Stream

BATCH, STEPS, EPOCHS = 4, 8, 3
LENGTHS = [16, 48, 16]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`Batches` is not a DataLoader", "ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*does not go on to the bit", "ignore:rank .* had no batch in this epoch"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable"),
]

FED: dict[str, Any] = {
    "share": lambda: loader(BATCH, n=2 * STEPS * BATCH),
    "stream": lambda: DataLoader(Stream(LENGTHS), batch_size=BATCH),
    "loader": lambda: Batches(LENGTHS),
}
VALIDATES: dict[str, dict[str, Any]] = {
    "never": {"limit_val_batches": 0},
    "at the end": {},
    "in mid-epoch": {"val_check_interval": STEPS // 2},
    "by steps": {"val_check_interval": STEPS // 2, "check_val_every_n_epoch": None},
}


def _fit(
    n: int,
    fed: str | list[int],
    options: dict[str, Any],
    folder: str | None,
    every: int,
    path: str | None,
    more: list[Callback],
) -> dict[str, Any]:
    """A run of streams of these lengths, or of what is named."""
    by_epoch, lit = ByEpoch(), Lit()
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every, save_on_exception=True)
    callbacks = [SpeedFaults(step_seconds=0.003), by_epoch, *more, *([save] if folder else [])]
    t = trainer(n, callbacks=callbacks, enable_checkpointing=folder is not None, **options)
    data = FED[fed]() if isinstance(fed, str) else DataLoader(Stream(fed), batch_size=BATCH)
    with suppress(SIGTERMException):
        t.fit(lit, data, loader(40, shuffle=False), ckpt_path=path)
    by_epoch.epochs.append(lit.seen)
    return {"epochs": by_epoch.epochs, "step": t.global_step, "epoch": t.current_epoch}


def _resumed(n: int, fed: str, options: dict[str, Any], path: Path, folder: Path | None = None) -> list[dict[str, Any]]:
    return run(n, _fit, n, fed, options, folder and str(folder), STEPS, str(path), [])


def _seen(ends: list[dict[str, Any]]) -> list[list[int]]:
    return [[index for epoch in end["epochs"] for index in epoch] for end in ends]


LIMITS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": EPOCHS},
    "steps": {"max_epochs": -1, "max_steps": EPOCHS * STEPS},
    "both": {"max_epochs": EPOCHS, "max_steps": EPOCHS * STEPS + 100},
}


@pytest.mark.few(0)
@pytest.mark.parametrize("validates", VALIDATES)
@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("limit", LIMITS)
def test_no_epoch_is_lost_or_trained_twice(fed: str, validates: str, limit: str, tmp_path: Path) -> None:
    """Saved in the middle, where a rank has no more, and at the very end of an epoch; resumed once, and twice."""
    options, counted = {**LIMITS[limit], **VALIDATES[validates]}, limit != "steps"
    whole = run(2, _fit, 2, fed, options, str(tmp_path), STEPS // 2, None, [])
    assert [end["step"] for end in whole] == [EPOCHS * STEPS] * 2
    for step in (STEPS // 2, STEPS, STEPS * 3 // 2):
        again = tmp_path / "again" if step == STEPS else None
        ends = _resumed(2, fed, options, tmp_path / f"step={step}.ckpt", again)
        if again is not None:
            later = _resumed(2, fed, options, again / f"step={2 * STEPS}.ckpt")
            _is_rest_of(whole, later, 2 * STEPS, fed, counted)
        _is_rest_of(whole, ends, step, fed, counted)
    others = _resumed(3, fed, options, tmp_path / f"step={STEPS // 2}.ckpt")
    _has_all_that_was_left(whole, others, fed, counted)


def _has_all_that_was_left(whole: list[dict[str, Any]], others: list[dict[str, Any]], fed: str, counted: bool) -> None:
    """Of one rank more, saved in the middle of the first epoch."""
    steps, samples = EPOCHS * STEPS - STEPS // 2, sum(map(len, _seen(others)))
    first, second = _seen(whole)[1], _seen(others)[1]
    assert second
    if fed == "share" and counted:
        assert samples == BATCH * (EPOCHS * 2 * STEPS - STEPS)
    elif fed == "share":  # the last step of an epoch may have less than a batch of each
        assert 3 * BATCH * (steps - EPOCHS - 1) <= samples < 3 * BATCH * (steps + 1)
    elif counted:
        assert first[len(first) - len(second) :] == second
    else:
        assert 3 * BATCH * steps <= samples < 3 * BATCH * (steps + 1)  # who hears of the last one late passes it
        assert second == [100 + (second[0] - 100 + k) % LENGTHS[1] for k in range(len(second))]


def _is_rest_of(whole: list[dict[str, Any]], ends: list[dict[str, Any]], step: int, fed: str, counted: bool) -> None:
    """Each rank's is the end of what it had in the run that was not interrupted; shares may be dealt out otherwise."""
    assert sum(map(len, _seen(ends))) == 2 * BATCH * (EPOCHS * STEPS - step)
    assert [end["step"] for end in ends] == [EPOCHS * STEPS] * 2
    if counted:
        assert [end["epoch"] for end in ends] == [EPOCHS] * 2
        assert fed == "share" or all(a[len(a) - len(b) :] == b for a, b in zip(_seen(whole), _seen(ends), strict=True))


@pytest.mark.few(0)
def test_a_run_that_stopped_by_its_steps_while_one_rank_waited_trains_on_nothing_twice(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": EPOCHS, **VALIDATES["never"]}
    run(2, _fit, 2, "stream", {**options, "max_steps": 6}, str(tmp_path), 6, None, [])
    first, second = _resumed(2, "stream", options, tmp_path / "step=6.ckpt")
    assert [len(epoch) for epoch in first["epochs"][:EPOCHS]] == [0, 16, 16]
    assert [len(epoch) for epoch in second["epochs"][1:EPOCHS]] == [48, 48]


@pytest.mark.few(1)
@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("limit", ["both", "epochs"])
def test_a_run_that_broke_off_within_an_epoch_and_was_saved_at_its_end_goes_on_there(
    limit: str, fed: str, tmp_path: Path
) -> None:
    """Lightning calls the hooks of the epoch's end where a run stops by its steps, and counts it."""
    first, path = {"max_epochs": EPOCHS, "max_steps": STEPS + 4, **VALIDATES["never"]}, tmp_path / "end.ckpt"
    cut = run(2, _fit, 2, fed, first, None, 100, None, [AtTheEnd(path)])
    ends = _resumed(2, fed, {**LIMITS[limit], **VALIDATES["never"]}, path)
    assert [end["epoch"] for end in ends] == [EPOCHS] * 2
    assert [end["step"] for end in ends] == [EPOCHS * STEPS] * 2
    seen = [a + b for a, b in zip(_seen(cut), _seen(ends), strict=True)]
    if fed == "share":
        assert Counter(seen[0] + seen[1]) == dict.fromkeys(range(2 * STEPS * BATCH), EPOCHS)
    else:
        assert seen == [EPOCHS * list(range(100 * k, 100 * k + LENGTHS[k])) for k in range(2)]


def _fewer(fed: list[int], options: dict[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = _fit(1, fed, options, None, STEPS, path, [])
    return end, [str(w.message) for w in caught if "does not go on to the bit" in str(w.message)]


def test_with_fewer_ranks_the_first_streams_go_on_and_a_warning_says_that_the_others_do_not(tmp_path: Path) -> None:
    """Stopped in the first epoch, after four steps of both ranks: that is where the one that is left begins."""
    lengths, options = [48, 40], {"max_epochs": EPOCHS, **VALIDATES["never"]}
    cut = run(2, _fit, 2, lengths, {**options, "max_steps": 4}, str(tmp_path), 4, None, [])
    ((end, said),) = run(1, _fewer, lengths, options, str(tmp_path / "step=4.ckpt"))
    before = _seen(cut)
    assert sum(map(len, before)) == 2 * BATCH * 4
    assert all(before)
    assert end["epochs"][:EPOCHS] == [list(range(len(before[0]), 48)), list(range(48)), list(range(48))]
    assert end["epoch"] == EPOCHS
    (sentence,) = said
    assert "it was saved by 2 ranks, and there are 1" in sentence
    assert "with fewer ranks than before nobody goes on with the others' streams" in sentence


class Terminated(Callback):
    """Who has the long stream gets a SIGTERM at its tenth batch: the other one came to its end a meeting ago."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (self.rank, 0, 9):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.few(0)
@pytest.mark.parametrize("waits", [1, 0])
def test_a_run_that_was_terminated_while_one_rank_waited_has_all_ranks_in_one_epoch(waits: int, tmp_path: Path) -> None:
    """Whichever it is: the first one's counts are in the main file too."""
    lengths = [16, 96] if waits == 0 else [96, 16]
    options: dict[str, Any] = {"max_epochs": EPOCHS, **VALIDATES["in mid-epoch"]}
    cut = run(2, _fit, 2, lengths, options, str(tmp_path), 100, None, [Terminated(1 - waits)])
    (path,) = tmp_path.glob("*.ckpt")
    ends = run(2, _fit, 2, lengths, options, None, 100, str(path), [])
    assert [len(epoch) for epoch in ends[waits]["epochs"][:EPOCHS]] == [0, 16, 16]
    assert [len(epoch) for epoch in ends[1 - waits]["epochs"][1:EPOCHS]] == [96, 96]
    first, second = cut[1 - waits]["epochs"][0], ends[1 - waits]["epochs"][0]
    assert first + second == [*range(100 * (1 - waits), 100 * (1 - waits) + 96)]
    assert second


class Odd(Callback):
    """Says what each validation came behind."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


def _again(speeds: dict[int, float], folder: str) -> tuple[list[int], list[int]]:
    odd = Odd()
    pace, logger = SpeedFaults(step_seconds=0.003, slow=speeds), CSVLogger(folder, name="", version="")
    options: dict[str, Any] = {"max_epochs": 1, "val_check_interval": 2, "logger": logger, "log_every_n_steps": 1}
    t = trainer(2, callbacks=[pace, odd], **options)
    for last in (1, 2):
        t.fit_loop.max_epochs = last
        t.fit(Lit(), loader(BATCH, n=2 * STEPS * BATCH), loader(40, shuffle=False))
    return odd.at, [t.global_step, t.current_epoch]


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("speeds", [{}, {1: 3.0}])
def test_a_second_fit_validates_where_the_first_did(speeds: dict[int, float], tmp_path: Path) -> None:
    """What each rank trained in the first one does not matter: they count together, and what is logged goes on."""
    for at, end in run(2, _again, speeds, str(tmp_path)):
        assert end == [2 * STEPS, 2]
        assert at == [*range(2, 2 * STEPS + 1, 2)]
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["progress/samples"]]
    for name, each in (("samples", BATCH), ("updates", 1)):
        logged = [float(row[f"progress/{name}"]) for row in rows]
        assert logged == sorted(logged)
        assert logged[-1] == 2 * 2 * STEPS * each
