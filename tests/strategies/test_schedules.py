"""Schedules by step end where they should, on all ranks alike; a plateau by step is asked at meetings.

There all ranks reduce together, by the mean of what they measured.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_async import AsyncGlobalStrategy, AsyncStrategy, GossipRingStrategy, SpeedFaults
from tests.strategies.lit import ByHand, Lit, Numbers, loader, trainer
from tests.strategies.ranks import run


class Ending(Lit):
    """One of these schedules, made for as many steps as Lightning foresees; OneCycleLR raises where one is too many."""

    def __init__(self, name: str = "onecycle", total: int | None = None) -> None:
        super().__init__()
        self.name, self.total = name, total

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        self.total = self.total or int(self.trainer.estimated_stepping_batches)
        schedule = schedules(self.name, optimizer, self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def schedules(name: str, optimizer: torch.optim.Optimizer, total: int) -> Any:
    if name == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total)
    if name == "warm-up":
        up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=total // 4)
        down = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [total // 4])
    if name == "lambda":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, (10 / (step + 1)) ** 0.5))
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)


def at_its_end(name: str, total: int) -> list[tuple[int, int, int, float]]:
    """What both ranks find where all is as on one rank that takes so many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    schedule = schedules(name, optimizer, total)
    for _ in range(total):
        optimizer.step()
        schedule.step()
    return [(total, total, total, pytest.approx(schedule.get_last_lr()[0], abs=1e-12))] * 2


def ended(module: Ending, one: L.Trainer) -> tuple[int | None, int, int, float]:
    (config,) = one.lr_scheduler_configs
    assert config.frequency == 1, "the user's number is put back"
    return module.total, one.global_step, config.scheduler.last_epoch, config.scheduler.get_last_lr()[0]


def ends(
    name: str, of: type[AsyncStrategy], batches: tuple[int, int], samples: int, options: dict[str, Any]
) -> tuple[int | None, int, int, float]:
    """What was foreseen, the run's step at the end, the schedule's, and its last rate."""
    module, batch = Ending(name), batches[int(os.environ["RANK"])]
    slow = SpeedFaults(step_seconds=0.002, slow={1: options.pop("slow", 3.3)})
    one = trainer(2, strategy=of(**options.pop("knobs", {})), callbacks=[slow], **options)
    one.fit(module, loader(batch, n=samples), loader(40, shuffle=False))
    return ended(module, one)


@pytest.mark.few(0)
@pytest.mark.parametrize("samples", [224, 240])
@pytest.mark.parametrize("name", ["onecycle", "cosine"])
@pytest.mark.parametrize("of", [GossipRingStrategy, AsyncGlobalStrategy])
def test_accumulated_batches_of_a_slow_rank_add_up_to_the_steps_foreseen(
    of: type[AsyncStrategy], name: str, samples: int
) -> None:
    """Each rank ends its epoch with a step of fewer batches than others: 75 or 77 steps are taken for every 2 * 35."""
    found = run(2, ends, name, of, (4, 4), samples, {"accumulate_grad_batches": 4, "max_epochs": 5})
    total = 5 * 7 if samples == 224 else 5 * 8
    assert found == at_its_end(name, total)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["warm-up", "lambda"])
@pytest.mark.parametrize("of", [AsyncGlobalStrategy, GossipRingStrategy])
def test_a_warm_up_and_the_decay_behind_it_go_by_the_run_where_a_rank_is_slow(
    of: type[AsyncStrategy], name: str
) -> None:
    """The decay begins at the run's step, though one rank took more by then and the other few: both end there."""
    assert run(2, ends, name, of, (4, 4), 240, {"max_epochs": 1, "slow": 4.0}) == at_its_end(name, 30)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["onecycle", "cosine"])
