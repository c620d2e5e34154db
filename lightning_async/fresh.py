"""What is fresh where something late comes: a law of shrinking may ask how well the two agree.

    fresh  ------>   late  ----->     cosine near 1: it goes where things go by now
    fresh  ------>   late  <-----     cosine near -1: it takes back what was done since it was launched

    a server's shard     fresh: what was merged lately              late: a push
    gossip               fresh: this member's own steps lately      late: the way to another's weights
    a pipeline's stage   fresh: the gradient at the weights that a late one was applied to; it comes later (`curvature`)

It is kept from the first question on: who never asks pays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Fresh = Callable[[], float | None]
"""Asked for the cosine between what is late and what is fresh here; None: not known yet."""


def nothing_fresh() -> None:
    """Here is nothing to compare with."""
    return


class Lately:
    """Where things have gone lately: a running mean of directions.

    Args:
        memory: What part of the mean stays when one more comes.
    """

    def __init__(self, memory: float = 0.9) -> None:
        self.asked = False
        self._memory = memory
        self._mean: Tensor | None = None

    def cosine(self, late: Tensor, factor: float = 1.0) -> float | None:
        """How well `factor * late` agrees with it."""
        self.asked = True
        if self._mean is None:
            return None
        found = math.copysign(1.0, factor) * cosine(late, self._mean.to(late.device))
        if not math.isfinite(found):  # whichever of the two it was: a mean that is no number would stay one
            self._mean = None
            return None
        return found

    @torch.no_grad()
    def add(self, direction: Tensor, factor: float = 1.0) -> None:
        """It went there, by `factor * direction`."""
        if not self.asked:
            return
        if self._mean is None:
            self._mean = torch.zeros_like(direction)
        self._mean = self._mean.to(direction.device).mul_(self._memory).add_(direction, alpha=factor)

    @property
    def mean(self) -> Tensor | None:
        """The running mean, for a checkpoint: empty where nothing has come yet; None: nobody asks."""
        if not self.asked:
            return None
        return torch.empty(0) if self._mean is None else self._mean.detach().cpu().clone()

    def go_on(self, mean: Tensor | None) -> None:
        """Go on from what was saved."""
        self.asked = mean is not None
        self._mean = mean if mean is not None and mean.numel() else None


class OwnSteps(Lately):
    """Where a member's own steps have taken its weights lately."""

    def __init__(self, memory: float = 0.9) -> None:
        super().__init__(memory)
        self._step = 0
        self._before: Tensor | None = None

    def set_off(self, weights: Tensor, step: int) -> None:
        """The optimizer is about to step; several may in one batch, and the first of them says so."""
        if self.asked and step != self._step:
            self._step, self._before = step, weights.clone()

    def arrive(self, weights: Tensor, step: int) -> None:
        """It has stepped."""
        if self._before is not None and step == self._step:
            self.add(weights - self._before)
            self._before = None


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two vectors; 0 where one of them is zero."""
    one, other = one.flatten().float(), other.flatten().float()
    norms = float(one.norm()) * float(other.norm())
    return float(torch.dot(one, other)) / norms if norms != 0 else 0.0
