"""Scenes: callbacks that change weights: averages, thawing, pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from tests.strategies.features.fits import (
    STEPS,
    Fitted,
    Left,
    alike,
    another,
    fit,
    heard,
    mean_of,
    rank,
)
from tests.strategies.features.table import Scene, Verdict, refused, shown, works
from tests.strategies.lit import Lit

SECTION = "Callbacks"


class Backbone(Lit):
    """Has a backbone to thaw, and freezes it by itself where a test asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0], self.backbone(batch[1]), batch[2]), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


class Thaws(BaseFinetuning):
    """Thaws the backbone at the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)


def _thawed(trainer: L.Trainer, module: L.LightningModule) -> bool:
    return all(p.requires_grad for p in module.backbone.parameters())  # type: ignore[union-attr]


def averaging(folder: Path) -> dict[str, Any]:
    def averaged(callback: L.Callback) -> Fitted:
        left = Left()
        return Fitted(fit(callbacks=[left, callback]), began=left.began, trained=left.trained)

    return {
        "ema": averaged(EMAWeightAveraging(decay=0.9)),
        "mean": averaged(WeightAveraging()),
        "none": averaged(L.Callback()),
        "swa": fit(callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], max_epochs=3),
        "backbone": fit(Backbone(), callbacks=[BackboneFinetuning(1, verbose=False)], look=_thawed),
        "thaws": fit(Backbone(), callbacks=[Thaws()], look=_thawed),
        "accumulate": fit(callbacks=[GradientAccumulationScheduler({1: 4})]),
    }


AVERAGED = (
    "averages of all ranks become their mean before they are validated, saved, or left as the result; by the steps of "
    "the run, once a batch at most"
)


AVERAGING = Scene(
    SECTION,
    averaging,
    [
        *[
            works(
                kind,
                "",
                lambda a, b, k=key: (
                    alike(a[k], b[k])
                    and a[k].metrics["val"] == b[k].metrics["val"]
                    and [another(one[of]) for one in (a, b) for of in (k, "none")] == [True, False] * 2
                ),
                AVERAGED,
            )
            for kind, key in (("EMAWeightAveraging", "ema"), ("WeightAveraging", "mean"))
        ],
        works(
            "StochasticWeightAveraging",
            "",
            lambda a, b: alike(a["swa"], b["swa"]) and mean_of(a["swa"], 0, 2),
            "it averages what all hold after a meeting",
        ),
        *[
            works(
                kind,
                "",
                lambda a, b, k=key: alike(a[k], b[k]) and not a[k].looked[0] and a[k].looked[-1] and b[k].looked[-1],
                "thaws at a meeting; exchange begins anew with the new set; stays thawed in a run that goes on",
            )
            for kind, key in (("BackboneFinetuning", "backbone"), ("BaseFinetuning", "thaws"))
        ],
        shown(
            "BaseFinetuning",
            "behind a validation in mid-epoch",
            Verdict.WORKS,
            "in `on_validation_end`; what `ModelCheckpoint` saves behind it at the same meeting goes on with what is "
            "thawed",
            "strategies/test_thaws_in_mid_epoch.py::test_what_is_saved_behind_the_thaw_goes_on_to_the_bit",
        ),
        works(
            "GradientAccumulationScheduler",
            "{1: 4}",
            lambda a, b: (
                alike(a["accumulate"], b["accumulate"])
                and a["accumulate"].epochs[0] == STEPS
                and 3 <= a["accumulate"].epochs[1] - STEPS <= 4
            ),
        ),
    ],
    warnings=["Swapping scheduler", ".*lr_scheduler.step.*"],
)


def _masks(trainer: L.Trainer, module: L.LightningModule) -> tuple[float, ...]:
    return tuple(float(x) for name, b in module.named_buffers() if name.endswith("_mask") for x in b.flatten())


def pruned(folder: Path) -> dict[str, Any]:
    def run(way: str, **options: Any) -> Fitted:
        torch.manual_seed(7)
        lit = Lit()
        layers = [(lit.layer[0], "weight"), (lit.layer[2], "weight")]
        torch.manual_seed(rank())
        return fit(
            lit,
            callbacks=[ModelPruning(way, parameters_to_prune=layers, amount=0.5, **options)],
            max_epochs=3,
            look=_masks,
        )

    return {
        "plain": run("l1_unstructured", use_lottery_ticket_hypothesis=False),
        "lottery": run("l1_unstructured"),
        "random": heard(lambda: run("random_unstructured")),
        "structured": heard(lambda: run("random_structured", use_global_unstructured=False, pruning_dim=0)),
    }


def _zeros(found: Fitted) -> int:
    return sum(w == 0.0 for w in found.weights[:64])


def _prunes(a: Any, b: Any, key: str) -> bool:
    masks = {look for one in (a, b) for look in one[key].looked if look}
    return (
        alike(a[key], b[key])
        and a[key].looked[-1] == b[key].looked[-1]
        and {x for mask in masks for x in mask} == {0.0, 1.0}
    )


PRUNED = Scene(
    SECTION,
    pruned,
    [
        works(
            "ModelPruning",
            '`"l1_unstructured"`',
            lambda a, b: _prunes(a, b, "plain") and _zeros(a["plain"]) > 16,
            "by the consensus: the same weights on all ranks",
        ),
        works(
            "ModelPruning",
            "with the lottery ticket's reset",
            lambda a, b: _prunes(a, b, "lottery"),
            "to what each rank began with: seed all ranks alike, as for `ddp`",
        ),
        refused(
            "ModelPruning",
            '"random_unstructured"',
            "`ModelPruning` with `RandomUnstructured` draws another mask on each rank; use 'l1_unstructured' or "
            "'ln_structured', which go by weights that are equal on all ranks by then",
            key="random",
        ),
        refused(
            "ModelPruning",
            '"random_structured"',
            "`ModelPruning` with `random_structured` draws another mask on each rank; use 'l1_unstructured' or "
            "'ln_structured', which go by weights that are equal on all ranks by then",
            key="structured",
        ),
    ],
)


SCENES = [AVERAGING, PRUNED]
