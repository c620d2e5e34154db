"""Late gradients are those of the network that trains: for a drain, modules and optimizers are as they were then.

A validation puts modules in their other mode, and a schedule-free optimizer shows its average there (`eval()`), from
which it does not step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_async.strategies import compat
from lightning_async.strategies.wide_steps import Step

MODES = ("train", "eval")


class Modes:
    """Which modes are those of the last batch."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._then: list[bool] = []
        self._shows: dict[int, Optimizer] = {}

    def begin(self, module: nn.Module) -> None:
        """A run begins, in which no batch was trained on."""
        self._modules, self._then = list(module.modules()), []

    def watch(self, optimizer: Optimizer, shown: object, leash: compat.Leash) -> None:
        """See whether an optimizer shows its average. `shown`: as Lightning shows the optimizer."""
        if all(callable(getattr(optimizer, name, None)) for name in MODES):
            for name in MODES:
                change = getattr(optimizer, name)
                for owner in (optimizer, shown):
                    leash.wrap(owner, name, partial(self._changed, optimizer, name, change))

    def trained(self) -> None:
        """A batch begins."""
        self._then = [part.training for part in self._modules]

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """In here all are as in the last batch; modules of which nothing is known stay as they are."""
        now = [part.training for part in self._modules]
        try:
            self._put(self._then)
            with ExitStack() as shown:
                for optimizer in list(self._shows.values()):
                    shown.callback(_change, optimizer, "eval")
                    _change(optimizer, "train")
                yield
        finally:
            self._put(now)

    def _put(self, modes: list[bool]) -> None:
        for part, mode in zip(self._modules, modes, strict=False):
            part.training = mode

    def _changed(self, optimizer: Optimizer, name: str, change: Step, *arguments: Any, **options: Any) -> Any:
        result = change(*arguments, **options)
        if name == "eval" or False in (*arguments, *options.values()):  # `train(False)`
            self._shows[id(optimizer)] = optimizer
        else:
            self._shows.pop(id(optimizer), None)
        return result


@torch.no_grad()
def _change(optimizer: Optimizer, name: str) -> None:
    """As in Lightning's hooks of a validation."""
    getattr(optimizer, name)()
