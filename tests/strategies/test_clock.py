"""Lightning's counts are the run's: a step is a batch of every rank, though one of them is 4x slower."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import IterableDataset

from lightning_async import (
    AsyncGlobalStrategy,
    AsyncStrategy,
    CyclicDelayStrategy,
    GossipRingStrategy,
    LazySignStrategy,
    SpeedFaults,
)
from lightning_async.progress.progress import Progress
from lightning_async.strategies.counts import Counts
from tests.strategies.lit import INPUTS, TARGETS, ByHand, Lit, loader, trainer
from tests.strategies.ranks import Forked, run


class Watch(L.Callback):
    """What the loop does on this rank, at which step of the run."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.validated: list[int] = []
        self.saved: list[int] = []
        self.rates: list[float] = []
        self.rates_met: list[float] = []
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        self.steps.append((trainer.strategy.clock.progress.meetings, trainer.global_step))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)
            self.rates_met.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved.append(trainer.global_step)


def fit(
    module: Lit | None = None,
    data: Any = None,
    callbacks: list[Any] | None = None,
    slow: int = 1,
    seconds: float = 0.004,
    ckpt_path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    watch, module = Watch(), module or Lit()
    one = trainer(
        2, callbacks=[*(callbacks or []), SpeedFaults(step_seconds=seconds, slow={slow: 4.0}), watch], **options
    )
    one.fit(module, loader() if data is None else data, loader(40, shuffle=False), ckpt_path=ckpt_path)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return {
        "steps": watch.steps,
        "validated": watch.validated,
        "saved": watch.saved,
        "rates": watch.rates,
        "rates_met": watch.rates_met,
        "batches": watch.batches,
        "global_step": one.global_step,
        "epoch": one.current_epoch,
        "seen": module.seen,
        "weights": weights.tolist(),
        "options": (one.max_steps, getattr(one, "val_check_interval", None), one.limit_train_batches),
    }


def both(function: Any, *args: Any) -> list[dict[str, Any]]:
    found = run(2, function, *args)
    for name in ("validated", "saved", "global_step", "epoch", "weights", "rates_met"):
        assert found[0][name] == found[1][name], f"{name} differs between the ranks"
    for one in found:
        way = [later - step for (met, step), (also, later) in pairwise(one["steps"]) if met == also]
        assert min(way, default=0) >= 0, "on the way from one meeting to the next the run's steps never go back"
    return list(found)


def max_steps() -> dict[str, Any]:
    return fit(max_steps=40, max_epochs=-1, seconds=0.012)  # far more than a busy machine needs for a batch


def test_max_steps_are_those_of_a_synchronous_run() -> None:
    found = both(max_steps)
    assert found[0]["global_step"] == 40
    assert found[0]["batches"] + found[1]["batches"] == 2 * 40
    assert found[0]["batches"] > 1.5 * found[1]["batches"], "the fast rank does not go at the pace of the slow one"
    assert found[0]["options"][0] == 40


def validate_by_batches() -> dict[str, Any]:
    return fit(max_steps=60, max_epochs=-1, val_check_interval=15, check_val_every_n_epoch=None)


def test_validation_comes_every_so_many_steps_on_all_ranks() -> None:
    found = both(validate_by_batches)
    assert found[0]["validated"] == [15, 30, 45, 60]
    assert found[0]["options"][1] == 15, "the Trainer has its arguments back"


def validate_within_epochs() -> dict[str, Any]:
    return fit(max_epochs=2, val_check_interval=0.5)


def test_a_part_of_an_epoch() -> None:
    found = both(validate_within_epochs)  # 240 samples, batches of 4 on 2 ranks: 30 steps an epoch
    assert found[0]["validated"] == [15, 30, 45, 60]
    assert sorted(found[0]["seen"] + found[1]["seen"]) == sorted([*range(240), *range(240)])


def _watched_by(kind: str, folder: Path, every: Any, mine: type[AsyncStrategy], epochs: int = 2) -> dict[str, Any]:
    """Lightning's callbacks choose by `val_check_interval` between the ends of validations and those of epochs."""
    callbacks = {
        "saves": ModelCheckpoint(folder, filename="{step}", monitor="val", save_top_k=-1),
        "stops": EarlyStopping("val", patience=1, min_delta=1e9),
    }
    saves = {"enable_checkpointing": kind == "saves"}
    return fit(callbacks=[callbacks[kind]], max_epochs=epochs, val_check_interval=every, strategy=mine(), **saves)


@pytest.mark.few(1)
@pytest.mark.parametrize("mine", [GossipRingStrategy, AsyncGlobalStrategy, CyclicDelayStrategy, LazySignStrategy])
@pytest.mark.parametrize(("every", "steps"), [(0.5, [15, 30, 45, 60]), (7, [7, 14, 21, 28, 37, 44, 51, 58])])
def test_callbacks_save_behind_each_validation_in_mid_epoch(
    mine: type[AsyncStrategy], every: Any, steps: list[int], tmp_path: Path
) -> None:
    found = both(_watched_by, "saves", tmp_path, every, mine)
    assert found[0]["validated"] == found[0]["saved"] == steps
    assert {file.name for file in tmp_path.glob("*.ckpt")} == {f"step={step}.ckpt" for step in steps}


@pytest.mark.few(1)
@pytest.mark.parametrize("mine", [GossipRingStrategy, LazySignStrategy])
@pytest.mark.parametrize(("every", "step"), [(0.5, 30), (7, 14)])
def test_callbacks_stop_behind_a_validation_in_mid_epoch(
    mine: type[AsyncStrategy], every: Any, step: int, tmp_path: Path
) -> None:
    assert both(_watched_by, "stops", tmp_path, every, mine)[0]["global_step"] == step


@pytest.mark.few(0)
def test_callbacks_act_behind_validations_by_time(tmp_path: Path) -> None:
    found = both(_watched_by, "saves", tmp_path, timedelta(seconds=0.1), GossipRingStrategy, 1)
    assert found[0]["validated"] == found[0]["saved"]
    assert 0 < found[0]["saved"][0] < 30


def limited(limit: Any) -> dict[str, Any]:
    return fit(max_epochs=2, limit_train_batches=limit)


@pytest.mark.few(1)
@pytest.mark.parametrize(("limit", "steps"), [(10, 10), (0.5, 15)])
def test_a_limited_epoch(limit: Any, steps: int) -> None:
    found = both(limited, limit)
    assert found[0]["global_step"] == 2 * steps
    assert found[0]["validated"] == [steps, 2 * steps]
    assert len(found[0]["seen"] + found[1]["seen"]) == 2 * steps * 8


def saves(folder: Path, slow: int) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    options = {"slow": slow, "seconds": 0.01, "max_steps": 48, "max_epochs": -1}
    found = fit(callbacks=[saver], enable_checkpointing=True, **options)
    return {**found, "best": saver.best_model_path, "last": saver.last_model_path}


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [0, 1])
def test_checkpoints_every_so_many_steps(slow: int, tmp_path: Path) -> None:
    """A slow rank slows no save, be it the one that writes them: behind the first one speeds are known."""
    found = both(saves, tmp_path, slow)
    assert found[0]["saved"] == [12, 24, 36, 48]
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == [f"step={n}.ckpt" for n in (12, 24, 36, 48)]
    first = found[0]["steps"][0][0]
    trained = [sum(met > first for met, _ in one["steps"]) for one in found]
    assert found[0]["batches"] + found[1]["batches"] == 2 * 48
    assert trained[1 - slow] > 2 * trained[slow]


