"""A half-precision parameter holds the rounding of its part of a wider vector, so that no shift is too small to count.

    part (float32)      part += shift, however small        the sum of shifts is exact to float32
    parameter (bf16)    = round(part)                       what the module computes with
    an optimizer step   the parameter is its part, its gradient a float32 copy: so is the optimizer's state  [widened]
    another's writing   part += parameter - round(part)     carried over as a difference, before the part is read

Near 1 neighbouring bfloat16 numbers are 1/128 apart: a shift by less than half of that changes nothing in the
parameter, and the next one would not either. Here they add up until the parameter moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AT_ONCE = 1 << 16  # elements


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

    @torch.no_grad()
    def take(self, parameter: nn.Parameter, part: Tensor) -> None:
        """One more, with its part as it is: what the parameter shows beside its rounding was done by others."""
        self._pairs.append((parameter, part))

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
        mine: list[_Wide] = []
        try:
            found = [(p, part) for p, part in self._pairs if id(p) in wanted]
            copies = _widened([p.grad for p, _ in found], [part.dtype for _, part in found]) if gradients else {}
            for at, (p, part) in enumerate(found):
                self._wide[id(p)] = _Wide(p, part, copies.get(at))
                mine.append(self._wide[id(p)])
            yield
        finally:
            _round([one.back() for one in mine])
            for one in mine:
                one.narrow()
                del self._wide[id(one.parameter)]

    @torch.no_grad()
    def _carry_over(self) -> None:
        for pairs in _batches((parameter.data, part) for parameter, part in self._narrow()):
            shown, parts = map(list, zip(*pairs, strict=True))
            moved, before = [torch.empty_like(part) for part in parts], [torch.empty_like(one) for one in shown]
            torch._foreach_copy_(moved, shown)
            torch._foreach_copy_(before, parts)
            torch._foreach_sub_(moved, before)
            torch._foreach_add_(parts, moved)
            torch._foreach_copy_(shown, parts)  # a step towards 0 can leave a remainder of more than half a place there

    @torch.no_grad()
    def _show(self) -> None:
        _round([(parameter.data, part) for parameter, part in self._narrow()])  # `data`: autograd counts no change

    def _narrow(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Those that are no parts themselves just now."""
        return ((p, part) for p, part in self._pairs if id(p) not in self._wide)


class _Wide:
    """A parameter that is its part for a while. `copy`: its gradient as wide, or none."""

    def __init__(self, parameter: nn.Parameter, part: Tensor, copy: Tensor | None) -> None:
        self.parameter, self._part, self._copy = parameter, part, copy
        self._narrow, self._gradient = parameter.data, parameter.grad
        self._version = 0 if copy is None else copy._version
        parameter.grad = None  # it has to be of one dtype with its parameter
        parameter.data = part
        parameter.grad = copy

    @torch.no_grad()
    def back(self) -> tuple[Tensor, Tensor]:
        """What it will be again, which is to be rounded anew, and its part."""
        if self.parameter.data_ptr() != self._part.data_ptr():  # an optimizer that writes `p.data = ...`
            self._part.copy_(self.parameter)
        return self._narrow, self._part

    def narrow(self) -> None:
        """Be what it was before; what was done to its gradient stays done."""
        parameter, found = self.parameter, self.parameter.grad
        parameter.grad = None
        parameter.data = self._narrow
        if found is not self._copy or (found is not None and found._version != self._version):
            parameter.grad = None if found is None else found.to(self._narrow.dtype)
        else:
            parameter.grad = self._gradient


def _batches(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Some at a time: copies of all at once would be a model more in memory, and fall out of a processor's cache."""
    batch, numel = list[tuple[Tensor, Tensor]](), 0
    for pair in pairs:
        batch.append(pair)
        numel += pair[0].numel()
        if numel >= AT_ONCE:
            yield batch
            batch, numel = [], 0
    if batch:
        yield batch


@torch.no_grad()
def _round(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy parts into what is narrower than they, all at once."""
    if pairs:
        torch._foreach_copy_([one for one, _ in pairs], [part for _, part in pairs])


@torch.no_grad()
def _widened(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> dict[int, Tensor]:
    """Copies of those that are there, by their place, all at once; of sparse ones one by one."""
    there = {at: (g, dtype) for at, (g, dtype) in enumerate(zip(gradients, dtypes, strict=True)) if g is not None}
    dense = {at: (g, torch.empty_like(g, dtype=dtype)) for at, (g, dtype) in there.items() if g.layout is torch.strided}
    if dense:
        torch._foreach_copy_([copy for _, copy in dense.values()], [g for g, _ in dense.values()])
    return {at: dense[at][1] if at in dense else g.to(dtype) for at, (g, dtype) in there.items()}
