"""Corrections travel as signs and a scale for each block, as those of `lazy_sign` do; weights travel as bfloat16.

    push     c = own weights - base   -->  scale * sign(c), a 32nd of the bytes        the base moves by that
             what the signs miss is in (own weights - base), and goes along the next time
    answer   W                        -->  its bfloat16, half of the bytes             of the server's W nothing is cut

Blocks lie in one tensor each; small tensors travel whole, and the gaps between tensors not at all. A block that is not
finite travels as a scale that is none, so that its receiver refuses the push.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_async.algorithms.shards import Shard
from lightning_async.algorithms.sheets import Cut, Sheet, Span, cuts
from lightning_async.algorithms.signs import BLOCK, Flat, NotFinite, Signs, flat, signs_for
from lightning_async.algorithms.wire import EXACT, ROUNDED, Codec, Wire, Wires

SMALL = 1024
"""Tensors with fewer numbers travel whole, as in `lazy_sign`."""


class SignWire:
    """The codec of one shard.

    Args:
        cut: What of the shard travels as signs, and what whole.
        numel: How many numbers the shard has.
        bench: What is done to one block, and scratch memory for one.
    """

    def __init__(self, cut: Cut, numel: int, bench: tuple[Signs[Flat], Flat]) -> None:
        self._cut, self._numel, (self._signs, self._rest) = cut, numel, bench

    def encode(self, values: Tensor) -> Tensor:
        """See `Codec`."""
        sheet = self._cut.sheet(values.device)
        for i, span in enumerate(self._cut.blocks):
            p = flat(values[span.start : span.stop])
            try:
                scale = self._signs.press(p, sheet.bits(i), p, self._rest[: span.stop - span.start])
            except NotFinite:
                scale = math.nan
            sheet.scale_by(i, scale)
        for i, span in enumerate(self._cut.whole):
            sheet.whole(i).copy_(values[span.start : span.stop])
        return sheet.body

    def decode(self, body: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        sheet, values = Sheet(self._cut, body), torch.zeros(self._numel, dtype=self._cut.dtype, device=body.device)
        for i, span in enumerate(self._cut.blocks):
            part = flat(values[span.start : span.stop])
            self._signs.shift(part, sheet.bits(i), sheet.scale(i), part)
        for i, span in enumerate(self._cut.whole):
            values[span.start : span.stop] = sheet.whole(i)
        return values.to(dtype)

    def answer(self, weights: Tensor) -> Tensor:
        """See `Codec`."""
        return ROUNDED.encode(weights)


class SignWires:
    """The codecs of all shards; they share scratch memory, so each thread takes its own.

    Args:
        shards: How the flat vector is cut.
        places: Where each parameter begins in it.
        like: Of its dtype, on the device on which corrections are made, or merged.
    """

    def __init__(self, shards: Iterable[Shard], places: Sequence[tuple[nn.Parameter, int]], like: Tensor) -> None:
        bench = signs_for(like, BLOCK), flat(like.new_empty(BLOCK))
        self._of = {
            shard.number: SignWire(_cut(shard, places, like.dtype), shard.end - shard.begin, bench) for shard in shards
        }

    def of(self, shard: int) -> Codec:
        """See `Wires`."""
        return self._of[shard]


def _cut(shard: Shard, places: Sequence[tuple[nn.Parameter, int]], dtype: torch.dtype) -> Cut:
    """What of each parameter is in this shard, counted from where that begins."""
    inside = (
        Span(max(at, shard.begin) - shard.begin, min(at + p.numel(), shard.end) - shard.begin, number)
        for number, (p, at) in enumerate(places)
    )
    (cut,) = cuts([span for span in inside if span.start < span.stop], parts=1, dtype=dtype, min_size=SMALL)
    return cut


def codecs(wire: Wire, shards: Iterable[Shard], places: Sequence[tuple[nn.Parameter, int]], like: Tensor) -> Wires:
    """The codecs of all shards for a wire of this name."""
    return SignWires(shards, places, like) if wire == "sign" else ROUNDED if wire == "bf16" else EXACT