@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_steps": 12, "max_epochs": -1, "accumulate_grad_batches": 4}, 12),
        ({"max_steps": 12, "max_epochs": 9, "accumulate_grad_batches": 4}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3, "limit_train_batches": 10}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "knobs": {"meet_every": 50}}, 21),
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "knobs": {"balance": "incremental"}}, 21),
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "reload_dataloaders_every_n_epochs": 1}, 21),
    ],
)
def test_so_they_do_with_limits_and_meetings_and_stop_at_max_steps(
    name: str, options: dict[str, Any], total: int
) -> None:
    found = run(2, ends, name, GossipRingStrategy, (4, 4), 224, options)
    assert found == at_its_end(name, total)


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [1.0, 4.0])
@pytest.mark.parametrize("name", ["onecycle", "cosine"])
@pytest.mark.parametrize(
    ("batches", "options", "total"),
    [
        ((4, 12), {"max_epochs": 4}, 60),
        ((12, 4), {"max_epochs": 4}, 60),
        ((4, 12), {"max_epochs": 4, "accumulate_grad_batches": 4}, 16),
        ((4, 12), {"max_epochs": 4, "limit_train_batches": 0.5}, 28),
        ((4, 12), {"max_epochs": 4, "limit_train_batches": 6}, 24),
        ((4, 12), {"max_epochs": 2, "val_check_interval": 0.5}, 30),
        ((8, 2), {"max_epochs": 9, "max_steps": 30}, 30),
    ],
)
def test_ranks_of_unlike_batch_sizes_foresee_the_same_and_end_there(
    batches: tuple[int, int], options: dict[str, Any], total: int, name: str, slow: float
) -> None:
    found = run(2, ends, name, GossipRingStrategy, batches, 240, {**options, "slow": slow})
    assert found == at_its_end(name, total)


def of_members() -> tuple[int | None, int, int, float]:
    module = Ending("onecycle")
    slow = SpeedFaults(step_seconds=0.003, slow={2: 3.3, 3: 3.3})
    strategy = GossipRingStrategy(inner_size=2)
    one = trainer(4, strategy=strategy, callbacks=[slow], accumulate_grad_batches=4, max_epochs=3)
    one.fit(module, loader(2, n=224), loader(40, shuffle=False))
    return ended(module, one)


@pytest.mark.few(0)
def test_so_do_members_of_several_ranks() -> None:
    assert run(4, of_members) == at_its_end("onecycle", 3 * 7) * 2


def streams(options: dict[str, Any]) -> tuple[int | None, int, int, float]:
    module = Ending("onecycle")
    one = trainer(2, callbacks=[SpeedFaults(step_seconds=0.002, slow={1: 3.3})], **options)
    one.fit(module, torch.utils.data.DataLoader(Numbers(10**6), batch_size=4), loader(40, shuffle=False))
    return ended(module, one)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*not resumable")
def test_so_do_streams_whose_epochs_end_by_a_limit() -> None:
    found = run(2, streams, {"max_epochs": 4, "limit_train_batches": 14, "accumulate_grad_batches": 4})
    assert found == at_its_end("onecycle", 16)


