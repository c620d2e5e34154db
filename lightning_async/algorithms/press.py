"""The press fills and reads whole sheets, block by block, so that each number passes through memory once.

    source  values of this rank, or the mean of the sheets of several       p = source + rest
    rest    what was not sent                                               rest <- p - sent
            or, where it tracks, the negative of all that was sent          rest <- rest - sent

Everything that is as long as the model is kept: a round allocates a tensor that travels whole at most, for a while.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lightning_async.algorithms.sheets import Cut, Sheet, Span
from lightning_async.algorithms.signs import BLOCK, Flat, NotFinite, Signs, checked, flat, signs_for

MANY = 8  # blocks a thread; with fewer it is not worth starting one


class Source(Protocol):
    """Where numbers come from, by block or whole span of a cut."""

    def onto(self, base: Flat, i: int, span: Span, out: Flat, signs: Signs[Flat]) -> None:
        """out = base + block `i`; `out` may be `base`."""

    def whole(self, i: int, span: Span, out: Tensor) -> None:
        """out = whole span `i`."""


@dataclass(frozen=True)
class Values:
    """A vector, or how far it has moved since it was another one."""

    vector: Tensor
    since: Tensor | None = None

    def onto(self, base: Flat, i: int, span: Span, out: Flat, signs: Signs[Flat]) -> None:
        """out = base + the values of a span."""
        here = slice(span.start, span.stop)
        now, before = self._flat
        if before is None:
            signs.add(now[here], base, out)
            return
        moved = torch.empty_like(self.vector[here]) if out is base else None  # first the difference: it is small
        step = out if moved is None else flat(moved)
        signs.subtract(now[here], before[here], step)
        signs.add(step, base, out)

    def whole(self, i: int, span: Span, out: Tensor) -> None:
        """out = the values of a span."""
        here = slice(span.start, span.stop)
        if self.since is None:
            out.copy_(self.vector[here])
        else:
            torch.sub(self.vector[here], self.since[here], out=out)

    @cached_property
    def _flat(self) -> tuple[Flat, Flat | None]:
        return flat(self.vector), None if self.since is None else flat(self.since)


@dataclass(frozen=True)
class Sum:
    """`factor` times the sum of several sheets of one cut, in the order given."""

    sheets: Sequence[Sheet]
    factor: float = 1.0

    def onto(self, base: Flat, i: int, span: Span, out: Flat, signs: Signs[Flat]) -> None:
        """out = base + block `i` of the sum."""
        for sheet in self.sheets:
            signs.shift(base, sheet.bits(i), sheet.scale(i) * self.factor, out)
            base = out

    def whole(self, i: int, span: Span, out: Tensor) -> None:
        """out = whole span `i` of the sum: each part is scaled, then all are added, as `ddp` does it."""
        out.zero_()
        for sheet in self.sheets:
            out.add_(sheet.whole(i), alpha=self.factor)


@dataclass(frozen=True)
class Rest:
    """What stays at home between rounds.

    Attributes:
        vector: One number for each of the flat vector's, from `base` on.
        base: Where in the flat vector it begins.
        tracks: Whether it is the negative of all that was sent, in place of what was not.
    """

    vector: Tensor
    base: int = 0
    tracks: bool = False

    def part(self, span: Span) -> Tensor:
        """What stays of a span."""
        return self.vector[span.start - self.base : span.stop - self.base]

    def block(self, span: Span) -> Flat:
        """The same, to be worked on."""
        return self._flat[span.start - self.base : span.stop - self.base]

    @cached_property
    def _flat(self) -> Flat:
        return flat(self.vector)

    def covers(self, span: Span) -> bool:
        """Whether anything stays of this span."""
        return self.base <= span.start and span.stop - self.base <= self.vector.numel()


class Press:
    """Scratch memory for a block, or, with several threads, for one block each. Scales are `stretch` times a mean."""

    def __init__(self, like: Tensor, *, block: int = BLOCK, threads: int = 1, stretch: float = 1.0) -> None:
        self._stretch, self._most = stretch, torch.finfo(like.dtype).max
        self._threads, self._device = threads if like.device.type == "cpu" else 1, like.device
        self._benches = [(signs_for(like, block), flat(like.new_empty(block))) for _ in range(self._threads)]

    def pack(
        self,
        source: Source,
        rest: Rest,
        sheet: Sheet,
        means: dict[int, float] | None = None,
        *,
        tells: bool = False,
    ) -> None:
        """Write a sheet; what it misses stays in `rest`.

        `means` are the scales of whole tensors, or of all, from `means`; without them they are taken of this sheet.
        A block that is not finite leaves its rest as it was, and is NotFinite; with `tells` it travels as NaN instead.
        """
        cut = sheet.cut
        means = self.means(source, rest, [cut]) if means is None else means

        def one(i: int, signs: Signs[Flat], scratch: Flat) -> None:
            span, bits = cut.blocks[i], sheet.bits(i)
            p, kept = scratch[: span.stop - span.start], rest.block(span)
            source.onto(kept, i, span, p, signs)
            left = kept if rest.tracks else p
            if means:
                sheet.scale_by(i, means[cut.group(span)])
                signs.pack(p, bits)
                signs.shift(left, bits, -sheet.scale(i), kept)
                return
            try:
                sheet.scale_by(i, signs.press(p, bits, left, kept, self._stretch))
            except NotFinite:
                if not tells:
                    raise
                sheet.scale_by(i, math.nan)

        self._each(len(cut.blocks), one)
        for i, span in enumerate(cut.whole):
            _pack_whole(source, rest, sheet, i, span, tells)

    def means(self, source: Source, rest: Rest, cuts: Sequence[Cut]) -> dict[int, float]:
        """The scales of tensors, or of all, that are cut into several blocks; empty where each block has its own."""
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        signs, scratch = self._benches[0]
        for cut in cuts:
            for i, span in enumerate(cut.blocks if cut.scale != "block" else ()):
                group, size = cut.group(span), span.stop - span.start
                source.onto(rest.block(span), i, span, scratch[:size], signs)
                sums[group] = sums.get(group, 0.0) + signs.mean(scratch[:size]) * size
                counts[group] = counts.get(group, 0) + size
        return {group: checked(self._stretch * sums[group] / counts[group], self._most) for group in sums}

    def keep(self, source: Source, rest: Rest, cuts: Sequence[Cut]) -> None:
        """Nothing is sent: the rest takes all."""
        signs, scratch = self._benches[0]
        for cut in cuts:
            for i, span in enumerate(cut.blocks):
                p, kept = scratch[: span.stop - span.start], rest.block(span)
                source.onto(kept, i, span, p, signs)
                signs.mean(p)  # raises NotFinite
                kept[:] = p
            for i, span in enumerate(cut.whole):
                numbers = torch.empty_like(rest.part(span))
                source.whole(i, span, numbers)
                if not _finite(numbers):
                    raise NotFinite
                rest.part(span).add_(numbers)

    def add(self, source: Source, cut: Cut, to: Rest) -> None:
        """Add a source to what is kept of its spans."""

        def one(i: int, signs: Signs[Flat], scratch: Flat) -> None:
            here = to.block(cut.blocks[i])
            source.onto(here, i, cut.blocks[i], here, signs)

        self._each(len(cut.blocks), one)
        for i, span in enumerate(cut.whole):
            if to.covers(span):
                numbers = torch.empty_like(to.part(span))
                source.whole(i, span, numbers)
                to.part(span).add_(numbers)

    def square(self, source: Source, cut: Cut, plus: Rest | None = None) -> tuple[float, float]:
        """The sum of the squares of a source (and what is kept of its spans), and of what signs would miss of it."""
        signs, scratch = self._benches[0]
        total, missed, kept = 0.0, 0.0, self._stretch * (2 - self._stretch)
        for i, span in enumerate(cut.blocks):
            p = scratch[: span.stop - span.start]
            p[:] = 0.0
            source.onto(p if plus is None else plus.block(span), i, span, p, signs)
            square = signs.square(p)
            total += square
            missed += max(0.0, square - kept * signs.mean(p) ** 2 * (span.stop - span.start))
        for i, span in enumerate(cut.whole):
            numbers = torch.empty(span.stop - span.start, dtype=cut.dtype, device=self._device)
            source.whole(i, span, numbers)
            if plus is not None:
                numbers.add_(plus.part(span))
            if math.isnan(square := float(torch.dot(numbers, numbers))):  # an infinity is news enough to be sent
                raise NotFinite
            total += square
        return total, missed

    def _each(self, count: int, one: Callable[[int, Signs[Flat], Flat], None]) -> None:
        """Do all blocks, shared out among the threads."""
        workers = min(len(self._benches), count // MANY)
        if workers < 2:
            for i in range(count):
                one(i, *self._benches[0])
            return

        def some(worker: int) -> None:
            for i in range(worker, count, workers):
                one(i, *self._benches[worker])

        with ThreadPoolExecutor(workers) as pool:  # they live for this call, so nobody has to close them
            list(pool.map(some, range(workers)))


def _finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())


def _pack_whole(source: Source, rest: Rest, sheet: Sheet, i: int, span: Span, tells: bool) -> None:
    numbers = sheet.whole(i)
    source.whole(i, span, numbers)
    covered = rest.covers(span)
    if covered:
        numbers.add_(rest.part(span))
    finite = _finite(numbers)
    if not finite and not tells:
        raise NotFinite
    if covered and finite:
        rest.part(span).sub_(numbers) if rest.tracks else rest.part(span).zero_()
