"""A metric that one rank has none of: it goes by the others', and stops nobody."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_async.strategies.monitored import mean
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import Forked, run
from tests.strategies.test_streams import Few

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True"),
    pytest.mark.filterwarnings("ignore:rank .* had no batch in this epoch"),
]


class Turns(Few):
    """Streams of so many samples on each rank, epoch by epoch."""

    def __init__(self, *lengths: list[int]) -> None:
        super().__init__(*[0] * len(lengths))
        self.lengths = [*lengths[int(os.environ["RANK"])]]

    def __iter__(self) -> Any:
        self.length = self.lengths.pop(0)
        return super().__iter__()


class Told(Lit):
    """It logs the epoch as a loss, which grows, and as a gain; a number of its own, and one of rank 0 alone."""

    def __init__(self, plateau: str | None = None, strict: bool = True) -> None:
        super().__init__()
        self.plateau, self.strict = plateau, strict
        self.counts = MeanMetric()
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        epoch, rank = float(self.current_epoch), self.global_rank
        self.log("gain", -epoch, on_step=True, on_epoch=True)
        self.log("both", -epoch, on_step=False, on_epoch=True, sync_dist=True)
        self.log("own", 5.0 + (epoch if rank else -epoch), on_step=False, on_epoch=True)
        self.counts.update(epoch)
        self.log("counts", self.counts, on_step=False, on_epoch=True)
        if rank == 0:
            self.log("zero", -epoch, on_step=False, on_epoch=True, rank_zero_only=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self) -> None:
        self.on_train_epoch_start()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        if self.plateau is None:
            return optimizer
        if self.plateau == "epochs":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": self.plateau, "strict": self.strict},
        }


def fit(lengths: list[list[int]], plateau: str | None, callbacks: Any, options: Any = None) -> dict[str, Any]:
    lit, made = Told(plateau), [make() for make in callbacks]
    saves = [c for c in made if isinstance(c, ModelCheckpoint)]
    options = {"max_epochs": len(lengths[0]), "enable_checkpointing": bool(saves), **(options or {})}
    t = trainer(len(lengths), callbacks=made, **options)
    t.fit(lit, DataLoader(Turns(*lengths), batch_size=4), loader(16, shuffle=False))
    return {
        "rates": [round(rate, 9) for rate in lit.rates],
        "epochs": t.current_epoch,
        "best": [Path(c.best_model_path).name for c in saves],
        "score": [float(c.best_model_score) for c in saves if c.best_model_score is not None],
    }


LATE = [[16, 16, 16], [0, 0, 16]], [[0, 0, 16], [16, 16, 16]]
STALE = [[16, 16, 16, 16], [16, 0, 0, 16]], [[16, 0, 0, 16], [16, 16, 16, 16]]


@pytest.mark.few(2)
@pytest.mark.parametrize("lengths", LATE)
@pytest.mark.parametrize("monitor", ["gain", "both"])
def test_a_rank_without_a_batch_saves_what_is_best_of_the_others(
    lengths: list[list[int]], monitor: str, tmp_path: Path
) -> None:
    save = partial(ModelCheckpoint, tmp_path, monitor=monitor, filename="{epoch}", mode="min")
    first, second = run(2, fit, lengths, None, [save])
    assert first["best"] == second["best"] == ["epoch=2.ckpt"]
    assert first["score"] == second["score"] == [-2.0]


@pytest.mark.few(2)
@pytest.mark.parametrize("lengths", LATE)
@pytest.mark.parametrize("monitor", ["gain", "both", "counts"])
@pytest.mark.parametrize("better", [True, False])
def test_a_rank_without_a_batch_stops_by_the_others_metric(
    lengths: list[list[int]], monitor: str, better: bool
) -> None:
    mode = "max" if better == (monitor == "counts") else "min"
    found = run(2, fit, lengths, None, [lambda: EarlyStopping(monitor, mode=mode, patience=0)])
    assert [end["epochs"] for end in found] == [3 if better else 2] * 2


@pytest.mark.few(1)
@pytest.mark.parametrize("lengths", STALE)
def test_a_metric_of_an_earlier_epoch_is_none_of_this_one(lengths: list[list[int]]) -> None:
    """It would not grow better."""
    found = run(2, fit, lengths, "gain", [lambda: EarlyStopping("gain", mode="min", patience=0)])
    assert [end["epochs"] for end in found] == [4, 4]
    assert [end["rates"] for end in found] == [[0.01] * 5] * 2


def test_what_rank_zero_alone_logs_is_everybodys(tmp_path: Path) -> None:
    lengths = [[16, 16, 16]] * 2
    save = partial(ModelCheckpoint, tmp_path, monitor="zero", filename="{epoch}", mode="min")
    first, second = run(2, fit, lengths, "zero", [save, lambda: EarlyStopping("zero", mode="max", patience=1)])
    assert first["epochs"] == second["epochs"] == 2
    assert first["best"] == second["best"] == ["epoch=1.ckpt"]
    assert first["rates"] == second["rates"] == [0.01, 0.01, 0.01]


def test_a_checkpoint_by_steps_sees_it_in_mid_epoch(tmp_path: Path) -> None:
    save = partial(
        ModelCheckpoint, tmp_path, monitor="gain_step", filename="{step}", every_n_train_steps=4, save_top_k=-1
    )
    found = run(2, fit, [[64], [0]], None, [save], {"val_check_interval": 4, "check_val_every_n_epoch": None})
    assert found[0]["best"] == found[1]["best"]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plateau_by_epoch_goes_by_the_mean(ranks: int) -> None:
    """Rank 0's grows better and rank 1's worse: the mean stays, and behind the first epoch all reduce."""
    found = run(ranks, fit, [[16, 16, 16]] * ranks, "own", [])
    rates = [0.01, 0.01, 0.001, 0.0001] if ranks == 2 else [0.01] * 4
    assert [end["rates"] for end in found] == [rates] * ranks


@pytest.mark.few(1)
@pytest.mark.parametrize("lengths", LATE)
def test_a_plateau_by_epoch_goes_by_those_who_had_a_batch(lengths: list[list[int]]) -> None:
    found = run(2, fit, lengths, "counts", [])
    assert [end["rates"] for end in found] == [[0.01, 0.01, 0.001, 0.0001]] * 2


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the rank has made no step of its own
def test_a_schedule_by_epoch_goes_on_without_a_batch() -> None:
    found = run(2, fit, [[16, 16, 16, 16], [0, 0, 16, 0]], "epochs", [])
    assert [end["rates"] for end in found] == [[0.01, 0.001, 0.0001, 0.00001, 0.000001]] * 2


def test_what_nobody_logs_is_refused_by_lightning_on_all_alike() -> None:
    """A rank may hear of the other's refusal first."""
    with Forked(2, fit, [[16], [0]], "nobodys", []) as forked:
        said = [result.error for result in forked.results()]
    assert any("ReduceLROnPlateau conditioned on metric nobodys" in error for error in said)
    assert all("nobodys" in error for error in said)


def test_the_mean_of_what_is_alike_is_that_to_the_bit() -> None:
    assert mean([0.1] * 3) == torch.tensor(0.1, dtype=torch.float64)
    assert mean([1.0, 2.0]) == 1.5