def interrupted(folder: Path, path: Path | None, accumulate: int) -> Any:
    """A run that validates, and saves, in mid-epoch."""
    module = Ending("cosine", total=40)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    slow = SpeedFaults(step_seconds=0.002, slow={1: 3.3})
    options = {"max_epochs": 4, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    one = trainer(2, callbacks=[saver, slow], **options)
    one.fit(module, loader(n=224), loader(40, shuffle=False), ckpt_path=path)
    return ended(module, one)[1:3]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable")
@pytest.mark.few(0)
@pytest.mark.parametrize("accumulate", [4, 2])
def test_an_epoch_that_goes_on_counts_whole_if_it_goes_on_alike(tmp_path: Path, accumulate: int) -> None:
    """With other steps it counts for those that are taken: 14 an epoch, but fewer for the rest of one."""
    assert run(2, interrupted, tmp_path, None, 4) == [(28, 28)] * 2
    saved = {int(path.stem.removeprefix("step=")): path for path in tmp_path.glob("*.ckpt")}
    step = min(step for step in saved if step > 7)
    assert step < 14, "in the second epoch"
    (first, again) = run(2, interrupted, tmp_path, saved[step], accumulate)
    assert first == again
    if accumulate == 4:
        assert first == (28, 28)
    else:
        assert -2 <= first[0] - (step + 2 * (14 - step) + 28) <= 1, "the rest of one epoch, and two whole ones"


class Leaving(Ending):
    """All leave the epoch before its end."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 6 else None


def leaves() -> tuple[int | None, int, int, float]:
    module = Leaving()
    one = trainer(2, max_epochs=2)
    one.fit(module, loader(), loader(40, shuffle=False))
    return ended(module, one)


def test_an_epoch_that_is_left_counts_for_what_was_done_of_it() -> None:
    assert [found[:3] for found in run(2, leaves)] == [(60, 12, 12)] * 2


def by_hand(options: dict[str, Any]) -> int:
    one = trainer(2, **options)
    one.fit(TwoByHand(), loader(8), loader(40, shuffle=False))
    return one.global_step


class TwoByHand(ByHand):
    """Two steps of an optimizer for each batch: Lightning counts both, and foresees one."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)


def test_steps_by_hand_count_as_they_are_taken() -> None:
    assert run(2, by_hand, {"max_epochs": 2}) == [60, 60]


def logged(folder: Path) -> tuple[int, int]:
    changes = GradientAccumulationScheduler({0: 4, 2: 2})
    slow = SpeedFaults(step_seconds=0.002, slow={1: 3.3})
    logger = CSVLogger(folder, name="", version="")
    one = trainer(2, callbacks=[changes, slow], logger=logger, log_every_n_steps=1000, max_epochs=3)
    one.fit(Lit(), loader(n=224), loader(40, shuffle=False))
    return one.global_step, one.strategy.stepping.taken  # type: ignore[attr-defined]


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_what_is_logged_are_the_steps_that_were_taken_though_accumulation_changes(tmp_path: Path) -> None:
    found = run(2, logged, tmp_path)
    assert [steps for steps, _ in found] == [7 + 7 + 14] * 2
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("progress/updates")]
    assert float(rows[-1]["progress/samples"]) == 3 * 224
    assert float(rows[-1]["progress/updates"]) == sum(taken for _, taken in found) >= 2 * 28


class Plateau(Lit):
    """Reduces tenfold whenever the metric was not better than before; rank 1's metric grows, the mean stays."""

    def __init__(self, monitor: str, frequency: int) -> None:
        super().__init__()
        self.monitor, self.frequency, self.rates = monitor, frequency, [0.01]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        sign = 1.0 if self.trainer.global_rank else -1.0
        self.log("own", torch.tensor(5.0 + sign * self.trainer.global_step))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        if rate != self.rates[-1]:
            self.rates.append(rate)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        config = {"scheduler": plateau, "interval": "step", "monitor": self.monitor, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


def reduces(monitor: str, frequency: int, options: dict[str, Any]) -> tuple[list[float], int]:
    lit = Plateau(monitor, frequency)
    t: L.Trainer = trainer(2, callbacks=[SpeedFaults(step_seconds=0.004, slow={1: 4.0})], **options)
    t.fit(lit, loader(), loader(40, shuffle=False))
    (config,) = t.lr_scheduler_configs
    assert config.frequency == frequency, "the user's number is put back"
    return lit.rates, config.scheduler.state_dict()["last_epoch"]


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")
@pytest.mark.parametrize(("frequency", "asked"), [(10, 4), (20, 2), (1, 4)])
def test_it_is_asked_once_a_meeting_and_all_ranks_reduce_together(frequency: int, asked: int) -> None:
    options = {"max_steps": 45, "max_epochs": -1, "val_check_interval": 10, "check_val_every_n_epoch": None}
    (first, often), (second, as_often) = run(2, reduces, "own", frequency, options)
    assert first[-1] == second[-1]
    assert often == as_often
    assert often == asked if frequency > 1 else often >= asked, "a frequency of 1: at every meeting there is"
    assert first[-1] == pytest.approx(0.01 * 0.1 ** (often - 1)), "the first asking has nothing to compare with"


def test_a_metric_that_nobody_has_is_said_and_not_asked_for() -> None:
    options = {"max_steps": 20, "max_epochs": -1, "knobs": {"meet_every": 20}, "limit_val_batches": 0}
    with pytest.warns(UserWarning, match="found no metric 'own' at a meeting"):
        trainer_of_one(options)


def trainer_of_one(options: dict[str, Any]) -> None:
    trainer(1, **options).fit(Plateau("own", 1), loader(), loader(40, shuffle=False))