def late(folder: Path, path: Path | None) -> dict[str, Any]:
    """Rank 1 hears of nothing for some batches, as if its store were slow, and comes late to the first meeting."""
    comes = Progress.comes

    def deaf(progress: Progress) -> Any:
        if path is None and os.environ["RANK"] == "1" and 15 < progress.own.batches < 26:
            return False
        return (yield from comes(progress))

    Progress.comes = deaf  # type: ignore[method-assign]
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    options = {"callbacks": [saver], "enable_checkpointing": True, "max_epochs": -1, "ckpt_path": path}
    options |= {"max_steps": 60, "val_check_interval": 20, "check_val_every_n_epoch": None}
    return streamed([10**6, 10**6], options)  # of shared samples the others may leave a rank none


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable")
@pytest.mark.filterwarnings("ignore:`DataLoader` has no state, so this run begins its stream anew")
def test_a_point_that_was_passed_is_saved_and_validated_once_all_the_same(tmp_path: Path) -> None:
    found = both(late, tmp_path, None)
    assert found[0]["validated"] == found[0]["saved"] == [23, 40, 60]
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    callbacks = torch.load(tmp_path / "step=23.ckpt", weights_only=True)["callbacks"]
    assert "'every_n_train_steps': 20" in next(iter(callbacks)), "the state is found again"
    again = both(late, tmp_path, tmp_path / "step=23.ckpt")
    assert again[0]["validated"] == again[0]["saved"] == [40, 60]


