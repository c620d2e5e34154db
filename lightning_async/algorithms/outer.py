"""What the server does with an arrival, gamma * correction: the one rule of the server that a method may replace.

    sum                 W += lr * g                                                          the paper's, with lr 1
    nesterov            m = mu * m + g,  W += lr * (g + mu * m)                              at every arrival
    delayed_nesterov    W += lr * g;  after n arrivals  m = mu * m + (their sum),  W += lr * mu * m

Momentum at every arrival is fed by one member at a time, each from another base, and grows unstable; once every n
arrivals it sees what synchronous Nesterov would see (Liu et al. 2024, asynchronous local SGD). In rounds of n arrivals
`delayed_nesterov` moves the server exactly as far as `nesterov` moves it with the mean of the n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Rule = Literal["sum", "nesterov", "delayed_nesterov"]


class Outer(Protocol):
    """A merge rule with its state, for one shard.

    Attributes:
        tensors: What it remembers, of the size and dtype of the weights, changed in place.
        count: What else it remembers.
    """

    tensors: list[Tensor]
    count: int

    def arrive(self, weights: Tensor, correction: Tensor, gamma: float, n: int) -> None:
        """Move `weights` by a correction that counts `gamma`, one of `n` members' in a round."""


class Sum:
    """Adds."""

    def __init__(self, weights: Tensor, *, lr: float) -> None:
        self.tensors: list[Tensor] = []
        self.count = 0
        self._lr = lr

    def arrive(self, weights: Tensor, correction: Tensor, gamma: float, n: int) -> None:
        """See `Outer`."""
        weights.add_(correction, alpha=gamma * self._lr)


class Nesterov:
    """Momentum at every arrival."""

    def __init__(self, weights: Tensor, *, lr: float, momentum: float) -> None:
        self.tensors = [torch.zeros_like(weights)]
        self.count = 0
        self._lr, self._momentum = lr, momentum

    def arrive(self, weights: Tensor, correction: Tensor, gamma: float, n: int) -> None:
        """See `Outer`."""
        (buffer,) = self.tensors
        buffer.mul_(self._momentum).add_(correction, alpha=gamma)
        weights.add_(correction, alpha=gamma * self._lr).add_(buffer, alpha=self._lr * self._momentum)


class DelayedNesterov:
    """Momentum once every n arrivals."""

    def __init__(self, weights: Tensor, *, lr: float, momentum: float) -> None:
        self.tensors = [torch.zeros_like(weights), torch.zeros_like(weights)]
        self.count = 0
        self._lr, self._momentum = lr, momentum

    def arrive(self, weights: Tensor, correction: Tensor, gamma: float, n: int) -> None:
        """See `Outer`."""
        buffer, coming = self.tensors
        weights.add_(correction, alpha=gamma * self._lr)
        coming.add_(correction, alpha=gamma)
        self.count += 1
        if self.count >= n:
            buffer.mul_(self._momentum).add_(coming)
            weights.add_(buffer, alpha=self._lr * self._momentum)
            coming.zero_()
            self.count = 0


def outer_rule(outer: Rule | None, *, lr: float, momentum: float) -> Callable[[Tensor], Outer]:
    """A maker of the rule, given the weights of a shard. None: by the momentum."""
    if outer is not None and outer not in get_args(Rule):
        raise ValueError(f"`outer` must be one of {', '.join(map(repr, get_args(Rule)))}, got {outer!r}")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise ValueError(f"`outer_lr` must be a number above 0, got {lr!r}")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise ValueError(f"`outer_momentum` must be at least 0 and below 1, got {momentum!r}")
    if outer == "sum" and momentum:
        raise ValueError(f"`outer_momentum` has no meaning with outer='sum', got {momentum!r}: use 'delayed_nesterov'")
    if outer in ("nesterov", "delayed_nesterov") and not momentum:
        raise ValueError(f"outer={outer!r} needs an `outer_momentum` above 0, got {momentum!r}")
    if not momentum:
        return lambda weights: Sum(weights, lr=float(lr))
    kind = Nesterov if outer == "nesterov" else DelayedNesterov
    return lambda weights: kind(weights, lr=float(lr), momentum=float(momentum))
