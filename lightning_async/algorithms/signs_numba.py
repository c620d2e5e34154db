"""The same signs in fewer passes over a block, by loops that Numba compiles for this processor.

    NumPy   signs of all, their product with p, p - scale * sign: each is written, and read again by the next
    here    the sum of |p|, then p - scale * sign(p): nothing is written but what stays

Numba comes with `pip install lightning-async[fast]`; where it is not, NumPy does it. Loops are compiled once on a
machine and kept on its disk, if Numba finds a place there, and are ready before training begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_async.algorithms.signs import BITS, Array, NumpySigns, Signs, checked, nbytes

try:
    import numba
except ImportError:
    numba = None

Loop = Callable[..., Any]


def numba_signs(like: Tensor, block: int) -> Signs[Array] | None:
    """The loops, where they can be had for tensors like this one."""
    return NumbaSigns(block, like.dtype) if numba is not None else None


class NumbaSigns(NumpySigns):
    """Adding up and subtracting by compiled loops; NumPy is as quick as they are at adding vectors and packing bits."""

    def __init__(self, block: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(block, dtype)
        self._total, self._leave, self._move = _loops()
        self._number = self._numbers.dtype.type
        some = self._numbers[:BITS]
        some[:] = 0
        self.press(some, self._bits_of(some), some, some.copy())  # compiled now, not in the first step
        self.shift(some, self._bits_of(some), 0.0, some)

    def mean(self, p: Array) -> float:
        """The mean of |p|, added up in float64."""
        return checked(self._total(p) / max(1, p.size))

    def shift(self, source: Array, bits: Array, scale: float, out: Array) -> None:
        """out = source + scale * sign."""
        if out is not source:
            out[:] = source
        self._move(bits, self._number(scale), out)

    def press(self, p: Array, bits: Array, source: Array, out: Array, stretch: float = 1.0) -> float:
        """The sum comes first: what is not finite leaves all as it was."""
        scale = self._as_it_travels(stretch * self.mean(p))
        self.pack(p, bits)
        if source is p:
            self._leave(p, self._number(scale), out)
        else:
            self.shift(source, bits, -scale, out)
        return scale

    def _bits_of(self, p: Array) -> Array:
        return self._bools[: nbytes(p.size)].view("u1")


_made: list[tuple[Loop, Loop, Loop]] = []


def _loops() -> tuple[Loop, Loop, Loop]:
    """Made once in a process, when they are first needed."""
    if not _made:  # only a sum may be taken in another order
        _made.append((_compiled(_total, fastmath={"reassoc", "nsz"}), _compiled(_leave), _compiled(_move)))
    return _made[0]


def _compiled(loop: Loop, **options: Any) -> Loop:
    try:
        made: Loop = numba.njit(nogil=True, cache=True, **options)(loop)
    except RuntimeError:  # no place to keep it: neither beside this file nor at home
        made = numba.njit(nogil=True, **options)(loop)
    return made


def _total(p: Array) -> float:
    total = 0.0
    for i in range(p.size):
        total += abs(p[i])
    return total


def _leave(p: Array, scale: Any, out: Array) -> None:
    for i in range(p.size):
        out[i] = p[i] - (scale if p[i] >= 0 else -scale)


def _move(bits: Array, scale: Any, out: Array) -> None:
    whole = out.size // BITS
    for k in range(whole):
        byte = bits[k]
        for j in range(BITS):
            out[BITS * k + j] += scale if (byte >> j) & 1 else -scale
    for i in range(BITS * whole, out.size):
        out[i] += scale if (bits[whole] >> (i - BITS * whole)) & 1 else -scale
