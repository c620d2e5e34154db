"""Sketches tell distances without the weights: right on average, equal for equal replicas."""

from __future__ import annotations

import pytest
import torch

from lightning_async.callbacks.sketch import BUCKETS, Sketch


def replicas(n: int, sizes: list[int], noise: float) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(n)
    common = [torch.randn(size, generator=generator) for size in sizes]
    return [[part + noise * torch.randn(part.shape, generator=generator) for part in common] for _ in range(n)]


def exact(found: list[list[torch.Tensor]]) -> float:
    flat = torch.stack([torch.cat(parts) for parts in found]).double()
    return float((flat - flat.mean(0)).square().sum(1).mean().div(flat.shape[1]).sqrt())


@pytest.mark.parametrize("sizes", [[300, 20, 1], [200_000, 5]])  # all coordinates are looked at, or a third of them
def test_the_estimate_is_right_on_average(sizes: list[int]) -> None:
    found = replicas(4, sizes, 0.1)
    estimates = []
    for seed in range(40):
        sketches = {rank: Sketch(parts, seed).of() for rank, parts in enumerate(found)}
        estimates.append(Sketch(found[0], seed).spread(sketches) ** 2)
    assert sum(estimates) / len(estimates) == pytest.approx(exact(found) ** 2, rel=0.1)
    assert max(estimates) < 2.5 * exact(found) ** 2


def test_equal_replicas_are_nowhere_apart() -> None:
    parts = replicas(1, [50, 3], 0.1)[0]
    sketch = Sketch(parts)
    assert sketch.spread({0: sketch.of(), 1: sketch.of()}) == 0
    assert len(sketch.of()) == 4 * BUCKETS


def test_one_rank_alone_says_nothing() -> None:
    sketch = Sketch([torch.ones(5)])
    assert sketch.spread({0: sketch.of()}) != sketch.spread({0: sketch.of()})  # NaN
    assert sketch.spread({0: sketch.of(), 1: b"something else"}) != 0
