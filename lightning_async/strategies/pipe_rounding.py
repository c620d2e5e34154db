"""A stage's half-precision weights hold the rounding of float32 parts, in which its optimizer steps them.

    first step   the part of a weight is what the weight shows, or what a checkpoint has of it
    each step    the weight is its part, and what the optimizer remembers is float32     (`rounding`, `wide_steps`)
    save         rank 0 collects the parts beside the weights, of which each stage takes its own again

So no step is too small to count. Passes, late ones too, compute with the rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.rounding import Rounded
from lightning_async.strategies.account import kept
from lightning_async.strategies.wide_steps import instead, parameters_of, widened

WIDE = torch.float32
NARROW = (torch.float16, torch.bfloat16)


class PipeRounding:
    """The parts of one stage. None outside of a fit, and none where no weight is narrower than float32.

    Attributes:
        narrow: Whether there are weights that are.
    """

    narrow = False

    def __init__(self) -> None:
        self.end()

    @torch.no_grad()
    def begin(self, named: Iterable[tuple[str, nn.Parameter]], exact: Mapping[str, Tensor]) -> None:
        """A fit begins with these; `exact` is what a checkpoint has of any. (Lightning loads weights before it converts
        the module to its precision.)"""
        self._named = dict(named)
        self._rounded = Rounded(())
        self._parts: dict[str, Tensor] = {}
        self._saved = {name: exact[name] for name, p in self._named.items() if name in exact and is_narrow(p)}
        self.narrow = any(map(is_narrow, self._named.values()))
        for name, p in self._named.items():
            if name in exact and not is_narrow(p):
                p.copy_(exact[name])

    def end(self) -> None:
        """Hold nothing any more."""
        self.begin((), {})

    def exact(self) -> dict[str, Tensor]:
        """What the weights of a file do not show, or Lightning does not load from them, by name."""
        self._rounded.carry_over()
        double = {name: p.detach() for name, p in self._named.items() if p.dtype == torch.float64}
        return {**double, **self._saved, **self._parts}

    def stepping(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """In here the optimizer steps parts."""
        if not self.narrow:
            return nullcontext()
        return instead(optimizer, lambda step: widened(step, lambda: self.around_step(optimizer)))

    def around_step(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """In here what has a gradient is its part."""
        return self._widened(optimizer, (p for p in parameters_of(optimizer) if p.grad is not None))

    def around_mode(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """In here that is of which the optimizer remembers something; nobody has a gradient."""
        known = (p for p in parameters_of(optimizer) if optimizer.state.get(p))
        return self._widened(optimizer, known, gradients=False)

    def remember(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """The optimizer has loaded this state, and rounded it to the precision of weights: it is as it was saved."""
        for number, parameter in enumerate(parameters_of(optimizer) if self.narrow else ()):
            loaded = optimizer.state.get(parameter, {})
            for key, value in state["state"].get(number, {}).items():
                if is_narrow(parameter) and isinstance(value, Tensor) and value.dtype == WIDE and key in loaded:
                    loaded[key] = value.to(loaded[key].device, copy=True)

    def _widened(
        self, optimizer: Optimizer, parameters: Iterable[Tensor], *, gradients: bool = True
    ) -> AbstractContextManager[None]:
        found = {id(p) for p in parameters} if self.narrow else set()
        mine = {name: p for name, p in self._named.items() if id(p) in found}
        with torch.inference_mode(False):  # a hook of a validation may be the first that asks
            for name in mine.keys() - self._parts.keys():
                if is_narrow(mine[name]):
                    self._take(optimizer, name)
        return self._rounded.widened(mine.values(), gradients=gradients)

    def _take(self, optimizer: Optimizer, name: str) -> None:
        parameter = self._named[name]
        begins = self._saved.pop(name, parameter.detach())
        self._parts[name] = begins.to(parameter.device, WIDE, copy=True)
        self._rounded.take(parameter, self._parts[name])
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():  # made before the first step, or by an older version
            if isinstance(value, Tensor) and value.dtype == parameter.dtype:
                state[key] = value.to(WIDE)


def is_narrow(parameter: Tensor) -> bool:
    """Whether a weight is stepped in a wider precision than its own."""
    return parameter.dtype in NARROW


def wider_steps(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Bytes of the parts of such weights among these, and by which the optimizer remembers more of them."""
    if not (narrow := [p for p in parameters if is_narrow(p)]):
        return 0
    remembered = kept(optimizer)
    return sum(p.numel() * (WIDE.itemsize + remembered * (WIDE.itemsize - p.itemsize)) for p in narrow)
