"""A disk that hangs keeps no run that fails: all ranks end within seconds, and the log names the file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_async import SpeedFaults
from lightning_async.strategies import late_files
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import Forked
from tests.strategies.resumable import rank

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:You defined a `validation_step`", "ignore:.*is deprecated, use `isinst"
)
SECONDS = 30.0


class Hangs(TorchCheckpointIO):
    """Rank 0's disk does not answer any more."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if rank() == 0:
            self.sign.touch()
            Event().wait()
        super().save_checkpoint(checkpoint, path, storage_options)


class Fails(L.Callback):
    """One rank fails when the disk hangs."""

    def __init__(self, rank: int, sign: Path) -> None:
        self.rank, self.sign = rank, sign

    def on_train_batch_start(self, trainer: L.Trainer, *batch: Any) -> None:
        if trainer.global_rank == self.rank and self.sign.exists():
            raise RuntimeError("on purpose")


def _train(folder: Path, saves: str, fails: int | None) -> None:
    late_files.LEAVE_FAILED = 0.4
    logging.getLogger("lightning_async").addHandler(logging.FileHandler(folder / f"log{rank()}"))
    sign, io = folder / "hangs", Hangs(folder / "hangs")
    if saves == "cut":
        saver, knobs = ModelCheckpoint(folder, every_n_train_steps=8), {"saves": "cut"}
    else:
        saver, knobs = ModelCheckpoint(folder, every_n_epochs=1), {}
    t = trainer(
        2,
        knobs=knobs if fails is not None else {**knobs, "meeting_timeout": 8.0},
        plugins=[io if saves == "cut" else AsyncCheckpointIO(io)],
        enable_checkpointing=True,
        callbacks=[saver, SpeedFaults(step_seconds=0.01), *([] if fails is None else [Fails(fails, sign)])],
        max_epochs=1 if fails is None else 1000,
    )
    try:
        t.fit(Lit(), loader())
    finally:
        names = [saver.best_model_path, saver.last_model_path, *saver.best_k_models]
        (folder / f"named{rank()}").write_text(" ".join(filter(None, names)))


@pytest.mark.few(1)
@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("saves", ["cut", "meeting"])
def test_a_run_that_fails_ends_while_a_disk_hangs(saves: str, fails: int, tmp_path: Path) -> None:
    with Forked(2, _train, tmp_path, saves, fails, store=True) as forked:
        end = time.monotonic() + SECONDS
        while not (tmp_path / "hangs").exists():
            assert time.monotonic() < end, "nothing was saved"
            assert all(process.is_alive() for process in forked.processes), forked.results()
            time.sleep(0.01)
        results = forked.results(SECONDS)
    assert results[fails].kind == "RuntimeError", results
    assert results[1 - fails].kind == "PeerFailedError", results
    said = (tmp_path / "log0").read_text()
    assert "was not written within 0 s: look at its disk" in said
    assert str(tmp_path) in said
    assert not (tmp_path / "log1").read_text()
    if saves == "cut":  # the index of the first one hangs: no file of it was begun
        assert [(tmp_path / f"named{r}").read_text() for r in (0, 1)] == ["", ""]


@pytest.mark.few(0)
@pytest.mark.parametrize("saves", ["cut", "meeting"])
def test_a_run_that_ends_well_waits_for_a_disk_as_long_as_a_meeting_may_take(saves: str, tmp_path: Path) -> None:
    with Forked(2, _train, tmp_path, saves, None, store=True) as forked:
        results = forked.results(2 * SECONDS)
    assert results[0].kind == "TimeoutError", results
    assert "to be written; the limit is 8 s" in results[0].error
    assert results[1].kind in ("PeerFailedError", "TimeoutError"), results
    assert "was not written within 0 s: look at its disk" in (tmp_path / "log0").read_text()
