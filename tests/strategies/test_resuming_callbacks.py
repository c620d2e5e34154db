"""Averages and what was thawed go on from a checkpoint as if the run had not stopped, on all ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_async import GossipRingStrategy
from tests.strategies.lit import trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, Saves, held_out, samples, seed

pytestmark = pytest.mark.filterwarnings("ignore:.*goes on with the parameters that were trained")
EPOCHS = 4


class Thawing(Draws):
    """A backbone that is trained from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False))
        self.layer = nn.Sequential(self.backbone, nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


def _finetunes() -> Callback:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)


class Epochs(WeightAveraging):
    """The mean of the weights at the ends of epochs. (At which batches steps of the run end is another in each run.)"""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def _swa() -> Callback:
    return StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=2, annealing_epochs=1)


def _through(kind: Any, lit: Any, knobs: dict[str, Any], path: str, where: str, precision: Any, resume: bool) -> Any:
    """The losses from a save on, and the end, of a run that goes through or of one that begins there."""
    seed()
    module, save = lit(), Saves(path, where, epoch=2, batch=4)
    options = {"max_epochs": EPOCHS, "precision": precision, "num_sanity_val_steps": 0}
    t = trainer(2, knobs={"balance": "equal", **knobs}, callbacks=[kind(), save], **options)
    t.fit(module, samples(), held_out(), ckpt_path=path if resume else None)
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    rates = [group["lr"] for group in t.optimizers[0].param_groups]
    return module.losses if resume else module.losses[save.losses :], weights(module), rates, strategy.replica.numel


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist", "ignore:Detected call of `lr_sch")
@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("kind", "lit", "at_meeting", "where", "precision"),
    [
        (_finetunes, Thawing, "adopt", "batch", "32-true"),
        (_finetunes, Thawing, "keep", "validation", "32-true"),
        (_finetunes, Thawing, "keep", "epoch", "bf16-true"),
        (Epochs, Draws, "adopt", "batch", "32-true"),
        (Epochs, Draws, "keep", "epoch", "32-true"),
        (_swa, Draws, "keep", "epoch", "32-true"),
    ],
)
def test_a_resumed_run_continues_as_if_it_had_not_stopped(
    kind: Any, lit: Any, at_meeting: str, where: str, precision: str, tmp_path: Path
) -> None:
    knobs = {"mode": "none", "at_meeting": at_meeting}
    through = run(2, _through, kind, lit, knobs, str(tmp_path / "x.ckpt"), where, precision, False)
    resumed = run(2, _through, kind, lit, knobs, str(tmp_path / "x.ckpt"), where, precision, True)
    for one, other in zip(through, resumed, strict=True):
        assert len(one[0]) > 5
        assert one == other
    assert resumed[0][1] == resumed[1][1]


def _told(path: str) -> list[str]:
    t = trainer(2, callbacks=[_finetunes()], max_epochs=EPOCHS, num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(Thawing(), samples(), held_out(), ckpt_path=path)
    return [said for w in caught if "goes on with the parameters" in (said := str(w.message))]


@pytest.mark.few(0)
def test_the_run_says_once_what_it_thaws_again(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    run(2, _through, _finetunes, Thawing, {"at_meeting": "keep"}, path, "batch", "32-true", False)
    (said,), silent = run(2, _told, path)
    assert f"were trained when {path} was saved: it trains `layer.0.0.bias`, `layer.0.0.weight` again" in said
    assert not silent


@pytest.mark.few(0)
def test_a_file_that_does_not_say_what_was_trained_is_refused_if_it_does_not_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    arguments = (_finetunes, Thawing, {"mode": "none", "at_meeting": "keep"}, path, "batch", "32-true")
    run(2, _through, *arguments, False)
    main = torch.load(path, weights_only=True)
    del main["lightning_async"]["trained"]
    torch.save(main, path)
    with Forked(2, _through, *arguments, True) as forked:
        results = forked.results(30)
    assert all("trained other parameters when they were saved (a vector of 144 elements" in r.error for r in results)