class Scheduled(Lit):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        total = int(self.trainer.estimated_stepping_batches)
        self.total = total
        makers: dict[str, Any] = {
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        }
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": makers[self.name](), "interval": "step"}}


SHORT = loader(n=120)
"""15 steps an epoch."""


def scheduled(name: str, options: dict[str, Any]) -> dict[str, Any]:
    module = Scheduled(name)
    found = fit(module, **options)
    return {**found, "total": module.total}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["onecycle", "cosine"])
@pytest.mark.parametrize("options", [{"max_steps": 40, "max_epochs": -1}, {"max_epochs": 2, "data": SHORT}])
def test_schedules_by_step_end_where_they_should(name: str, options: dict[str, Any]) -> None:
    found = both(scheduled, name, {**options, "val_check_interval": 5})
    assert len(set(found[0]["rates_met"])) >= 5, "which are the same on both ranks"
    assert found[0]["total"] == found[0]["global_step"] == (40 if "max_steps" in options else 30)
    end = 0.01 / 25 / 1e4 if name == "onecycle" else 0.0
    for one in found:
        assert one["rates"][-1] <= max(end * 1.001, 1e-3), "the last batch is at the end of the schedule"
    assert len(set(found[0]["rates"])) > 10


class Long(IterableDataset[Any]):
    """40 batches of four on rank 0, and 16 on rank 1; it says so."""

    def __len__(self) -> int:
        return 160 if os.environ["RANK"] == "0" else 64

    def __iter__(self) -> Any:
        return ((i, INPUTS[i], TARGETS[i]) for i in range(len(self)))


def scheduled_streams(sampler: bool, options: dict[str, Any]) -> dict[str, Any]:
    data = torch.utils.data.DataLoader(Long(), batch_size=4)
    return scheduled("onecycle", {"data": data, "slow": 0, "use_distributed_sampler": sampler, **options})


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("sampler", [True, False])
@pytest.mark.parametrize(
    ("options", "total", "step"),
    [({"max_epochs": 1}, 28, 28), ({"max_epochs": 2, "accumulate_grad_batches": 7}, 10, 9)],
)
def test_schedules_end_where_streams_of_unlike_lengths_do(
    options: dict[str, Any], total: int, step: int, sampler: bool
) -> None:
    """A run of 40 and of 16 batches has 28 steps; of seven batches each, it takes 6 and 3 an epoch."""
    found = both(scheduled_streams, sampler, options)
    assert [(one["total"], one["global_step"]) for one in found] == [(total, step)] * 2
    assert found[0]["rates"][-1] <= 1e-3, "the last batch of the longer stream is at the end of the schedule"


def stopped_by_time(folder: Path) -> dict[str, Any]:
    return fit(max_epochs=-1, max_time={"seconds": 1})


def test_max_time_stops_all_at_one_meeting(tmp_path: Path) -> None:
    start = time.monotonic()
    found = both(stopped_by_time, tmp_path)
    assert time.monotonic() - start < 15
    assert found[0]["global_step"] > 5


