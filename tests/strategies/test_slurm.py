"""A job that SLURM is about to end saves at a meeting, whichever rank got the signal, and goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_async import AsyncGlobalStrategy, GossipRingStrategy, LazySignStrategy, SpeedFaults
from tests.strategies import piped
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

JOB = "4711"
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable")


class Warned(L.Callback):
    """Gets SLURM's signal once, after its eighth batch or in the `last` of an epoch after that, if it is this rank."""

    def __init__(self, rank: int | None, last: bool = False) -> None:
        self.rank, self.last, self.batches = rank, last, 0
        self.saved: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.last and self.batches > 8 and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.last = False
            self._warn(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == 8 and not self.last:
            self._warn(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved.append(trainer.global_step)

    def _warn(self, trainer: L.Trainer) -> None:
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


def queue(folder: Path) -> dict[str, Any]:
    """Of a Trainer in a SLURM job whose `scontrol` is a script that writes down what it was told."""
    me = os.environ["RANK"]
    os.environ |= {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": os.environ["WORLD_SIZE"],
        "SLURM_NTASKS_PER_NODE": os.environ["WORLD_SIZE"],
        "SLURM_PROCID": me,
        "SLURM_LOCALID": me,
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    return {"plugins": [SLURMEnvironment(auto_requeue=True)], "default_root_dir": str(folder)}


STRATEGIES: dict[str, Any] = {
    "gossip_ring": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "lazy_sign": LazySignStrategy,
}


def job(
    folder: Path, rank: int | None, steps: int, last: bool = False, strategy: str = "gossip_ring"
) -> dict[str, Any]:
    lit, warned = Lit(), Warned(rank, last)
    t = trainer(
        2,
        strategy=STRATEGIES[strategy](),
        callbacks=[SpeedFaults(step_seconds=0.01, slow={1: 4.0}), warned],
        max_steps=steps,
        max_epochs=-1,
        **queue(folder),
    )
    t.fit(lit, loader(), loader(40, shuffle=False))
    end = torch.cat([p.detach().flatten() for p in lit.parameters()]).tolist()
    return {"saved": warned.saved, "steps": t.global_step, "end": end, "batches": warned.batches, "seen": lit.seen}


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    script.chmod(0o755)
    return tmp_path


@pytest.mark.few(2)
@pytest.mark.parametrize("last", [False, True], ids=["anywhere", "in the last batch of its epoch"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_signal_saves_all_ranks_at_one_meeting_and_asks_for_a_new_place(slurm: Path, rank: int, last: bool) -> None:
    """Where one rank's epoch is over by then and the other's is not, only the other goes on training first."""
    first, second = run(2, job, slurm, rank, 60, last)
    assert first["steps"] == second["steps"] == 60, "the job trains on until it is ended"
    assert first["saved"] == second["saved"]
    (at,) = first["saved"]
    assert 0 < at < 60
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
    (file,) = slurm.glob("hpc_ckpt_*.ckpt")
    assert torch.load(file, weights_only=True)["global_step"] == at
    assert len(list(slurm.glob("hpc_ckpt_*.ckpt.ranks/*rank*"))) == 2

    again, also = run(2, job, slurm, None, 60)
    assert again["steps"] == also["steps"] == 60
    assert again["end"] == also["end"]
    assert 2 * (60 - at) - (again["batches"] + also["batches"]) in (0, 1), "it went on from where it was saved"


@pytest.mark.few(2)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["async_global", "lazy_sign"])
def test_the_same_under_other_strategies(slurm: Path, strategy: str, rank: int) -> None:
    first, second = run(2, job, slurm, rank, 40, False, strategy)
    assert first["steps"] == second["steps"] == 40
    assert first["end"] == second["end"]
    assert first["saved"] == second["saved"]
    (at,) = first["saved"]
    assert 0 < at < 40
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    assert len(list(slurm.glob("hpc_ckpt_*.ckpt.ranks/*rank*"))) == 2
    again, also = run(2, job, slurm, None, 40, False, strategy)
    assert again["steps"] == also["steps"] == 40
    assert again["end"] == also["end"]
    assert 2 * (40 - at) - (again["batches"] + also["batches"]) in (0, 1), "it went on from where it was saved"


def pipeline(folder: Path, rank: int | None) -> dict[str, Any]:
    lit, warned = piped.Piped(), Warned(rank)
    t = piped.trainer(3, callbacks=[warned], max_epochs=3, **queue(folder))
    t.fit(lit, piped.loader(), piped.loader(20))
    return {"saved": warned.saved, "steps": t.global_step, "end": piped.weights(lit), "batches": warned.batches}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_stages_of_a_pipeline_save_after_the_same_batch_and_train_on(slurm: Path, rank: int) -> None:
    """Its middle stage too, which waits for both others."""
    ends = run(3, pipeline, slurm, rank)
    assert all(end == ends[0] for end in ends)
    assert (ends[0]["steps"], ends[0]["batches"]) == (24, 24)
    (at,) = ends[0]["saved"]
    assert 8 <= at <= 8 + 2 * 4 + 1
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    again = run(3, pipeline, slurm, None)
    assert all(end["batches"] == 24 - at for end in again), "it went on from where it was saved"
    assert all(end["end"] == ends[0]["end"] for end in again), "to the bit"
