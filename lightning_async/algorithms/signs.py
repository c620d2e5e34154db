"""A block of numbers travels as its signs and one scale; what that misses stays here and goes along the next time.

    p = values + rest            scale = stretch * mean |p|          sent = scale * sign(p),  sign(0) = +1
    rest <- p - sent             so  sent + new rest = values + old rest,  over any number of rounds
    |new rest|^2 = (1 - stretch (2 - stretch) phi) |p|^2
                                 phi = |p|_1^2 / (d |p|_2^2), from 1/d (one number stands out) to 1 (all alike)

With stretch 1 the scale is the least-squares one, of a single round. But updates go the same way for many rounds, and
what stands out in them is held back until scales have grown to its size: a larger scale catches up sooner. Below
stretch 2 a block never grows by being sent (`python -m benchmarks lazy_parity` compares them).

Blocks are small enough for the cache: memory is read once (values, rest) and written once (rest), and the bits are 1/32
of what float32 takes. Sums are pairwise: `torch.linalg.vector_norm(x, 1)` adds up naively on a CPU, and is half of the
truth at 100 million numbers.

Four ways to the same numbers: compiled loops on a CPU (`signs_numba`), NumPy there without a compiler, torch anywhere,
Triton kernels on a GPU (`signs_triton`).
"""

from __future__ import annotations

import math
import sys
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1 << 16
"""Numbers of a block: 256 kB of float32, so that all that is done to it is done in a core's own cache."""
STRETCH = 1.6
"""Scales of updates, in means of their sizes; where nothing goes the same way for long, 1 is better."""
BITS = 8
Array = NDArray[Any]
Flat = Any
"""A flat tensor as it is worked on: on a CPU NumPy's view of its memory, of which a part is had ten times sooner."""
F = TypeVar("F", contravariant=True)


class NotFinite(ValueError):  # noqa: N818  # it names a state of affairs, as StopIteration does
    """There is a NaN or an infinity where numbers were to be sent."""

    def __init__(self) -> None:
        super().__init__("there are numbers that are not finite")


class Signs(Protocol[F]):
    """What is done to one block. All are flat and contiguous, bits are bytes, number 8i + j is bit j of byte i."""

    def add(self, a: F, b: F, out: F) -> None:
        """out = a + b; `out` may be either."""

    def subtract(self, a: F, b: F, out: F) -> None:
        """out = a - b; `out` may be either."""

    def square(self, p: F) -> float:
        """|p|^2."""

    def mean(self, p: F) -> float:
        """The mean of |p|; NotFinite where there is none."""

    def pack(self, p: F, bits: F) -> None:
        """Write the signs of `p`."""

    def shift(self, source: F, bits: F, scale: float, out: F) -> None:
        """out = source + scale * sign; `out` may be `source`."""

    def press(self, p: F, bits: F, source: F, out: F, stretch: float = 1.0) -> float:
        """The scale, as it travels: so many times the mean of |p|. The signs of `p` are written, and
        out = source - scale * sign. Or NotFinite."""


