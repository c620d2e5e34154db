"""Scenes: arguments that set how everything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.strategies.features.fits import (
    Fitted,
    alike,
    fit,
)
from tests.strategies.features.table import Scene, works
from tests.strategies.lit import Lit

SECTION = "Stages and checkpoints"


class Looks(Lit):
    """Whether gradients, and inference mode, are on while it is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[tuple[bool, bool]] = set()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))


def _environment(trainer: L.Trainer, module: L.LightningModule) -> tuple[bool, bool, bool]:
    return torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def modes(folder: Path) -> dict[str, Any]:
    def looks(mode: bool) -> set[tuple[bool, bool]]:
        lit = Looks()
        fit(lit, inference_mode=mode, max_epochs=1)
        return lit.modes

    def surroundings(**options: Any) -> Fitted:
        try:
            return fit(look=_environment, max_epochs=1, **options)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = False

    return {
        "inference": looks(True),
        "no inference": looks(False),
        "anomaly": surroundings(detect_anomaly=True),
        "deterministic": surroundings(deterministic=True),
        "warn": surroundings(deterministic="warn"),
        "benchmark": surroundings(benchmark=True),
        "barebones": fit(Quiet(), barebones=True, validation=None, max_epochs=1, **BARE),
        "dev": fit(fast_dev_run=True),
        "dev 3": fit(fast_dev_run=3),
        "one": fit(devices="2", max_epochs=1),
    }


BARE: dict[str, Any] = {
    "logger": None,
    "enable_checkpointing": None,
    "enable_progress_bar": None,
    "enable_model_summary": None,
}


class Quiet(Lit):
    """Does not log: barebones runs say that it is for nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += batch[0].tolist()
        return (self.layer(batch[1]) - batch[2]).square().mean()


MODES = Scene(
    SECTION,
    modes,
    [
        *[
            works(
                "inference_mode",
                str(mode),
                lambda a, b, k=key: a[k] == b[k] == {(False, False)},
                "over gloo Lightning takes `no_grad` for both" if mode else "",
            )
            for mode, key in ((True, "inference"), (False, "no inference"))
        ],
        works("detect_anomaly", "True", lambda a, b: {look[0] for look in a["anomaly"].looked} == {True}),
        *[
            works(
                "deterministic",
                value,
                lambda a, b, k=key: {look[1] for look in a[k].looked} == {True} and alike(a[k], b[k]),
                "operations are; a run is not, since who is how fast differs (`record=` and [replay](replay.md))",
            )
            for value, key in (("True", "deterministic"), ('"warn"', "warn"))
        ],
        works("benchmark", "True", lambda a, b: {look[2] for look in a["benchmark"].looked} == {True}),
        works("barebones", "True", lambda a, b: alike(a["barebones"], b["barebones"]) and a["barebones"].metrics == {}),
        *[
            works(
                "fast_dev_run",
                value,
                lambda a, b, k=key, n=n: a[k].batches == b[k].batches == n and a[k].weights == b[k].weights,
                "so many batches on each rank, without appointments",
            )
            for value, key, n in (("True", "dev", 1), ("3", "dev 3", 3))
        ],
        works("devices", '"2"', lambda a, b: alike(a["one"], b["one"])),
        works("accelerator", '"cpu"', lambda a, b: alike(a["one"], b["one"])),
    ],
    warnings=[".*barebones.*", "You defined a `validation_step`", "You have turned on `Trainer\\(detect_anomaly"],
)


SCENES = [MODES]
