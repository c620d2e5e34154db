"""A sheet is a part of the flat vector as it travels: scales, then whole numbers, then signs, in one tensor of bytes.

    flat vector   |..... tensor 0 .....|bias|.......... tensor 1 ..........|      (| : padding, which never travels)
    cut           [block 0][block 1][b2]|whole|[block 3][block 4][block 5]
    sheet         scale 0 .. scale 5 | whole numbers | signs 0 .. signs 5

A `Cut` says which blocks and which whole spans a sheet holds; all members make the same cuts from the same lengths, so
a sheet needs no table of contents. A block lies in one tensor, and begins at a byte of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_async.algorithms.signs import BITS, BLOCK, Flat, flat, nbytes

Scale = Literal["block", "tensor", "global"]
SCALES = get_args(Scale)


class Span(NamedTuple):
    """Numbers of the flat vector, all of one tensor."""

    start: int
    stop: int
    tensor: int


@dataclass(frozen=True)
class Cut:
    """What a sheet holds.

    Attributes:
        blocks: Spans that travel as signs.
        whole: Spans that travel as they are.
        scale: What has a scale of its own: each block, each tensor, or all.
        dtype: Of scales and whole numbers.
    """

    blocks: tuple[Span, ...]
    whole: tuple[Span, ...]
    scale: Scale
    dtype: torch.dtype

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """The place of each block's scale."""
        if self.scale == "block":
            return tuple(range(len(self.blocks)))
        place = {group: i for i, group in enumerate(dict.fromkeys(map(self.group, self.blocks)))}
        return tuple(place[self.group(span)] for span in self.blocks)

    def group(self, span: Span) -> int:
        """What a block has its scale in common with: its tensor, or all."""
        return span.tensor if self.scale == "tensor" else 0

    @cached_property
    def scales(self) -> int:
        """How many scales there are."""
        return max(self.groups, default=-1) + 1

    @cached_property
    def numbers(self) -> int:
        """How many whole numbers there are."""
        return sum(span.stop - span.start for span in self.whole)

    @cached_property
    def nbytes(self) -> int:
        """The length of a sheet."""
        return (self.scales + self.numbers) * self.dtype.itemsize + sum(nbytes(b.stop - b.start) for b in self.blocks)

    def sheet(self, device: torch.device | None = None) -> Sheet:
        """A new one."""
        return Sheet(self, torch.zeros(self.nbytes, dtype=torch.uint8, device=device))


class Sheet:
    """One sheet, written or read block by block."""

    def __init__(self, cut: Cut, body: Tensor) -> None:
        self.cut, self.body = cut, body
        size = cut.dtype.itemsize
        one, two = cut.scales * size, (cut.scales + cut.numbers) * size
        self.scales = body[:one].view(cut.dtype)
        self.numbers = body[one:two].view(cut.dtype)
        self._flat_scales, self._bits = flat(self.scales), flat(body[two:])
        self._at = _running(nbytes(b.stop - b.start) for b in cut.blocks)
        self._places = _running(span.stop - span.start for span in cut.whole)

    def fill(self, body: Tensor) -> None:
        """Be a copy of a body that came."""
        if body.numel() != self.cut.nbytes:
            raise ValueError(
                f"a sheet of {self.cut.nbytes} bytes was expected and one of {body.numel()} came: all ranks must have "
                "the same model and the same knobs"
            )
        self.body.copy_(body)

    def scale(self, i: int) -> float:
        """The scale of block `i`, as it travels."""
        return float(self._flat_scales[self.cut.groups[i]])

    def scale_by(self, i: int, scale: float) -> None:
        """Write the scale of block `i`."""
        self._flat_scales[self.cut.groups[i]] = scale

    def bits(self, i: int) -> Flat:
        """The signs of block `i`."""
        return self._bits[self._at[i] : self._at[i + 1]]

    def whole(self, i: int) -> Tensor:
        """The numbers of whole span `i`."""
        return self.numbers[self._places[i] : self._places[i + 1]]


def cuts(
    spans: Sequence[Span],
    *,
    parts: int,
    dtype: torch.dtype,
    exact: Iterable[int] = (),
    min_size: int = 0,
    block: int = BLOCK,
    scale: Scale = "block",
) -> list[Cut]:
    """The flat vector in `parts` of about equal length.

    Args:
        spans: Where each tensor lies.
        parts: How many sheets there shall be; some may be empty where there is little to send.
        dtype: Of the flat vector.
        exact: Numbers of the tensors that travel whole.
        min_size: Tensors with fewer numbers travel whole.
        block: Numbers of a block, a multiple of 8.
        scale: What has a scale of its own.
    """
    exact = set(exact)
    small = [s for s in spans if s.tensor in exact or s.stop - s.start < min_size]
    blocks = [
        [b for span in part for b in _chop(span, block)] for part in _deal(sorted(set(spans) - set(small)), parts)
    ]
    return [Cut(tuple(b), tuple(w), scale, dtype) for b, w in zip(blocks, _deal(small, parts), strict=True)]


def fingerprint(some: Sequence[Cut]) -> int:
    """Alike where sheets are: as many of them, with the same blocks, whole spans and scales."""
    return zlib.crc32(repr(list(some)).encode())


def _deal(spans: Sequence[Span], parts: int) -> list[list[Span]]:
    """Each part gets the next share; cuts are at whole bytes of signs."""
    total, done = sum(s.stop - s.start for s in spans), 0
    dealt: list[list[Span]] = [[] for _ in range(parts)]
    for start, stop, tensor in spans:
        while start < stop:
            part = min(parts - 1, done * parts // total)
            boundary = -(-total * (part + 1) // parts)
            end = min(stop, start + nbytes(boundary - done) * BITS)
            dealt[part].append(Span(start, end, tensor))
            done, start = done + end - start, end
    return dealt


def _chop(span: Span, block: int) -> list[Span]:
    return [Span(at, min(span.stop, at + block), span.tensor) for at in range(span.start, span.stop, block)]


def _running(lengths: Iterable[int]) -> list[int]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends
