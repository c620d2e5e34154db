"""The ranks of one member step with the mean of their gradients, whichever of them has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.common_step import CommonStep
from lightning_async.replica import Replica
from lightning_async.transport.siblings import Siblings
from lightning_async.transport.virtual import VirtualCluster


def averaged(*gradients: list[float | None], times: int = 1, dtype: torch.dtype = torch.float32) -> list[Any]:
    """What becomes of the gradients of two parameters on each rank."""
    cluster, ranks = VirtualCluster(len(gradients)), tuple(range(len(gradients)))
    pairs = [[nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in row] for row in gradients]
    for row, parameters in zip(gradients, pairs, strict=True):
        for value, parameter in zip(row, parameters, strict=True):
            parameter.grad = None if value is None else torch.full_like(parameter, value)

    def life(rank: int) -> Any:
        replica, step = Replica(pairs[rank]), CommonStep()
        siblings = Siblings(cluster.carriers[rank], ranks)
        for _ in range(times):
            yield from step.average(replica, siblings.average)

    cluster.run({rank: life(rank) for rank in ranks})
    return [[None if p.grad is None else _one(p.grad) for p in parameters] for parameters in pairs]


def _one(gradient: Tensor) -> float:
    assert len(gradient.unique()) == 1
    return float(gradient[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_has_the_mean(dtype: torch.dtype) -> None:
    assert averaged([1.0, 4.0], [3.0, 8.0], dtype=dtype) == [[2.0, 6.0]] * 2
    assert averaged([1.0, 4.0], [3.0, 8.0], [8.0, 0.0], dtype=dtype) == [[4.0, 4.0]] * 3


def test_a_parameter_that_one_rank_used_is_used_by_all_and_one_that_nobody_used_by_none() -> None:
    assert averaged([1.0, None], [None, None]) == [[0.5, None]] * 2


def test_what_was_averaged_stays() -> None:
    assert averaged([1.0, None], [3.0, 8.0], times=3) == [[2.0, 4.0]] * 2


def test_one_rank_keeps_its_own() -> None:
    assert averaged([0.1, None]) == [[pytest.approx(0.1), None]]


def test_sparse_gradients_are_refused() -> None:
    cluster, layer = VirtualCluster(1), nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"a gradient is sparse, .* or leave `inner` out"):
        cluster.run({0: CommonStep().average(Replica(layer.parameters()), Siblings(cluster.carriers[0], (0,)).average)})
