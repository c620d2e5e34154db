"""What is done about a push that is late: nothing, a shorter step, or a guess at what its gradient would be today.

    none   step by g                                        at the learning rate
    lr     step by g                                        at the learning rate / (1 + excess)^strength
    dc     step by g + strength * g * g * (W - w)           at the learning rate

The excess is in rounds beyond a healthy run's (`weighting`). "lr" makes the step itself shorter: one that an optimizer
normalises, as Adam does, would be as long after a smaller gradient. "dc" (DC-ASGD; Zheng et al. 2017) follows the
gradient from w, the weights that it was computed on, to W, those that it meets, by the first term of Taylor's series
with g * g in the place of the Hessian; g is the mean of the batches in a push. Where nothing is late nothing changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_async.algorithms.weighting import excess_rounds

How = Literal["none", "lr", "dc"]
STRENGTHS = {"lr": 0.5, "dc": 0.04}


@dataclass(frozen=True)
class Compensation:
    """What is done about late pushes, the same on all members.

    Attributes:
        how: "none", "lr" or "dc".
        strength: Of "lr" the exponent, of "dc" the factor.
    """

    how: How = "none"
    strength: float = 0.0

    def pace(self, delay: int, n: int) -> float:
        """By what the learning rate is multiplied for a push so many versions late."""
        return float((1.0 + excess_rounds(delay, n)) ** -self.strength) if self.how == "lr" else 1.0

    def today(self, gradients: Tensor, batches: int, now: Tensor, then: Tensor | None) -> Tensor:
        """A sum of so many batches' gradients, computed on the weights `then`, as it would be on those of `now`."""
        if self.how != "dc" or then is None or not batches:
            return gradients
        found = torch.addcmul(gradients, gradients * gradients, now - then, value=self.strength / batches)
        return found if bool(torch.isfinite(found).all()) else gradients  # a square may be beyond all numbers


def compensation(how: How, strength: float | None = None) -> Compensation:
    """The compensation of this name; None: of the usual strength."""
    if how not in get_args(How):
        raise ValueError(f"`compensation` must be one of {', '.join(map(repr, get_args(How)))}, got {how!r}")
    if how == "none" and strength is not None:
        raise ValueError("`compensation_strength` has no meaning with compensation='none': leave it out")
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if strength is not None and not (number and 0 <= strength < math.inf):
        raise ValueError(f"`compensation_strength` must be a number of at least 0, got {strength!r}")
    return Compensation(how, STRENGTHS.get(how, 0.0) if strength is None else float(strength))