def flat(tensor: Tensor) -> Flat:
    """A tensor as the signs of its device take it."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def signs_for(like: Tensor, block: int = BLOCK) -> Signs[Flat]:
    """The fastest way for tensors like this one; it has scratch memory for one block, so each thread takes its own."""
    if like.device.type == "cpu":
        from lightning_async.algorithms.signs_numba import numba_signs

        return numba_signs(like, block) or NumpySigns(block, like.dtype)
    if like.device.type == "cuda":
        from lightning_async.algorithms.signs_triton import triton_signs

        return triton_signs(like) or TorchSigns()
    return TorchSigns()


def nbytes(numel: int) -> int:
    """Bytes that the signs of so many numbers take."""
    return -(-numel // BITS)


class NumpySigns:
    """NumPy on the tensors' own memory, at the speed of that memory."""

    def __init__(self, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> None:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._sizes = torch.empty(nbytes(block) * BITS, dtype=dtype)  # by torch: at a multiple of 64 bytes, see `press`
        self._numbers: Array = self._sizes.numpy()
        self._most = torch.finfo(dtype).max
        self._bools = np.empty(nbytes(block) * BITS, np.bool_)
        self._table = _table().astype(self._numbers.dtype)
        self._scaled = self._table.copy()
        row = np.dtype((np.void, self._numbers.dtype.itemsize * BITS))
        self._ones, self._rows, self._steps = (
            self._table.view(row)[:, 0],
            self._scaled.view(row)[:, 0],
            self._numbers.view(row),
        )

    def add(self, a: Array, b: Array, out: Array) -> None:
        """out = a + b."""
        np.add(a, b, out=out)

    def subtract(self, a: Array, b: Array, out: Array) -> None:
        """out = a - b."""
        np.subtract(a, b, out=out)

    def square(self, p: Array) -> float:
        """|p|^2."""
        numbers = torch.from_numpy(p)
        return float(torch.dot(numbers, numbers))

    def mean(self, p: Array) -> float:
        """The mean of |p|; torch adds up three times as fast as NumPy."""
        if not p.size:
            return 0.0
        np.abs(p, out=self._numbers[: p.size])
        sizes = self._sizes[: p.size]
        total = float(sizes.sum())
        if not math.isfinite(total):  # a sum may be too large for float32 where no number is
            total = float(sizes.sum(dtype=torch.float64))
        return checked(total / p.size)

    def pack(self, p: Array, bits: Array) -> None:
        """Write the signs of `p`."""
        bits[:] = np.packbits(np.greater_equal(p, 0, out=self._bools[: p.size]), bitorder="little")

    def shift(self, source: Array, bits: Array, scale: float, out: Array) -> None:
        """out = source + scale * sign: eight numbers for each byte, by a table whose rows are copied whole."""
        np.multiply(self._table, scale, out=self._scaled)
        self._rows.take(bits, None, self._steps[: bits.size], "wrap")  # "raise" would copy, "clip" compare
        np.add(source, self._numbers[: out.size], out=out)

    def press(self, p: Array, bits: Array, source: Array, out: Array, stretch: float = 1.0) -> float:
        """As |p| = p * sign, the sum is a product with the signs that are needed anyway.

        It is the same to the bit wherever the block lies, if it lies as the scratch memory does.
        """
        self.pack(p, bits)
        self._ones.take(bits, None, self._steps[: bits.size], "wrap")
        signs = self._sizes if p.size == self._sizes.numel() else self._sizes[: p.size]
        numbers = torch.from_numpy(p)
        total = stretch * float(torch.dot(numbers, signs)) / max(1, p.size)
        if not math.isfinite(total):
            scale = self._as_it_travels(stretch * self.mean(p))
            self.shift(source, bits, -scale, out)
            return scale
        scale = self._as_it_travels(total)
        start = numbers if source is p else torch.from_numpy(source)
        torch.add(start, signs, alpha=-scale, out=torch.from_numpy(out))
        return scale

    def _as_it_travels(self, scale: float) -> float:
        return float(self._numbers.dtype.type(checked(scale, self._most)))


class TorchSigns:
    """Torch alone, on any device: the reference of the kernels."""

    def add(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a + b."""
        torch.add(a, b, out=out)

    def subtract(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a - b."""
        torch.sub(a, b, out=out)

    def square(self, p: Tensor) -> float:
        """|p|^2."""
        return float(torch.dot(p, p))

    def mean(self, p: Tensor) -> float:
        """The mean of |p|."""
        return checked(float(p.abs().mean(dtype=torch.float64))) if p.numel() else 0.0

    def pack(self, p: Tensor, bits: Tensor) -> None:
        """Write the signs of `p`."""
        signs = torch.zeros(bits.numel() * BITS, dtype=torch.uint8, device=p.device)
        signs[: p.numel()] = p >= 0
        torch.sum(signs.view(-1, BITS) << _places(p.device), 1, dtype=torch.uint8, out=bits)

    def shift(self, source: Tensor, bits: Tensor, scale: float, out: Tensor) -> None:
        """out = source + scale * sign."""
        torch.add(source, self._signs(bits, out), alpha=scale, out=out)

    def press(self, p: Tensor, bits: Tensor, source: Tensor, out: Tensor, stretch: float = 1.0) -> float:
        """One after the other."""
        scale = checked(float(torch.tensor(stretch * self.mean(p), dtype=p.dtype)))
        self.pack(p, bits)
        self.shift(source, bits, -scale, out)
        return scale

    def _signs(self, bits: Tensor, like: Tensor) -> Tensor:
        ones = (bits[:, None] >> _places(bits.device)).bitwise_and_(1).view(-1)[: like.numel()]
        return ones.to(like.dtype).mul_(2).sub_(1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=device)


def _table() -> Array:
    """Row b: the eight signs of byte b."""
    bytes_ = np.arange(256, dtype=np.uint8)[:, None]
    return np.unpackbits(bytes_, axis=1, bitorder="little") * 2.0 - 1.0


def checked(mean: float, most: float = sys.float_info.max) -> float:
    """A mean of sizes, or NotFinite: also where it is more than the largest number of what it travels as."""
    if not mean <= most:
        raise NotFinite
    return mean
