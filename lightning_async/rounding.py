"""A half-precision parameter holds the rounding of its part of a wider vector, so that no shift is too small to count.

    part (float32)      part += shift, however small        the sum of shifts is exact to float32
    parameter (bf16)    = round(part)                       what the module computes with
    an optimizer step   the parameter is its part, its gradient a float32 copy: so is the optimizer's state  [widened]
    another's writing   part += parameter - round(part)     carried over as a difference, before the part is read

Near 1 neighbouring bfloat16 numbers are 1/128 apart: a shift by less than half of that changes nothing in the
parameter, and the next one would not either. Here they add up until the parameter moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Rounded:
    """Parameters that are narrower than the flat vector, each with its part of it. There may be none."""

    @torch.no_grad()
    def __init__(self, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self._pairs = list(pairs)
        self._wide: dict[int, _Wide] = {}
        for parameter, part in self._pairs:
            part.copy_(parameter)

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def carry_over(self) -> None:
        """Add to each part what others did to its parameter since it was shown last."""
        if self._pairs:
            self._carry_over()

    def show(self) -> None:
        """Make each parameter the rounding of its part."""
        if self._pairs:
            self._show()

    @contextmanager
    def widened(self, parameters: Iterable[Tensor], *, gradients: bool = True) -> Iterator[None]:
        """Inside of this block those of them that are narrow are their parts, to the optimizer that steps them there.

        Their gradients are copies as wide as the parts; without `gradients` there are none.
        """
        if not self._pairs:
            yield
            return
        self.carry_over()
        wanted = {id(p) for p in parameters} - self._wide.keys()
        mine: list[int] = []
        try:
            for p, part in self._pairs:
                if id(p) in wanted:
                    self._wide[id(p)] = _Wide(p, part, gradients)
                    mine.append(id(p))
            yield
        finally:
            for key in mine:
                self._wide.pop(key).narrow()

    @torch.no_grad()
    def _carry_over(self) -> None:
        for parameter, part in self._narrow():
            moved = parameter.detach().to(part.dtype, copy=True).sub_(part.to(parameter.dtype))
            part.add_(moved)
        self._show()  # a step towards 0 can leave a remainder that is more than half a place there

    @torch.no_grad()
    def _show(self) -> None:
        for parameter, part in self._narrow():
            parameter.data.copy_(part)  # by `data`: as with views, autograd does not count it as a change

    def _narrow(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Those that are no parts themselves just now."""
        return ((p, part) for p, part in self._pairs if id(p) not in self._wide)


class _Wide:
    """A parameter that is its part for a while."""

    @torch.no_grad()
    def __init__(self, parameter: nn.Parameter, part: Tensor, gradients: bool) -> None:
        self._parameter, self._part = parameter, part
        self._narrow, self._gradient = parameter.data, parameter.grad
        self._copy: Tensor | None = None
        if gradients and self._gradient is not None:
            self._copy = self._gradient.to(part.dtype)
            self._version = self._copy._version
        parameter.grad = None  # it has to be of one dtype with its parameter
        parameter.data = part
        parameter.grad = self._copy

    @torch.no_grad()
    def narrow(self) -> None:
        """Be what it was before, rounded anew; what was done to its gradient stays done."""
        parameter, found = self._parameter, self._parameter.grad
        if parameter.data_ptr() != self._part.data_ptr():  # an optimizer that writes `p.data = ...`
            self._part.copy_(parameter)
        parameter.grad = None
        parameter.data = self._narrow.copy_(self._part)
        if found is not self._copy or (found is not None and found._version != self._version):
            parameter.grad = None if found is None else found.to(self._narrow.dtype)
        else:
            parameter.grad = self._gradient
