"""A network is cut where its slowest stage is fastest: every tick takes as long as the slowest stage.

    blocks   b0 b1 b2 | b3 b4 b5 b6 | b7          cuts = (3, 7): a stage begins at each of these blocks

The best cuts are found by dynamic programming over the measured seconds of the blocks, the first ones among equals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def even(blocks: int, stages: int) -> tuple[int, ...]:
    """Cuts into runs of blocks that differ by one block at most."""
    _check_enough(blocks, stages)
    return tuple(blocks * stage // stages for stage in range(1, stages))


def balanced(seconds: Sequence[float], stages: int) -> tuple[int, ...]:
    """The cuts whose slowest stage is fastest."""
    blocks = len(seconds)
    _check_enough(blocks, stages)
    total = [0.0]
    for one in seconds:
        total.append(total[-1] + one)
    best = [total[end] for end in range(blocks + 1)]  # the slowest stage when the blocks before `end` are one stage
    chosen: list[list[int]] = []
    for _ in range(1, stages):
        costs = [[max(best[cut], total[end] - total[cut]) for cut in range(1, end)] for end in range(blocks + 1)]
        chosen.append([1 + row.index(min(row)) if row else 0 for row in costs])
        best = [min(row) if row else float("inf") for row in costs]
    return _walk_back(chosen, blocks)


def _walk_back(chosen: list[list[int]], blocks: int) -> tuple[int, ...]:
    cuts: list[int] = []
    end = blocks
    for row in reversed(chosen):
        end = row[end]
        cuts.append(end)
    return tuple(reversed(cuts))


def check_cuts(cuts: Sequence[int], blocks: int, stages: int) -> tuple[int, ...]:
    """The cuts, if each stage gets a block by them."""
    _check_enough(blocks, stages)
    bounds = [0, *cuts, blocks]
    rising = all(a < b for a, b in pairwise(bounds))
    if len(cuts) != stages - 1 or not rising or any(isinstance(cut, bool) or not isinstance(cut, int) for cut in cuts):
        raise ValueError(
            f"`split` must be {stages - 1} rising block numbers between 1 and {blocks - 1}, one for each stage but the "
            f"first, got {list(cuts)}"
        )
    return tuple(cuts)


def spans(cuts: Sequence[int], blocks: int) -> list[range]:
    """The blocks of each stage."""
    bounds = [0, *cuts, blocks]
    return [range(a, b) for a, b in pairwise(bounds)]


def measure(blocks: Sequence[nn.Module], x: Tensor, *, repeats: int = 3) -> list[float]:
    """Seconds of forward and backward of each block on `x` and what follows from it: the fastest of some repeats.

    Weights, buffers, gradients and random numbers are as before.
    """
    found = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for block in blocks:
            seconds, x = _seconds(block, x.detach(), repeats)
            found.append(seconds)
    return found


def _seconds(block: nn.Module, x: Tensor, repeats: int) -> tuple[float, Tensor]:
    before = [buffer.clone() for buffer in block.buffers()]
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]
    best, out = float("inf"), x
    for _ in range(repeats):
        entering = x.clone().requires_grad_(x.is_floating_point())
        start = _now(x)
        with torch.enable_grad():
            out = block(entering.clone())  # a block may change what it gets in place
            wanted = [*weights, *([entering] if entering.requires_grad else [])]
            if wanted and out.requires_grad:
                torch.autograd.grad(out.sum(), wanted, allow_unused=True)
        best = min(best, _now(x) - start)
    for buffer, old in zip(block.buffers(), before, strict=True):
        buffer.copy_(old)
    return best, out.detach()


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _check_enough(blocks: int, stages: int) -> None:
    if blocks < stages:
        raise ValueError(f"{blocks} blocks cannot be cut into {stages} stages: each needs at least one block")
