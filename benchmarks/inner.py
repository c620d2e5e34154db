"""One rank's step on all cores: tasks on threads of our own (`inner_threads`) beside ATen's own pool.

    limit     the step on one thread, divided by the cores: no division of the work can be faster
    control   one thread

The same model and the same batch, forward and backward (and the optimizer's steps where these are what is overlapped).
`tiles` cuts convolutions by batch and area, `branches` computes what does not need each other at the same time,
`overlapped` steps each parameter while backward goes on. ATen splits every operation by itself, one after the other.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.table import Cell, Role, Row, Table
from lightning_async.inner.branches import Branches
from lightning_async.inner.overlap import OverlappedSteps
from lightning_async.inner.threads import Threads
from lightning_async.inner.tiles import tile

Step = Callable[[], None]
ROLES = {"one thread": Role.CONTROL, "ATen": Role.OTHER}


class Inception(nn.Module):
    """Six branches of small layers, twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.ModuleList(_branch(3, width, 1 + 2 * (k % 3)) for k in range(6))
        self.second = nn.ModuleList(_branch(6 * width, width, 1 + 2 * (k % 3)) for k in range(6))
        self.head = nn.Linear(6 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the area, classified."""
        for branches in (self.first, self.second):
            x = torch.cat([branch(x) for branch in branches], 1)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _branch(inputs: int, width: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, size, padding=size // 2), nn.BatchNorm2d(width), nn.ReLU())


def _stack(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())))


def _perceptron() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.Tanh())))


def run(quick: bool) -> Table:
    """All workloads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    steps, turns = (3, 1) if quick else (12, 5)
    rows: list[Row] = []
    for name, variants in workloads(cores).items():
        found = repeat({v: partial(_measure, make, steps) for v, make in variants.items()}, turns)
        rows += _rows(name, variants, found, cores)
    notes = ["Nothing is claimed: a ratio to ATen above 1 says that nothing is gained there."]
    return Table(f"one rank, {cores} cores: forward and backward", rows, notes=notes)


def workloads(cores: int) -> Mapping[str, Mapping[str, Callable[[], Iterator[Step]]]]:
    """Each workload with its variants."""
    torch.manual_seed(0)
    stack, wide, inception = _stack(3, 32, 64, 64), _stack(3, 32, 32), Inception()
    batch, one, small = torch.randn(16, 3, 48, 48), torch.randn(1, 3, 256, 256), torch.randn(8, 3, 20, 20)
    return {
        "convolutions, batch 16": _plain(stack, batch, cores) | {"tiles": partial(_tiled, stack, batch, cores)},
        "convolutions, batch 1": _plain(wide, one, cores) | {"tiles": partial(_tiled, wide, one, cores)},
        "twelve small branches": _plain(inception, small, cores)
        | {"branches": partial(_branched, inception, small, cores)},
        "6 M weights, AdamW": {
            "one thread": partial(_stepped, 1),
            "ATen": partial(_stepped, cores),
            "overlapped": partial(_overlapped, cores),
        },
    }


def _plain(model: nn.Module, x: Tensor, cores: int) -> dict[str, Callable[[], Iterator[Step]]]:
    return {"one thread": partial(_trained, model, x, 1), "ATen": partial(_trained, model, x, cores)}


@contextmanager
def _aten(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def _trained(model: nn.Module, x: Tensor, threads: int) -> Iterator[Step]:
    with _aten(threads):
        yield partial(_pass, copy.deepcopy(model), x)


def _tiled(model: nn.Module, x: Tensor, cores: int) -> Iterator[Step]:
    """Convolutions in tiles, everything else by ATen."""
    threads, made = Threads(cores), copy.deepcopy(model)
    tile(made, threads)
    with _aten(cores):
        yield partial(_pass, made, x)
    threads.close()


def _branched(model: nn.Module, x: Tensor, cores: int) -> Iterator[Step]:
    threads = Threads(cores)
    yield partial(_pass, Branches(copy.deepcopy(model), threads), x)
    threads.close()


def _stepped(threads: int) -> Iterator[Step]:
    model, x = _perceptron(), torch.randn(32, 1024)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        _pass(model, x)
        optimizer.step()

    with _aten(threads):
        yield step


def _overlapped(cores: int) -> Iterator[Step]:
    model, x, threads = _perceptron(), torch.randn(32, 1024), Threads(cores)
    steps = OverlappedSteps(lambda p: torch.optim.AdamW(p, 1e-4), model.parameters(), threads)

    def step() -> None:
        model(x).square().mean().backward()
        steps.finish()

    with _aten(cores):
        yield step
    steps.close()
    threads.close()


def _pass(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def _measure(make: Callable[[], Iterator[Step]], steps: int) -> Measures:
    made = make()
    step = next(made)
    for _ in range(2):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    next(made, None)  # its threads end
    return {"step": min(seconds)}


def _rows(name: str, variants: Mapping[str, object], found: Turns, cores: int) -> Iterator[Row]:
    alone = 1000 * found.of("one thread", "step").median
    yield Row(f"{name}: limit", Role.LIMIT, {"step ms": alone / cores})
    for variant in variants:
        cells: dict[str, Cell] = {
            "step ms": 1000 * found.of(variant, "step").median,
            "step / one thread": str(found.ratio(variant, "one thread", "step")),
            "step / ATen": str(found.ratio(variant, "ATen", "step")),
        }
        yield Row(f"{name}: {variant}", ROLES.get(variant, Role.RESULT), cells)
