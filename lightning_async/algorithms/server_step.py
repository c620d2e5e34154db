"""A merge rule of the server: an arrival is a gradient, and the user's optimizer steps the shard with it.

    arrive (a, gamma)  -->  grad = gamma * a  -->  optimizer.step()  -->  W         one optimizer for each shard

A shard is stepped without the others, so each element must be treated alone: `check_elementwise` steps a vector whole
and in two halves, and refuses an optimizer that makes a difference (norms, matrices). It is the rule beside `outer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.algorithms.server_rates import check_known, spread

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Builds the user's optimizer for some parameters, with the learning rate of a synchronous run."""


class ServerStep:
    """The optimizer of one shard (see `outer.Outer`).

    Args:
        weights: The shard, which is stepped in place.
        make: Builds the optimizer.

    Attributes:
        tensors: What the optimizer remembers.
        count: How often it has stepped.
    """

    def __init__(self, weights: Tensor, make: MakeOptimizer) -> None:
        self.count = 0
        self._names = _remembered(make)
        self.tensors = [torch.zeros_like(weights) for _ in self._names]
        self._parameter = nn.Parameter(weights)
        self._optimizer = make([self._parameter])
        self._synchronous = dict(self._optimizer.param_groups[0])

    @torch.no_grad()
    def arrive(self, weights: Tensor, correction: Tensor, gamma: float, n: int) -> None:
        """Step by a gradient that counts `gamma`, one of `n` members' in a round."""
        self._optimizer.param_groups[0].update(spread(self._synchronous, n))
        self._remind()
        self._parameter.grad = correction * gamma
        self._optimizer.step()
        self._parameter.grad = None
        self.count += 1
        self._keep()

    def _remind(self) -> None:
        """The state is what `tensors` and `count` say, which a mirror may have changed; at first there is none."""
        if self.count:
            kept: dict[str, Any] = dict(zip(self._names, self.tensors, strict=True))
            self._optimizer.state[self._parameter] = {"step": torch.tensor(float(self.count)), **kept}
        else:
            self._optimizer.state.clear()

    def _keep(self) -> None:
        state = self._optimizer.state[self._parameter]
        for name, tensor in zip(self._names, self.tensors, strict=True):
            if state[name] is not tensor:
                tensor.copy_(state[name])


def server_step(make: MakeOptimizer) -> Callable[[Tensor], ServerStep]:
    """A maker of the rule, given the weights of a shard; refuses what cannot serve."""
    check_elementwise(make)
    return lambda weights: ServerStep(weights, make)


def check_elementwise(make: MakeOptimizer) -> None:
    """Refuse an optimizer that moves two halves in another way than the whole."""
    try:
        optimizer, whole = _stepped(make, slice(0, 64))
        halves = torch.cat([_stepped(make, part)[1] for part in (slice(0, 32), slice(32, 64))])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the server steps flat parts of the weights, and this optimizer cannot ({error}): use SGD, Adam or AdamW"
        ) from error
    name = type(optimizer).__name__
    if not torch.allclose(whole, halves, rtol=1e-9, atol=0.0):
        raise ValueError(
            f"the server steps each part of the weights without the others, and {name} moves two halves in another "
            "way than the whole: use an optimizer that treats each element alone (SGD, Adam or AdamW)"
        )
    if len(optimizer.param_groups) != 1:
        raise ValueError(f"the server steps one parameter group, got {len(optimizer.param_groups)}: use one")
    check_known(optimizer)


def _stepped(make: MakeOptimizer, part: slice) -> tuple[Optimizer, Tensor]:
    """A part of a vector after three steps on uneven gradients."""
    numbers = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = numbers * torch.linspace(0.1, 9.0, 64, dtype=torch.float64)
    parameter = nn.Parameter(numbers[0, part].clone())
    optimizer = make([parameter])
    for gradient in numbers[1:]:
        parameter.grad = gradient[part].clone()
        optimizer.step()
    return optimizer, parameter.detach()


def _remembered(make: MakeOptimizer) -> list[str]:
    """The names of what it remembers of each element."""
    optimizer, stepped = _stepped(make, slice(0, 64))
    (state,) = list(optimizer.state.values()) or [{}]
    return [name for name, one in state.items() if isinstance(one, Tensor) and one.shape == stepped.shape]
