"""Q: what a member's corrections count by the accuracy of its model, if they are to (BPT-CNN's accuracy weight).

    "off"        1
    "train"      e^-(mean training loss since the last push)
    a name       the newest value that this rank logged under it

A metric that is not there yet counts as 1; one that is never logged is an error, told at the first meeting's end. A run
that goes on has the newest value of before until it logs another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

LEAST = 1e-3
"""A member whose model is useless still counts a little: it would never be better than its start else."""


class Quality:
    """One member's Q.

    Args:
        accuracy_weight: What it goes by.
        metrics: All that this rank has logged, by name.
    """

    def __init__(self, accuracy_weight: str, metrics: Callable[[], Mapping[str, Any]]) -> None:
        if not isinstance(accuracy_weight, str) or not accuracy_weight:
            raise ValueError(
                f"`accuracy_weight` must be 'off', 'train' or the name of a logged metric, got {accuracy_weight!r}"
            )
        self.name, self._metrics = accuracy_weight, metrics
        self._before: float | None = None
        self._losses: Tensor | None = None
        self._count = 0
        self._mean = 0.0

    @property
    def is_metric(self) -> bool:
        """Whether it goes by something that the user logs."""
        return self.name not in ("off", "train")

    def saw(self, outputs: Any) -> None:
        """What a training step returned. Nothing is read off the device here."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.name == "train" and isinstance(loss, Tensor):
            loss = loss.detach()
            self._losses = loss.clone() if self._losses is None else self._losses + loss
            self._count += 1

    def now(self) -> float:
        """Q of a push."""
        if self.name == "train":
            return self._by_loss()
        value = self._newest()
        return 1.0 if value is None else self._by_metric(value)

    def state_dict(self) -> dict[str, Any]:
        """The newest value."""
        return {"name": self.name, "newest": self._newest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go by what was the newest value of the same metric."""
        self._before = state["newest"] if state["name"] == self.name else None

    def check_logged(self) -> None:
        """Raise where a metric was named that nobody logs. Called when all that is logged was logged once."""
        if self.is_metric and self._newest() is None:
            known = ", ".join(sorted(self._metrics())) or "none"
            raise MisconfigurationException(
                f"accuracy_weight={self.name!r}: no metric of this name was logged until the first meeting was over "
                f"(logged: {known}); log it in `training_step` or `validation_step`, or use 'train' or 'off'"
            )

    def _newest(self) -> float | None:
        value = self._metrics().get(self.name)
        return self._before if value is None else float(value)

    def _by_loss(self) -> float:
        if self._losses is not None and self._count:
            self._mean = float(torch.nan_to_num(self._losses, nan=math.inf)) / self._count
            self._losses, self._count = None, 0
        return max(LEAST, math.exp(min(0.0, -self._mean)))

    def _by_metric(self, value: float) -> float:
        if not value >= 0 or math.isinf(value):
            raise MisconfigurationException(
                f"accuracy_weight={self.name!r} is {value} now, and a correction cannot count by that: name a metric "
                "that is at least 0 and grows as the model gets better, as an accuracy"
            )
        return max(LEAST, value)
