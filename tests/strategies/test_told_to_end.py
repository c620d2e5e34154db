"""SIGTERM wherever it comes, to whichever rank: all stop within seconds, and every checkpoint on the disk is whole."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, LazySignStrategy, SpeedFaults
from tests.strategies import piped
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

STRATEGIES: dict[str, Any] = {
    "pairwise": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": CyclicDelayStrategy,
    "lazy_sign": LazySignStrategy,
}
QUIET = {"verbose": False}
STAGES = ("test", "predict", "validate")
PHASES = ("sanity check", "validation", "end of validation", "save", "save, later", "end of an epoch")
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Ended(L.Callback):
    """This rank gets the signal once, in this phase."""

    def __init__(self, phase: str, rank: int) -> None:
        self.phase, self.rank, self.steps = phase, rank, 0

    def _here(self, trainer: L.Trainer, phase: str) -> None:
        if phase == self.phase and int(os.environ["RANK"]) == self.rank:
            self.phase = ""
            terminate()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps += 1

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._here(trainer, "sanity check" if trainer.sanity_checking else "validation")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._here(trainer, "" if trainer.sanity_checking else "end of validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._here(trainer, "end of an epoch")


class Writes(TorchCheckpointIO):
    """The signal comes while this rank has written half of its part."""

    def __init__(self, phase: str, rank: int) -> None:
        self.mine = phase.startswith("save") and int(os.environ["RANK"]) == rank

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.mine and "index" not in os.path.basename(path):
            self.mine = False
            terminate()
        super().save_checkpoint(checkpoint, path, storage_options)


def fit(strategy: str, phase: str, rank: int, folder: Path) -> tuple[str, int]:
    io: Any = Writes(phase, rank)
    ended = Ended(phase, rank)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_on_exception=True)
    t = trainer(
        2,
        strategy=STRATEGIES[strategy](),
        callbacks=[ended, saver, SpeedFaults(step_seconds=0.002, slow={1: 3.0})],
        plugins=[AsyncCheckpointIO(io) if phase == "save, later" else io],
        enable_checkpointing=True,
        max_epochs=50,
        val_check_interval=6,
        check_val_every_n_epoch=None,
    )
    try:
        t.fit(Lit(), loader(n=80), loader(8, shuffle=False))
    except SIGTERMException:
        return "terminated", ended.steps
    return "ended", ended.steps


def at_each_phase(strategy: str, rank: int, folder: Path) -> dict[str, tuple[str, int]]:
    return {phase: fit(strategy, phase, rank, folder / phase) for phase in PHASES}


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_run_that_is_told_to_end_ends_everywhere_and_leaves_whole_checkpoints(
    strategy: str, rank: int, tmp_path: Path
) -> None:
    found = run(2, at_each_phase, strategy, rank, tmp_path, timeout=120.0)
    for phase in PHASES:
        assert [one[phase][0] for one in found] == ["terminated"] * 2, phase
        saved = sorted((tmp_path / phase).glob("*.ckpt"))
        assert saved or phase == "sanity check", phase
        for file in saved:
            main = torch.load(file, weights_only=True)["lightning_async"]
            here = {path.name for path in Path(f"{file}.ranks").iterdir()}
            whole = {f"{main['save']}.rank{r}.ckpt" for r in main["ranks"]}
            assert len(whole) == 2
            assert whole <= here, (phase, file.name)
        assert not list((tmp_path / phase).glob("**/*.tmp*"))
    assert all(one["sanity check"][1] == 0 for one in found)


class Endless(IterableDataset[Any]):
    """Whoever does not hear of the end never ends."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.samples)


class AtABatch(L.Callback):
    """Something happens on one rank as its third batch begins."""

    def __init__(self, rank: int, do: Callable[[], object]) -> None:
        self.rank, self.do = rank, do

    def on_test_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if (trainer.global_rank, batch_idx) == (self.rank, 2):
            self.do()

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start


def fail() -> None:
    raise ValueError("on purpose")


def evaluations(kind: str, rank: int, do: Callable[[], object]) -> list[str]:
    """How each stage ended."""
    ends = []
    for stage in STAGES:
        does = [AtABatch(rank, do)]
        piped_: Any = (piped.trainer(3, callbacks=does), piped.Piped(), piped.loader(4))
        lit: Any = (trainer(3, callbacks=does), Lit(), loader())
        one, module, data = piped_ if kind == "pipeline" else lit
        try:
            getattr(one, stage)(module, DataLoader(Endless(data.dataset), 4), **{} if stage == "predict" else QUIET)
            ends.append("ended")
        except BaseException as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


@pytest.mark.few(2)
@pytest.mark.parametrize("rank", [1, 0, 2])
@pytest.mark.parametrize("kind", ["gossip", "pipeline"])
def test_sigterm_in_an_evaluation_ends_it_everywhere(kind: str, rank: int) -> None:
    assert run(3, evaluations, kind, rank, terminate) == [["SIGTERMException: "] * len(STAGES)] * 3


@pytest.mark.few(2)
@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("kind", ["gossip", "pipeline"])
def test_an_error_in_an_evaluation_ends_it_everywhere(kind: str, rank: int) -> None:
    for r, ends in enumerate(run(3, evaluations, kind, rank, fail)):
        for end in ends:
            assert end.startswith("ValueError: on purpose" if r == rank else "PeerFailedError"), end
            assert "ValueError: on purpose" in end
