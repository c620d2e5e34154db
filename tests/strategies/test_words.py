"""What ranks tell each other at meetings, on a virtual cluster: no pickles, the same bits for everybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed import ReduceOp

from lightning_async.strategies import words
from lightning_async.strategies.buffers import average_buffers
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

N = 3


def everywhere(say: Callable[[Rounds, int], Wait[Any]]) -> list[Any]:
    cluster = VirtualCluster(N)
    ends = cluster.run({r: say(Rounds(cluster.carriers[r]), r) for r in range(N)})
    return [ends[r] for r in range(N)]


@pytest.mark.parametrize("obj", [None, True, 3, 0.1, "text", ["a", {"b": None}], {"path": "x"}])
def test_broadcast(obj: object) -> None:
    assert everywhere(lambda rounds, r: words.broadcast(rounds, obj if r == 1 else "mine", 1)) == [obj] * N


def test_broadcast_of_a_path_is_its_text() -> None:
    assert everywhere(lambda rounds, r: words.broadcast(rounds, Path("a/b"), 0))[1:] == ["a/b"] * 2


def test_broadcast_of_anything_else_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"carries text, numbers, .* got object; send tensors"):
        everywhere(lambda rounds, r: words.broadcast(rounds, object(), 0))


@pytest.mark.parametrize(
    ("how", "expected"),
    [("sum", 3), ("mean", 1), ("avg", 1), (None, 3), ("max", 2), ("min", 0), (ReduceOp.SUM, 3), (ReduceOp.MAX, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (2, 3), (50, 100)])
def test_reduce(how: Any, expected: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for result in everywhere(lambda rounds, r: words.reduce(rounds, torch.full(shape, r, dtype=dtype), how)):
        assert torch.equal(result, torch.full(shape, expected, dtype=dtype))


def test_reduce_by_something_else_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="`reduce_op` must be 'sum', 'mean', 'max' or 'min'"):
        everywhere(lambda rounds, r: words.reduce(rounds, torch.zeros(1), "product"))


@pytest.mark.parametrize("size", [0, 1, 10000])
def test_gather_of_unequal_sizes(size: int) -> None:
    for parts in everywhere(lambda rounds, r: words.gather_uneven(rounds, torch.full((size + r,), r))):
        assert [part.tolist() for part in parts] == [[r] * (size + r) for r in range(N)]


def test_gather_needs_equal_shapes() -> None:
    with pytest.raises(ValueError, match=r"different shapes: \[\(1,\), \(2,\), \(3,\)\]"):
        everywhere(lambda rounds, r: words.gather(rounds, torch.zeros(1 + r)))


@pytest.mark.parametrize(
    ("one", "other", "sentence"),
    [
        (
            lambda rounds: words.broadcast(rounds, "x", 0),
            lambda rounds: words.decide(rounds, True, all_of_them=True),
            "rank 0 is at 'broadcast from 0', ranks 1, 2 are at 'decide by all'",
        ),
        (
            lambda rounds: words.reduce(rounds, torch.zeros(1), "mean"),
            lambda rounds: words.reduce(rounds, torch.zeros(1), ReduceOp.SUM),
            "rank 0 is at 'reduce mean', ranks 1, 2 are at 'reduce sum'",
        ),
        (
            lambda rounds: words.gather(rounds, torch.zeros(1)),
            lambda rounds: rounds.barrier(),
            "rank 0 is at 'gather', ranks 1, 2 are at 'barrier'",
        ),
    ],
)
def test_ranks_that_call_different_things_hear_who_is_where(one: Any, other: Any, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        everywhere(lambda rounds, r: one(rounds) if r == 0 else other(rounds))


def test_decide() -> None:
    assert everywhere(lambda rounds, r: words.decide(rounds, r == 0, True)) == [False] * N
    assert everywhere(lambda rounds, r: words.decide(rounds, r == 0, False)) == [True] * N


def test_buffers() -> None:
    modules = [nn.BatchNorm1d(2) for _ in range(N)]
    for r, module in enumerate(modules):
        module.running_mean += r
        module.num_batches_tracked += 10 * r
    everywhere(lambda rounds, r: average_buffers(modules[r], rounds))
    for module in modules:
        assert module.running_mean.tolist() == [1.0, 1.0]
        assert int(module.num_batches_tracked) == 20
