"""The gradients of one step, taken away from the optimizer before it could step with them.

Only those of the optimizer's own parameters: nobody unscales, clips or clears the others'.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.replica import Replica


class TakenGradients:
    """One vector like the flat one.

    Args:
        replica: The weights.
        optimizer: The one that steps with them elsewhere.

    Attributes:
        refused: Steps whose gradients were not finite: nothing of them is used.
    """

    def __init__(self, replica: Replica, optimizer: Optimizer) -> None:
        self.refused = 0
        self._sum, self._taken = torch.zeros_like(replica.flat), False
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parts = zip(replica.places, replica.parts(self._sum), strict=True)
        self._parts = [(parameter, part) for (parameter, _), part in parts if id(parameter) in own]

    def take(self) -> None:
        """Take what is there, on top of what was taken in this step before."""
        for parameter, part in self._parts:
            if parameter.grad is not None:
                part.add_(parameter.grad.flatten())
                parameter.grad, self._taken = None, True

    def used(self) -> Tensor | None:
        """What was taken; None: nothing, or what is not finite. It is valid until `drop`."""
        if self._taken and not bool(torch.isfinite(self._sum).all()):
            self.refused += 1
            return None
        return self._sum if self._taken else None

    def drop(self) -> None:
        """The step is over."""
        if self._taken:
            self._sum.zero_()
        self._taken = False


class UsedGradients:
    """In its place where the member's own optimizer steps: every step counts, and nothing is taken."""

    def __init__(self) -> None:
        self.refused = 0

    def take(self) -> None:
        """Leave them."""

    def used(self) -> Tensor:
        """Nothing that anybody looks at."""
        return torch.empty(0)

    def drop(self) -> None:
        """The step is over."""
