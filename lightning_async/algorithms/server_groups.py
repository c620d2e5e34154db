"""The user's optimizer as a server needs it: to which of its groups each element belongs, and the groups' numbers.

    flat vector   | conv.weight | conv.bias | norm.weight | fc.weight | frozen by no group |
    pieces        |      0      |            1            |     0     |                    |

A piece is as long as its group goes on. The numbers (learning rate, momentum, weight decay ...) are those of run
progress: each member tells its own service when they change. An optimizer serves if each element is treated alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.algorithms.server_rates import check_known

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Builds the user's optimizer for some parameters, with the learning rate of a synchronous run."""

NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "betas", "eps")
HOW = ("foreach", "fused", "capturable", "differentiable")
"""How a step is computed: by torch's own choice for a vector on a CPU."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of one group.

    Attributes:
        group: Its number.
        begin: The first of them.
        end: The one behind the last.
    """

    group: int
    begin: int
    end: int

    @property
    def part(self) -> slice:
        """They, of a vector."""
        return slice(self.begin, self.end)


class Groups:
    """The groups of one optimizer.

    Args:
        optimizer: The user's.
        places: The parameters of a flat vector, each with where it begins there.

    Attributes:
        now: Each group's options, as the server goes by them.
        remembered: The names of what the optimizer remembers of each element.
    """

    def __init__(self, optimizer: Optimizer, places: Sequence[tuple[nn.Parameter, int]]) -> None:
        check_elementwise(optimizer)
        self._optimizer, self._pieces = optimizer, _pieces(optimizer, places)
        self.now = [{name: value for name, value in group.items() if name != "params"} for group in _groups(optimizer)]
        self.hear(numbers(optimizer))
        self.remembered = remembered(optimizer)

    def within(self, begin: int, end: int) -> list[Piece]:
        """The pieces of a part of the vector, counted from its beginning."""
        cut = ((p.group, max(p.begin, begin) - begin, min(p.end, end) - begin) for p in self._pieces)
        return [Piece(group, first, last) for group, first, last in cut if first < last]

    def build(self, parameters: Sequence[list[nn.Parameter]]) -> Optimizer:
        """The same optimizer for other parameters of the same groups."""
        return _twin(self._optimizer, parameters)

    def hear(self, said: Tensor) -> None:
        """The numbers are these now."""
        values = iter(said.tolist())
        for group in self.now:
            for name in NUMBERS:
                if name in group:
                    pair = isinstance(group[name], (tuple, list))
                    group[name] = (next(values), next(values)) if pair else next(values)


def numbers(optimizer: Optimizer) -> Tensor:
    """All groups' numbers, as they travel."""
    found: list[float] = []
    for group in optimizer.param_groups:
        for name in NUMBERS:
            if name in group:
                value = group[name]
                found += [float(one) for one in (value if isinstance(value, (tuple, list)) else (value,))]
    return torch.tensor(found, dtype=torch.float64)


def check_elementwise(optimizer: Optimizer) -> None:
    """Refuse an optimizer that moves two halves in another way than the whole."""
    name = type(optimizer).__name__
    try:
        whole = _stepped(optimizer, slice(0, 64))[1]
        halves = torch.cat([_stepped(optimizer, part)[1] for part in (slice(0, 32), slice(32, 64))])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the server steps flat parts of the weights, and {name} cannot ({error}): use SGD, Adam or AdamW"
        ) from error
    if not torch.allclose(whole, halves, rtol=1e-9, atol=0.0):
        raise ValueError(
            f"the server steps each part of the weights without the others, and {name} moves two halves in another "
            "way than the whole: use an optimizer that treats each element alone (SGD, Adam or AdamW)"
        )
    check_known(optimizer)


def _pieces(optimizer: Optimizer, places: Sequence[tuple[nn.Parameter, int]]) -> list[Piece]:
    """Between two parameters of one group lie zeros, which stay zero: they may belong to it."""
    group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    pieces: list[Piece] = []
    joined = False
    for parameter, begin in places:
        group, end = group_of.get(id(parameter)), begin + parameter.numel()
        if group is not None:
            joins = joined and pieces[-1].group == group
            first = pieces.pop().begin if joins else begin
            pieces.append(Piece(group, first, end))
        joined = group is not None
    return pieces


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{**group, **{name: None for name in HOW if name in group}} for group in optimizer.param_groups]


def _twin(optimizer: Optimizer, parameters: Sequence[list[nn.Parameter]]) -> Optimizer:
    known = inspect.signature(type(optimizer).__init__).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known and name not in HOW}
    groups = [{**group, "params": ps} for group, ps in zip(_groups(optimizer), parameters, strict=True)]
    for group in groups:
        group |= {name: False for name in ("capturable", "differentiable") if name in group}
    return type(optimizer)(groups, **options)


def remembered(optimizer: Optimizer) -> list[str]:
    """The names of what an optimizer remembers of each element."""
    stepped, vector = _stepped(optimizer, slice(0, 64))
    (state,) = list(stepped.state.values()) or [{}]
    return [n for n, one in state.items() if isinstance(one, Tensor) and one.shape == vector.shape]


def _stepped(optimizer: Optimizer, part: slice) -> tuple[Optimizer, Tensor]:
    """A part of a vector after three steps on uneven gradients."""
    randoms = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    randoms = randoms * torch.linspace(0.1, 9.0, 64, dtype=torch.float64)
    parameter = nn.Parameter(randoms[0, part].clone())
    twin = _twin(optimizer, [[parameter], *([] for _ in optimizer.param_groups[1:])])
    for gradient in randoms[1:]:
        parameter.grad = gradient[part].clone()
        twin.step()
    return twin, parameter.detach()
