"""A job that SLURM is about to end saves at a meeting, whichever rank got the signal, and goes on from there."""

from __future__ import annotations

import math
import os
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, LazySignStrategy, SpeedFaults
from lightning_async.progress.member import HeardProgress
from lightning_async.progress.progress import Progress
from tests.strategies import piped, resumable
from tests.strategies.lit import Lit, Numbers, loader, trainer, weights
from tests.strategies.ranks import run

JOB = "4711"
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable")


Whom = int | Literal["all"] | None


class Warned(L.Callback):
    """Gets SLURM's signal once, after its eighth batch or in the `last` of an epoch after that, if it is this rank, or
    if all get it."""

    def __init__(self, rank: Whom, last: bool = False) -> None:
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
        if trainer.strategy.meeting:  # type: ignore[attr-defined]  # else it is a cut's, which a rank records alone
            self.saved.append(trainer.global_step)

    def _warn(self, trainer: L.Trainer) -> None:
        if self.rank in ("all", trainer.global_rank):
            os.kill(os.getpid(), signal.SIGUSR1)


class WarnedDuringTheSave(Warned):
    """Rank 0 gets it as ever; the others hear it when the save that this calls for has begun."""

    def on_train_batch_end(self, trainer: L.Trainer, *batch: Any) -> None:
        if trainer.global_rank == 0:
            super().on_train_batch_end(trainer, *batch)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_save_checkpoint(trainer)
        if trainer.global_rank > 0 and len(self.saved) == 1:
            self._warn(trainer)


class WarnedBehindTheSave(WarnedDuringTheSave):
    """They hear it right behind it."""

    def on_train_batch_end(self, trainer: L.Trainer, *batch: Any) -> None:
        super().on_train_batch_end(trainer, *batch)
        if trainer.global_rank > 0 and self.saved:
            self.batches += 1
            if self.batches == 1:
                self._warn(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        Warned.on_save_checkpoint(self, trainer)


class WarnedAgain(Warned):
    """All get it once more, each in its third batch behind the save."""

    behind = 0

    def on_train_batch_end(self, trainer: L.Trainer, *batch: Any) -> None:
        super().on_train_batch_end(trainer, *batch)
        self.behind += bool(self.saved)
        if self.saved and self.behind == 3:
            self._warn(trainer)


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
    "cyclic_delay": CyclicDelayStrategy,
    "lazy_sign": LazySignStrategy,
    "cut": partial(GossipRingStrategy, saves="cut"),
}


