"""The same numbers by Triton kernels on a GPU: one read of what is packed, one write of what is left.

Triton comes with torch's builds for GPUs; where it is not, torch does it. Each program handles `WIDTH` bytes of signs.
Kernels use no function of Triton's library: these run in its interpreter only if that was asked for before the import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_async.algorithms.signs import BITS, Signs, TorchSigns

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs
    triton = tl = None

WIDTH = 128
"""Bytes of signs that one program writes."""


def triton_signs(like: Tensor) -> Signs[Tensor] | None:
    """The kernels, where they can be had for tensors like this one."""
    return TritonSigns() if triton is not None and like.dtype == torch.float32 else None


class TritonSigns(TorchSigns):
    """Packing and shifting by kernels; the mean is torch's own reduction."""

    def __init__(self) -> None:
        self._pack, self._shift = _kernels()

    def pack(self, p: Tensor, bits: Tensor) -> None:
        """Write the signs of `p`."""
        if bits.numel():
            self._pack[_grid(bits)](p, bits, p.numel(), bits.numel(), width=WIDTH, each=BITS)

    def shift(self, source: Tensor, bits: Tensor, scale: float, out: Tensor) -> None:
        """out = source + scale * sign."""
        if bits.numel():
            self._shift[_grid(bits)](source, bits, scale, out, out.numel(), width=WIDTH, each=BITS)


def _grid(bits: Tensor) -> tuple[int]:
    return (-(-bits.numel() // WIDTH),)


_made: list[tuple[Any, Any]] = []


def _kernels() -> tuple[Any, Any]:
    """Made once, when they are first needed."""
    if not _made:
        _made.append((triton.jit(_pack_kernel), triton.jit(_shift_kernel)))
    return _made[0]


def _pack_kernel(p, bits, numel, nbytes, width: tl.constexpr, each: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * width + tl.arange(0, width)
    byte = at * 0
    for k in tl.static_range(each):
        values = tl.load(p + at * each + k, mask=at * each + k < numel, other=-1.0)
        byte |= (values >= 0).to(tl.int32) << k
    tl.store(bits + at, byte.to(tl.uint8), mask=at < nbytes)


def _shift_kernel(source, bits, scale, out, numel, width: tl.constexpr, each: tl.constexpr):  # type: ignore[no-untyped-def]
    numbers = tl.program_id(0) * width * each + tl.arange(0, width * each)
    inside = numbers < numel
    byte = tl.load(bits + numbers // each, mask=inside, other=0).to(tl.int32)
    sign = ((byte >> (numbers % each)) & 1).to(tl.float32) * 2.0 - 1.0
    tl.store(out + numbers, tl.load(source + numbers, mask=inside, other=0.0) + sign * scale, mask=inside)
