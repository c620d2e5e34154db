"""A half-precision parameter holds the rounding of its part of a wider vector, so that no shift is too small to count.

    part (float32)      part += shift, however small        the sum of shifts is exact to float32
    parameter (bf16)    = round(part)                       what the module computes with, always
    an optimizer step   part += parameter - round(part)     carried over as a difference, before the part is read

Near 1 neighbouring bfloat16 numbers are 1/128 apart: a shift by less than half of that changes nothing in the
parameter, and the next one would not either. Here they add up until the parameter moves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Rounded:
    """Parameters that are narrower than the flat vector, each with its part of it. There may be none."""

    @torch.no_grad()
    def __init__(self, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self._pairs = list(pairs)
        for parameter, part in self._pairs:
            part.copy_(parameter)

    def carry_over(self) -> None:
        """Add to each part what others did to its parameter since it was shown last."""
        if self._pairs:
            self._carry_over()

    def show(self) -> None:
        """Make each parameter the rounding of its part."""
        if self._pairs:
            self._show()

    @torch.no_grad()
    def _carry_over(self) -> None:
        for parameter, part in self._pairs:
            moved = parameter.detach().to(part.dtype, copy=True).sub_(part.to(parameter.dtype))
            part.add_(moved)
        self._show()  # a step towards 0 can leave a remainder that is more than half a place there

    @torch.no_grad()
    def _show(self) -> None:
        for parameter, part in self._pairs:
            parameter.data.copy_(part)  # by `data`: as with views, autograd does not count it as a change