def job(
    folder: Path,
    rank: Whom,
    steps: int,
    last: bool = False,
    strategy: str = "gossip_ring",
    kind: type[Warned] = Warned,
) -> dict[str, Any]:
    lit, warned = Lit(), kind(rank, last)
    cuts = ModelCheckpoint(folder / "cuts", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    t = trainer(
        2,
        strategy=STRATEGIES[strategy](),
        callbacks=[SpeedFaults(step_seconds=0.01, slow={1: 4.0}), warned, *([cuts] if strategy == "cut" else [])],
        enable_checkpointing=strategy == "cut",
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
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\nls {tmp_path} > {tmp_path}/there\n')
    script.chmod(0o755)
    return tmp_path


@pytest.mark.few(1)
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


@pytest.mark.few(0)
@pytest.mark.parametrize("kind", [WarnedBehindTheSave, WarnedDuringTheSave, Warned])
@pytest.mark.parametrize("strategy", ["gossip_ring", "lazy_sign"])
def test_a_signal_to_all_ranks_is_one_request(slurm: Path, strategy: str, kind: type[Warned]) -> None:
    """`--signal=USR1@120` goes to all tasks. Each hears it when its step lets it: a slow one after the save perhaps."""
    found = run(2, job, slurm, "all", 60, False, strategy, kind)
    assert [one["steps"] for one in found] == [60, 60]
    assert found[0]["saved"] == found[1]["saved"]
    (at,) = found[0]["saved"]
    assert 0 < at < 60
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
    (file,) = slurm.glob("hpc_ckpt_*.ckpt")
    assert torch.load(file, weights_only=True)["global_step"] == at
    assert sorted(resumable.files_of(file)) == [0, 1]


@pytest.mark.few(0)
def test_a_second_signal_to_all_ranks_is_another_request(slurm: Path) -> None:
    """SLURM's controller may not have answered when it was asked for a place."""
    found = run(2, job, slurm, "all", 60, False, "gossip_ring", WarnedAgain)
    assert found[0]["saved"] == found[1]["saved"]
    assert len(found[0]["saved"]) == 2
    assert (slurm / "requeued").read_text() == 2 * f"requeue {JOB}\n"


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["cut", "async_global", "cyclic_delay", "lazy_sign"])
def test_the_same_under_other_strategies(slurm: Path, strategy: str, rank: int) -> None:
    first, second = run(2, job, slurm, rank, 40, False, strategy)
    assert first["steps"] == second["steps"] == 40
    assert first["end"] == second["end"]
    assert first["saved"] == second["saved"]
    (file,) = slurm.glob("hpc_ckpt_*.ckpt")
    at = torch.load(file, weights_only=True)["global_step"]
    assert 0 < at < 40
    if strategy == "cut":  # a meeting saves what is due beside it, and what a cut had not ended
        assert at in first["saved"]
        assert all(sorted(resumable.files_of(path)) == [0, 1] for path in (slurm / "cuts").glob("*.ckpt"))
    else:
        assert first["saved"] == [at]
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    assert file.name in (slurm / "there").read_text().split(), "by then the file was there"
    assert sorted(resumable.files_of(file)) == [0, 1]
    again, also = run(2, job, slurm, None, 40, False, strategy)
    assert again["steps"] == also["steps"] == 40
    assert again["end"] == also["end"]
    assert 2 * (40 - at) - (again["batches"] + also["batches"]) in (0, 1), "it went on from where it was saved"


class WarnedInMidEpoch(L.Callback):
    """Gets the signal once, in the second epoch, if it is this rank; remembers how many batches lay before the save."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.saved: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (self.rank, 1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: Any) -> None:
        self.saved.append(len(module.losses))


def adding_up(folder: Path, rank: int | None) -> dict[str, Any]:
    """Ten batches an epoch, which are one step; ranks train alone, so that they go on to the bit."""
    me, watch = int(os.environ["RANK"]), WarnedInMidEpoch(rank)
    resumable.seed()
    lit, knobs = resumable.Draws(), {"mode": "none", "balance": "equal"}
    pace = SpeedFaults(step_seconds=0.0 if rank is None else 0.05)  # of an epoch something is left when all have heard
    t = trainer(2, knobs=knobs, callbacks=[watch, pace], max_epochs=3, accumulate_grad_batches=100, **queue(folder))
    t.fit(lit, resumable.stream(me, 2), resumable.held_out())
    return {"saved": watch.saved, "losses": lit.losses, "end": weights(lit)}


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:rank . had no batch in this epoch")  # where the other one came to its end first
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_was_warned_between_two_steps_goes_on_to_the_bit(slurm: Path, rank: int) -> None:
    """Wherever the other rank stopped for the save: what was added up by then is in the files."""
    through = run(2, adding_up, slurm, rank)
    (file,) = slurm.glob("hpc_ckpt_*.ckpt")
    assert 12 < through[rank]["saved"][0] < 20, "in mid-epoch"
    gradients = resumable.files_of(file)[rank]["parts"]["stepping"]["gradients"]
    assert set(gradients) == {name for name, _ in resumable.Draws().named_parameters()}
    assert any(bool(gradient.any()) for gradient in gradients.values())
    for one, again in zip(through, run(2, adding_up, slurm, None), strict=True):
        (at,) = one["saved"]
        assert len(one["losses"]) == 30
        assert again["losses"] == one["losses"][at:]
        assert again["end"] == one["end"]


def warn_who_waits(rank: int) -> None:
    """The signal comes to this rank when its word for the meeting is given and the others' are not."""
    sign, looks = Progress.sign, 0

    def looked(progress: Progress) -> int:
        nonlocal looks
        looks += progress.own.batches > 0
        if looks == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return sign(progress)

    if int(os.environ["RANK"]) == rank:
        Progress.sign = looked  # type: ignore[method-assign]


def dry_job(folder: Path, rank: int, *, warned: bool) -> dict[str, Any]:
    """The stream of that rank has four batches; the other one's has no end."""
    lit, watch = Lit(), Warned(None)
    if warned:
        warn_who_waits(rank)
    own = 16 if int(os.environ["RANK"]) == rank else math.inf
    faults = SpeedFaults(step_seconds=0.02)
    t = trainer(2, callbacks=[faults, watch], max_steps=40, max_epochs=-1, **queue(folder))
    t.fit(lit, DataLoader(Numbers(own), batch_size=4), loader(40, shuffle=False))
    return {"saved": watch.saved, "steps": t.global_step, "seen": lit.seen}


def warned_dry_job(folder: Path, rank: int) -> dict[str, Any]:
    return dry_job(folder, rank, warned=True)


def next_dry_job(folder: Path, rank: int) -> dict[str, Any]:
    return dry_job(folder, rank, warned=False)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:rank . had no batch in this epoch")
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_the_others_hears_the_signal_too(slurm: Path, rank: int) -> None:
    found = run(2, warned_dry_job, slurm, rank)
    assert [one["steps"] for one in found] == [40, 40]
    assert found[0]["saved"] == found[1]["saved"]
    (at,) = found[0]["saved"]
    assert 2 < at < 40, "at a meeting that it called"
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
    assert found[rank]["seen"] == list(range(16))
    again = run(2, next_dry_job, slurm, rank)
    assert [one["steps"] for one in again] == [40, 40]
    assert again[rank]["seen"] == []
    seen = again[1 - rank]["seen"]
    assert seen[0] // 4 - (2 * at - 4) in (0, 1), "it went on from where it was saved"
    assert seen == list(range(seen[0], (2 * 40 - 4) * 4))


def waiting_member(folder: Path) -> dict[str, Any]:
    """The signal comes to the second rank of the quick member alone, when its member waits for the slow one."""
    sign, looks = HeardProgress.sign, 0

    def looked(progress: HeardProgress) -> int:
        nonlocal looks
        looks += progress.meetings > 0
        if looks == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return sign(progress)

    if os.environ["RANK"] == "1":
        HeardProgress.sign = looked  # type: ignore[method-assign]
    watch = Warned(None)
    faults = SpeedFaults(step_seconds=0.01, slow={2: 10.0, 3: 10.0})
    strategy = GossipRingStrategy(inner_size=2, balance="equal")
    t = trainer(4, strategy=strategy, callbacks=[faults, watch], **queue(folder))
    t.fit(Lit(), loader(shuffle=False), loader(40, shuffle=False))
    return {"saved": watch.saved, "steps": t.global_step, "epoch": t.current_epoch}


@pytest.mark.few(0)
def test_a_member_that_waits_hears_the_signal_of_any_of_its_ranks(slurm: Path) -> None:
    """It is saved in the epoch that the others are still at, not at its end, which may be far."""
    found = run(4, waiting_member, slurm)
    assert all(one == found[0] for one in found)
    (at,) = found[0]["saved"]
    assert 15 // 2 <= at < 15, "30 batches of two members are an epoch, of which the quick one has done its 15"
    assert (found[0]["steps"], found[0]["epoch"]) == (30, 2)
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"


class InValidation(L.Callback):
    """Gets the signal once, before the second batch of a validation, if it is this rank; remembers where all saved."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.saved: list[int] = []
        self.validated: list[int] = []

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not (trainer.sanity_checking or self.validated) and trainer.global_rank == self.rank and args[2] == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved.append(trainer.global_step)


def validating(folder: Path, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    lit, watch = Lit(), InValidation(rank)
    faults = SpeedFaults(step_seconds=0.002, slow={1: 4.0})
    callbacks = [faults, watch, *options.get("callbacks", [])]
    told = {"max_steps": 40, "max_epochs": -1} | options | {"callbacks": callbacks} | queue(folder)
    t = trainer(2, **told)
    t.fit(lit, loader(), loader(40, shuffle=False))
    end = torch.cat([p.detach().flatten() for p in lit.parameters()]).tolist()
    return {"saved": watch.saved, "validated": watch.validated, "end": end, "seen": lit.seen}


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_in_a_validation_saves_behind_it(slurm: Path, rank: int) -> None:
    """And nobody validates a second time where the job goes on from there, or trains on a sample again."""
    options = {"val_check_interval": 15, "check_val_every_n_epoch": None}
    first, second = run(2, validating, slurm, rank, options)
    assert first["saved"] == second["saved"] == [15]
    assert first["validated"] == second["validated"] == [15, 30]
    assert first["end"] == second["end"]
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    again, also = run(2, validating, slurm, -1, options)
    assert again["validated"] == also["validated"] == [30]
    assert again["end"] == also["end"]
    assert len(again["seen"]) + len(also["seen"]) == (40 - 15) * 8


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_in_the_validation_at_the_end_of_an_epoch_saves_behind_it(slurm: Path, rank: int) -> None:
    """Before anybody trains on: the job may end any moment."""
    first, second = run(2, validating, slurm, rank, {})
    assert first["saved"] == second["saved"] == [30]
    assert first["validated"] == second["validated"] == [30]
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    again, also = run(2, validating, slurm, -1, {})
    assert again["validated"] == also["validated"] == []
    assert again["end"] == also["end"]
    assert len(again["seen"]) + len(also["seen"]) == (40 - 30) * 8


LAST: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 15, "val_check_interval": 15, "check_val_every_n_epoch": None},
    "epochs": {"max_steps": -1, "max_epochs": 1},
    "stop": {"callbacks": [EarlyStopping("val", stopping_threshold=1e9, check_on_train_epoch_end=False)]},
}


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", LAST)
def test_a_signal_in_the_very_last_validation_saves_behind_it_too(slurm: Path, end: str, rank: int) -> None:
    """What the script does behind `fit` has its place in the queue: there `fit` returns at once, with these weights."""
    first, second = run(2, validating, slurm, rank, LAST[end])
    (at,) = first["validated"]
    assert first["saved"] == second["saved"] == [at]
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
    again, also = run(2, validating, slurm, -1, LAST[end])
    if end != "stop":  # who stops early has no count that says so: it trains until it is told again
        assert again["seen"] == also["seen"] == []
        assert again["end"] == also["end"] == first["end"] == second["end"]
    assert again["end"] == also["end"]


def pipeline(folder: Path, rank: Whom, warned: Any = Warned) -> dict[str, Any]:
    lit, warned = piped.Piped(), warned(rank)
    t = piped.trainer(3, callbacks=[warned], max_epochs=3, **queue(folder))
    t.fit(lit, piped.loader(), piped.loader(20))
    return {"saved": warned.saved, "steps": t.global_step, "end": piped.weights(lit), "batches": warned.batches}


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", ["all", 1, 0])
def test_the_stages_of_a_pipeline_save_after_the_same_batch_and_train_on(slurm: Path, rank: Whom) -> None:
    """Its middle stage too, which waits for both others. Where all hear the signal, they do at unlike moments."""
    ends = run(3, pipeline, slurm, rank)
    assert all(end == ends[0] for end in ends)
    assert (ends[0]["steps"], ends[0]["batches"]) == (24, 24)
    (at,) = ends[0]["saved"]
    assert 8 <= at <= 8 + 2 * 4 + 1
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    again = run(3, pipeline, slurm, None)
    assert all(end["batches"] == 24 - at for end in again), "it went on from where it was saved"
    assert all(end["end"] == ends[0]["end"] for end in again), "to the bit"


class InTheLastValidation(Warned):
    """Gets the signal there."""

    def __init__(self, rank: int | None) -> None:
        super().__init__(rank, last=True)
        self.validations = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        pass

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.validations += not trainer.sanity_checking
        if self.validations == 3:
            self._warn(trainer)


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_stages_of_a_pipeline_save_behind_their_very_last_validation(slurm: Path, rank: int) -> None:
    ends = run(3, pipeline, slurm, rank, InTheLastValidation)
    assert [end["saved"] for end in ends] == [[24]] * 3
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n"
    again = run(3, pipeline, slurm, None)
    assert all((end["batches"], end["steps"]) == (0, 24) for end in again), "there is nothing left to train on"
    assert all(end["end"] == ends[0]["end"] for end in again)


class InAnEvaluation(L.Callback):
    """Gets the signal once, before the third batch, if it is this rank, or if all get it; counts its batches."""

    def __init__(self, rank: Whom) -> None:
        self.rank, self.batches = rank, 0

    def on_test_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == 3 and self.rank in ("all", trainer.global_rank):
            os.kill(os.getpid(), signal.SIGUSR1)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start


def evaluating(folder: Path, kind: str, stage: str, rank: Whom) -> dict[str, Any]:
    watch = InAnEvaluation(rank)
    options = {"callbacks": [watch], **queue(folder)}
    lit: Any = (trainer(2, **options), Lit(), loader(shuffle=False))
    pipe: Any = (piped.trainer(2, **options), piped.Piped(), piped.loader(2))
    one, module, data = pipe if kind == "pipeline" else lit
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        getattr(one, stage)(module, data)
    said = [str(one.message) for one in warned if "SLURM's signal" in str(one.message)]
    return {"batches": watch.batches, "said": said, "metrics": {k: float(v) for k, v in one.callback_metrics.items()}}


@pytest.mark.few(2)
@pytest.mark.parametrize("rank", ["all", 1, 0])
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize("kind", ["gossip_ring", "delayed_pipeline"])
def test_a_signal_in_an_evaluation_asks_for_a_new_place_and_saves_nothing(
    slurm: Path, kind: str, stage: str, rank: Whom
) -> None:
    """In the handler nobody could wait for the others, and a save would wait for all of them."""
    first, second = run(2, evaluating, slurm, kind, stage, rank)
    assert first["batches"] == second["batches"] == 30, "it goes on to its end"
    assert first["metrics"] == second["metrics"]
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
    assert not list(slurm.glob("**/*.ckpt*"))
    assert [len(one["said"]) for one in (first, second)] == [1, 0]
    assert f"in `{stage}`: a place in the queue is asked for, and nothing is saved" in first["said"][0]


class InTheSanityCheck(Warned):
    """Gets the signal there, before anybody trains."""

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.sanity_checking and self.batches == 0:
            self.batches = 1000
            self._warn(trainer)


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", ["all", 0, 1])
def test_a_signal_in_the_sanity_check_saves_behind_the_first_batches(slurm: Path, rank: Whom) -> None:
    found = run(2, job, slurm, rank, 60, False, "gossip_ring", InTheSanityCheck)
    assert [one["steps"] for one in found] == [60, 60]
    assert found[0]["saved"] == found[1]["saved"]
    (at,) = found[0]["saved"]
    assert 0 < at < 60
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", ["all", 2, 0])
def test_the_stages_of_a_pipeline_do_so_too(slurm: Path, rank: Whom) -> None:
    ends = run(3, pipeline, slurm, rank, InTheSanityCheck)
    assert all(end["saved"] == ends[0]["saved"] for end in ends)
    (at,) = ends[0]["saved"]
    assert 0 < at <= 2 * 3 + 1
    assert ends[0]["steps"] == 24
    assert (slurm / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
