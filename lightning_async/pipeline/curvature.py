"""How the loss bends along the way of the weights, and how late gradients fare: seen from gradients, which come anyway.

    forward of batch a, at A  ----- updates by older batches ----->  forward of batch b, at B
    gradient of a comes later                                        gradient of b comes later

    curvature = (gradient of b - gradient of a) . (B - A)  over  |B - A|^2        both as means over many batches

A gradient of one batch is mostly noise. But no update between A and B has seen batch a or b, since their gradients come
later: their noise has nothing to do with the way, and is gone in the mean. (Without a delay it would not be: the way
from a to b is a step along the noise of a.) Where a run swings because its steps are too large, its way is the steepest
one, and that curvature is the one that says how large a step may be.

The gradient of a is applied behind the forward pass of b, whose gradient is the fresh one then: the cosine between the
two says how well the late one agreed with it.

A part of the weights tells enough: at most `SEEN` of them, evenly spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_async.fresh import cosine

SEEN = 1 << 16
Tell = Callable[[float, float], object]
"""Is told, batch by batch, both sides of the fraction: how far gradients turned along the way, and how long it was."""


class Curvature:
    """What one stage sees of it.

    Args:
        parameters: Its weights.
        lag: Batches from a to b; so few that the gradient of a is not in B yet.
        tell: Is told of each pair of batches.
    """

    def __init__(self, parameters: Iterable[Tensor], lag: int, tell: Tell) -> None:
        self._parameters, self._lag, self._tell = list(parameters), max(1, lag), tell
        self._stride = max(1, -(-sum(p.numel() for p in self._parameters) // SEEN))
        self._weights: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._pair: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: int) -> None:
        """A batch goes forward with the weights of now."""
        self._weights[batch] = self._some(self._parameters)

    def backward(self, batch: int, before: Tensor, sums: Sequence[Tensor | None], factor: float) -> None:
        """Its gradient, shrunk by `factor`, has been added to the sums, which looked like `before`."""
        if batch not in self._weights:  # it went forward before anybody looked
            return
        gradient = self._gradients[batch] = (self.look(sums) - before) / factor
        other = batch - self._lag
        if other in self._gradients:
            way, late = self._weights[batch] - self._weights.pop(other), self._gradients.pop(other)
            self._tell(float(way.dot(gradient - late)), float(way.dot(way)))
            self._pair = late, gradient

    def alignment(self) -> float | None:
        """How well the newest late gradient, of which that is known, agreed with the fresh one."""
        found = math.nan if self._pair is None else cosine(*self._pair)
        return found if math.isfinite(found) else None

    def look(self, sums: Sequence[Tensor | None]) -> Tensor:
        """The sums of gradients as they are now."""
        pairs = zip(sums, self._parameters, strict=True)
        return self._some(torch.zeros_like(p) if found is None else found for found, p in pairs)

    def clear(self) -> None:
        """The pipe is empty: what comes next has a way of its own."""
        self._weights.clear()
        self._gradients.clear()
        self._pair = None

    @torch.no_grad()
    def _some(self, tensors: Iterable[Tensor]) -> Tensor:
        parts = [t.detach().reshape(-1)[:: self._stride].float() for t in tensors]
        return torch.cat(parts) if parts else torch.zeros(0)
