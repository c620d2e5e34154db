"""Packing numbers as signs, and adding up what came, beside one copy of the same numbers in memory.

    limit     memcpy: what reading and writing each number once costs, in the same turn
    other     naive: the same packing by whole torch expressions, as one would write it first
    other     quantize: PyTorch's own quantisation to 8 bits (its communication hook's), without feedback

`pack` reads values and rest, writes the new rest and the bits; `add` unpacks the sheets of 4 ranks and adds them up,
and counts for one rank. Where Numba is installed they are its loops, and the rows with `NumPy` are what they would be
without it, in the same turns. One thread but for the last rows. Times are processor times, so that other work on the
machine counts less; with two threads they are a clock's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.table import Cell, Claim, Role, Row, Table
from lightning_async.algorithms.press import Press, Rest, Sum, Values
from lightning_async.algorithms.sheets import Span, cuts
from lightning_async.algorithms.signs import NumpySigns

RANKS = 4
MILLION = 1_000_000
PACK, ADD = 3.0, 1.0
"""Times memcpy, at most."""
KEPT = ("memcpy", "pack", "add")
WITHOUT = {"pack, NumPy": "pack", "add, NumPy": "add"}
"""What a machine without Numba does."""


class Bench:
    """Vectors of one size, and what is done to them."""

    def __init__(self, numel: int, threads: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.numel = numel
        self.values, self.rest = torch.randn(numel, generator=draw), torch.zeros(numel)
        self.out = torch.zeros(numel)
        (self.cut,) = cuts([Span(0, numel, 0)], parts=1, dtype=torch.float32)
        self.press = self.quickest = Press(self.values, threads=threads)
        self.plain = Press(self.values, threads=threads)
        self.compiled = type(self.quickest._benches[0][0]) is not NumpySigns
        self.plain._benches = [(NumpySigns(), scratch) for _, scratch in self.plain._benches]
        self.sheets = [self.cut.sheet() for _ in range(RANKS)]
        self.kept = Rest(self.rest)

    def memcpy(self) -> None:
        """Each number read once and written once."""
        self.out.copy_(self.values)

    def pack(self) -> None:
        """Values and rest to a sheet and a new rest."""
        self.press.pack(Values(self.values), self.kept, self.sheets[0])

    def add(self) -> None:
        """The sum of all ranks' sheets."""
        self.press.add(Sum(self.sheets, 1 / RANKS), self.cut, Rest(self.out))

    def naive(self) -> None:
        """The same as `pack`."""
        p = self.values + self.rest
        scale, positive = p.abs().mean(), p >= 0
        places = 2 ** torch.arange(8, dtype=torch.uint8)
        (positive[: self.numel // 8 * 8].view(-1, 8).to(torch.uint8) * places).sum(1, dtype=torch.uint8)
        self.rest = p - torch.where(positive, scale, -scale)

    def quantize(self) -> None:
        """What PyTorch's hook does to a bucket."""
        low, high = self.values.aminmax()
        scale = float(high - low) / 255
        rounded(self.values, scale, -float(low) / scale)


def rounded(x: Tensor, scale: float, zero: float) -> Tensor:
    """Eight bits a number, as `quantization_hooks` has it."""
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8)


def run(quick: bool) -> Table:
    """All sizes on one thread, the last two on two as well."""
    sizes = [1, 4] if quick else [1, 25, 100]
    rows: list[Row] = []
    claims: list[Claim] = []
    for millions in sizes:
        turns = _turns(millions * MILLION, 1, quick)
        rows += [_row(f"{millions} M: {name}", turns, name) for name in turns.measures]
        if millions >= 25:
            claims += _claims(millions, turns)
    threaded = _turns(sizes[-1] * MILLION, 2, quick)
    rows += [_row(f"{sizes[-1]} M, 2 threads: {name}", threaded, name) for name in threaded.measures]
    why = "a compressor that sends nothing has nothing to be timed; `memcpy` is what it is held against"
    return Table("Signs: nanoseconds a number", rows, claims, no_control=why)


def _turns(numel: int, threads: int, quick: bool) -> Turns:
    torch.set_num_threads(1)
    bench = Bench(numel, threads)
    names = [*KEPT, *(WITHOUT if bench.compiled else {}), *(["naive", "quantize"] if threads == 1 else [])]
    clock = time.process_time if threads == 1 else time.perf_counter
    return repeat({name: partial(_measure, bench, name, clock) for name in names}, 3 if quick else 7)


def _measure(bench: Bench, name: str, clock: Callable[[], float]) -> Measures:
    bench.press = bench.plain if name in WITHOUT else bench.quickest
    work = getattr(bench, WITHOUT.get(name, name))
    work()  # what came before is out of the cache
    start = clock()
    work()
    share = RANKS if name.startswith("add") else 1
    return {"ns": 1e9 * (clock() - start) / bench.numel / share}


def _row(title: str, turns: Turns, name: str) -> Row:
    role = Role.LIMIT if name == "memcpy" else Role.RESULT if name in KEPT else Role.OTHER
    cells: dict[str, Cell] = {"ns": turns.of(name, "ns").median, "x memcpy": str(turns.ratio(name, "memcpy", "ns"))}
    return Row(title, role, cells)


def _claims(millions: int, turns: Turns) -> list[Claim]:
    pack, add = turns.ratio("pack", "memcpy", "ns"), turns.ratio("add", "memcpy", "ns")
    return [
        Claim(f"{millions} M: packing takes at most {PACK:g}x memcpy: {pack}", pack.median <= PACK),
        Claim(f"{millions} M: adding up takes at most {ADD:g}x memcpy a rank: {add}", add.median <= ADD),
    ]