class Stopping(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_rank == 1 and len(self.seen) >= 40:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


def one_stops(validate: bool) -> dict[str, Any]:
    return fit(Stopping(), max_epochs=50, **({} if validate else {"limit_val_batches": 0}))


@pytest.mark.few(1)
@pytest.mark.parametrize("validate", [True, False])
def test_one_rank_that_wants_to_stop_stops_all(validate: bool) -> None:
    found = both(one_stops, validate)
    assert found[0]["epoch"] <= 2
    assert len(found[0]["validated"]) == (1 if validate else 0) + (found[0]["epoch"] - 1 if validate else 0)


class StopsEarly(Lit):
    """Wants to stop from its first batch on."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.should_stop = True


def at_least(mine: type[AsyncStrategy]) -> dict[str, Any]:
    return fit(StopsEarly(), loader(n=80), max_epochs=-1, min_steps=23, strategy=mine())  # 10 steps an epoch


@pytest.mark.few(1)
@pytest.mark.parametrize("mine", [GossipRingStrategy, LazySignStrategy])
def test_an_early_stop_comes_at_the_last_of_min_steps(mine: type[AsyncStrategy]) -> None:
    found = both(at_least, mine)
    assert found[0]["global_step"] == 23
    assert found[0]["batches"] + found[1]["batches"] == 2 * 23
    assert found[0]["validated"] == [10, 20, 23], "as under ddp, which validates where it stops"


class Skipping(Lit):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.trainer.global_rank == 0 and batch_idx == 5 else None


def one_skips() -> dict[str, Any]:
    return fit(Skipping(), max_epochs=2)


@pytest.mark.few(0)
def test_a_rank_that_skips_the_rest_of_its_epoch_waits_for_no_meeting_in_vain() -> None:
    found = both(one_skips)
    assert len(found[0]["validated"]) == 2


def logged(folder: Path, slow: int) -> dict[str, Any]:
    logger = CSVLogger(folder, name="", version="")
    return fit(slow=slow, seconds=0.02, max_steps=100, max_epochs=-1, logger=logger, log_every_n_steps=10)


@pytest.mark.few(0)
@pytest.mark.parametrize("slow", [0, 1])
def test_rank_0_logs_each_multiple_once_be_it_slow_or_fast(tmp_path: Path, slow: int) -> None:
    both(logged, tmp_path, slow)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    head = lines[0].split(",")
    at = [int(line.split(",")[head.index("step")]) for line in lines[1:] if line.split(",")[head.index("train_step")]]
    assert set(at) <= set(range(9, 100, 10))
    assert at == sorted(set(at)), "none twice"
    assert at[-1] == 99
    if slow == 1:  # a batch of the fast one is less than a step of the run
        assert len(at) >= 8
    assert len(at) >= 5, "but for what a busy machine jumps over, and the first moment, when nobody knows the others"


class Numbers(IterableDataset[Any]):
    """A stream that ends sooner on rank 1."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Any:
        return self._numbers()

    def _numbers(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for k in range(self.lengths[rank]):
            yield k % 240, INPUTS[k % 240], TARGETS[k % 240]


def streamed(lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    data = torch.utils.data.DataLoader(Numbers(lengths), batch_size=4)
    return fit(data=data, **options)


def test_a_stream_without_an_end() -> None:
    options = {"max_steps": 50, "max_epochs": -1, "val_check_interval": 20, "check_val_every_n_epoch": None}
    found = both(streamed, [10**6, 10**6], options)
    assert found[0]["validated"] == [20, 40]
    assert found[0]["global_step"] == 50


def test_a_stream_whose_epoch_is_limited() -> None:
    found = both(streamed, [10**6, 10**6], {"max_epochs": 2, "limit_train_batches": 12})
    assert found[0]["validated"] == [12, 24]


def test_a_rank_that_runs_dry_leaves_the_others_running_and_meets_them() -> None:
    """Its average is made equal with theirs at each meeting, though it has not changed since the last one."""
    options = {"max_epochs": 1, "val_check_interval": 15, "check_val_every_n_epoch": None}
    found = both(streamed, [4 * 60, 4 * 8], {**options, "callbacks": [EMAWeightAveraging()]})
    assert found[0]["batches"] == 60
    assert found[1]["batches"] == 8
    assert found[0]["validated"] == [15, 30]


def dry_and_saved(folder: Path) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    options = {"max_epochs": 1, "callbacks": [saver], "enable_checkpointing": True}
    return streamed([4 * 60, 4 * 8], options)


@pytest.mark.few(0)
def test_a_rank_that_runs_dry_saves_with_the_others(tmp_path: Path) -> None:
    found = both(dry_and_saved, tmp_path)
    assert found[0]["saved"] == [12, 24]
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def streamed_and_saved(folder: Path, path: Path | None, lengths: list[int]) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=15, save_top_k=-1)
    options = {"max_epochs": 1, "callbacks": [saver], "enable_checkpointing": True, "ckpt_path": path}
    return streamed([4 * 60, lengths[-1]], options)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint that ended")
@pytest.mark.filterwarnings("ignore:`DataLoader` has no state, so this run begins its stream anew")
@pytest.mark.filterwarnings("ignore:rank 1 had no batch in this epoch")
def test_a_rank_that_ran_dry_saves_and_resumes_with_the_others(tmp_path: Path) -> None:
    """It stands at the end of its epoch, where metrics of the epoch would be combined with ranks that are not there."""
    found = both(streamed_and_saved, tmp_path, None, [4 * 8])
    assert found[0]["saved"][:2] == [15, 30]
    assert (found[0]["batches"], found[1]["batches"]) == (60, 8)
    again = both(streamed_and_saved, tmp_path, tmp_path / "step=15.ckpt", [4 * 8])
    assert (again[0]["batches"], again[1]["batches"]) == (60, 0), "a stream without a state begins anew, or is over"


def met_by_samples() -> dict[str, Any]:
    return fit(
        max_steps=40,
        max_epochs=-1,
        knobs={"meet_every": 80},
        callbacks=[EarlyStopping("val", patience=50, check_on_train_epoch_end=False)],
    )


def test_meetings_by_samples() -> None:
    assert both(met_by_samples)[0]["global_step"] == 40


def in_step(options: dict[str, Any]) -> dict[str, Any]:
    knobs = {"mode": "sync", **options.pop("knobs", {})}
    return fit(knobs=knobs, max_steps=50, max_epochs=-1, check_val_every_n_epoch=None, **options)


@pytest.mark.few(0)
@pytest.mark.parametrize(
    "options", [{"val_check_interval": 12}, {"val_check_interval": 25, "knobs": {"meet_every": 56}}]
)
def test_ranks_that_go_in_step_stop_after_the_same_step(options: dict[str, Any]) -> None:
    found = both(in_step, options)
    assert found[0]["validated"] == ([12, 24, 36, 48] if "knobs" not in options else [25, 50])
    assert found[0]["batches"] == found[1]["batches"] == 50


class Told(L.Callback):
    """Gets a signal at its tenth batch."""

    def __init__(self, number: int, rank: int) -> None:
        self.number, self.rank = number, rank

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and args[-1] == 10:
            os.kill(os.getpid(), self.number)


def terminated(folder: Path, rank: int) -> list[float]:
    saver = ModelCheckpoint(folder, filename="last", save_on_exception=True, every_n_epochs=100)
    module = Lit()
    t = trainer(2, callbacks=[Told(signal.SIGTERM, rank), saver], enable_checkpointing=True, max_epochs=50)
    with pytest.raises(SIGTERMException):
        t.fit(module, loader(), loader(40, shuffle=False))
    return [float(x) for p in module.parameters() for x in p.detach().flatten()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_is_told_to_end_meets_and_saves_the_consensus(tmp_path: Path, rank: int) -> None:
    first, second = run(2, terminated, tmp_path, rank)
    assert first == second
    (file,) = tmp_path.glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    names = [name for name, _ in Lit().named_parameters()]
    assert [float(x) for name in names for x in saved["state_dict"][name].flatten()] == first
    assert len(list(tmp_path.glob("*.ranks/*rank*"))) == 2


def saved_by_time(folder: Path) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", train_time_interval=timedelta(seconds=0.05), save_top_k=-1)
    return fit(max_epochs=-1, max_steps=24, seconds=0.01, callbacks=[saver], enable_checkpointing=True)


def test_checkpoints_by_the_clock_of_the_first_rank(tmp_path: Path) -> None:
    found = both(saved_by_time, tmp_path)
    assert len(found[0]["saved"]) >= 2
    assert len(list(tmp_path.glob("*.ckpt"))) == len(found[0]["saved"])


def by_hand() -> dict[str, Any]:
    return fit(ByHand(), max_steps=40, max_epochs=-1)


def test_manual_optimisation_counts_too() -> None:
    assert both(by_hand)[0]["global_step"] == 40


def wished_in_vain(folder: Path) -> dict[str, Any]:
    """Lightning saves by no time where steps are taken by hand, and validates in every other epoch only."""
    saver = ModelCheckpoint(folder, train_time_interval=timedelta(seconds=0.01))
    options = {"val_check_interval": timedelta(seconds=0.01), "check_val_every_n_epoch": 2, "max_epochs": 1}
    found = fit(ByHand(), callbacks=[saver], enable_checkpointing=True, **options)
    return {**found, "met": found["steps"][-1][0]}


def test_what_a_meeting_would_not_do_calls_none(tmp_path: Path) -> None:
    found = both(wished_in_vain, tmp_path)
    assert found[0]["met"] <= 3
    assert found[0]["validated"] == found[0]["saved"] == []


def accumulated() -> dict[str, Any]:
    return fit(max_steps=20, max_epochs=-1, accumulate_grad_batches=3)


@pytest.mark.few(0)
def test_accumulated_batches_make_one_step() -> None:
    found = both(accumulated)
    assert found[0]["global_step"] == 20
    assert found[0]["batches"] + found[1]["batches"] >= 2 * 20 * 3 - 6


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "8"])
def test_bad_samples_between_meetings(every: Any) -> None:
    with pytest.raises(ValueError, match="`meet_every` must be an integer of at least 1"):
        trainer(1, knobs={"meet_every": every})


@pytest.mark.parametrize("grace", [-1, True, "8"])
def test_bad_grace(grace: Any) -> None:
    with pytest.raises(ValueError, match="`grace` must be a number of seconds of at least 0"):
        trainer(1, knobs={"grace": grace})


def due(every: int, *, shared: bool = True, length: int | None = 500, **options: Any) -> list[Any]:
    """What the counts of a Trainer ask for whose ranks have so many batches in an epoch."""
    told = {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "check_val_every_n_epoch": 1}
    told |= {"min_steps": None, **options}
    one: Any = SimpleNamespace(max_steps=-1, callbacks=[], fast_dev_run=False, val_check_interval=every, **told)
    feeding: Any = SimpleNamespace(share=object() if shared else None, epoch_batches=lambda: length, limit=1.0)
    counts = Counts(None)
    counts.take(one, feeding)
    known = [n for n in (length, told["limit_train_batches"]) if isinstance(n, int)]
    return list(counts.items(one, feeding, 2, 2 * min(known) if known else None))


@pytest.mark.parametrize(
    "never",
    [
        {"every": 1000},
        {"every": 501},
        {"every": 500, "shared": False, "length": 8},
        {"every": 9, "shared": False, "length": 500, "limit_train_batches": 8},
        {"every": 9, "shared": False, "length": None, "limit_train_batches": 8},
    ],
)
def test_an_interval_that_no_epoch_reaches_is_refused(never: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"`val_check_interval` \({never['every']}\) must be at most .* \((500|8)\)"):
        due(**never)
    assert due(**never, check_val_every_n_epoch=None)
    assert due(**never, limit_val_batches=0)


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"shared": False, "length": None}])
def test_an_interval_that_may_be_reached_is_not_refused(options: dict[str, Any]) -> None:
    assert due(500, **options)


def own_streams(every: int, lengths: tuple[int, int]) -> list[int]:
    data = loader(n=4 * lengths[int(os.environ["RANK"])])
    options = {"use_distributed_sampler": False, "val_check_interval": every}
    return cast(list[int], fit(data=data, max_epochs=1, **options)["validated"])


def test_streams_that_are_too_short_together_are_refused_on_all_ranks() -> None:
    """Those of unlike lengths may be long enough together. A rank may hear of the other's refusal first."""
    assert run(2, own_streams, 8, (4, 12)) == [[8], [8]]
    with Forked(2, own_streams, 9, (4, 12)) as forked:
        errors = [result.error for result in forked.results()]
    assert all("`val_check_interval` (9) must be at most" in error and "(8)" in error for error in errors), errors
