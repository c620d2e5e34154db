"""The mean of all replicas' gradients, the same bits on each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.pipeline.edge import LostStageError
from lightning_async.pipeline.replicas import Replicas
from lightning_async.transport.mail import Message
from lightning_async.transport.virtual import VirtualCluster


def _parameters(rank: int) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    found[0].grad = torch.full((2, 3), float(rank + 1))
    if rank == 1:
        found[1].grad = torch.ones(4)
    return found


def _average(replicas: Replicas, parameters: list[nn.Parameter], times: int) -> Any:
    for _ in range(times):
        yield 0.01
        yield from replicas.average(parameters)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_mean_on_all(n: int) -> None:
    cluster = VirtualCluster(n)
    parameters = [_parameters(rank) for rank in range(n)]
    programs = {r: _average(Replicas(cluster.carriers[r], range(n)), parameters[r], 3) for r in range(n)}
    cluster.run(programs)
    for mine in parameters:
        assert mine[0].grad is not None
        assert torch.equal(mine[0].grad, torch.full((2, 3), sum(range(1, n + 1)) / n))
        assert mine[2].grad is None
    if n > 1:
        assert all(torch.equal(p[1].grad, parameters[0][1].grad) for p in parameters)  # type: ignore[arg-type]
        assert float(parameters[0][1].grad[0]) == pytest.approx(1 / n)  # type: ignore[index]


def test_the_mean_is_as_exact_as_the_widest_of_the_weights() -> None:
    cluster = VirtualCluster(2)
    parameters = [
        [nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16, torch.float32)]
        for _ in range(2)
    ]
    for rank, mine in enumerate(parameters):
        mine[0].grad = torch.full((4,), (2 * rank + 1) / 7, dtype=torch.float64)
        mine[2].grad = torch.ones(4)
    cluster.run({r: _average(Replicas(cluster.carriers[r], range(2)), parameters[r], 1) for r in range(2)})
    for wide, narrow, single in parameters:
        assert wide.grad.tolist() == [(1 / 7 + 3 / 7) / 2] * 4  # type: ignore[union-attr]
        assert (wide.grad.dtype, narrow.grad) == (torch.float64, None)  # type: ignore[union-attr]
        assert (single.grad.dtype, single.grad.tolist()) == (torch.float32, [1.0] * 4)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_frozen_ones_of_other_kinds_are_left_out(dtype: torch.dtype) -> None:
    cluster = VirtualCluster(2)
    parameters = [[nn.Parameter(torch.ones(3).to(dtype), requires_grad=False), *_parameters(r)] for r in range(2)]
    cluster.run({r: _average(Replicas(cluster.carriers[r], range(2)), parameters[r], 1) for r in range(2)})
    for frozen, first, *_ in parameters:
        assert frozen.grad is None
        assert first.grad is not None
        assert torch.equal(first.grad, torch.full((2, 3), 1.5))


def _buffers(rank: int) -> list[Tensor]:
    counted, mean = torch.tensor([rank, 7, -rank]), torch.full((2, 2), rank / 3)
    return [counted, mean, torch.tensor(rank == 1), torch.full((3,), 0.1, dtype=torch.bfloat16), torch.zeros(0)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_buffers_become_the_mean_and_counts_the_largest(n: int) -> None:
    """Between two averages of gradients, and where a graph holds the old ones."""
    cluster = VirtualCluster(n)
    buffers, parameters = ([kind(rank) for rank in range(n)] for kind in (_buffers, _parameters))
    before = [found[1].detach() for found in buffers]

    def life(rank: int) -> Any:
        replicas = Replicas(cluster.carriers[rank], range(n))
        for _ in range(2):
            yield from replicas.average(parameters[rank])
            yield 0.01 * rank
            yield from replicas.average_buffers({str(at): b for at, b in enumerate(buffers[rank])})

    cluster.run({rank: life(rank) for rank in range(n)})
    for counted, mean, flag, narrow, _ in buffers:
        assert counted.tolist() == [n - 1, 7, 0]
        assert torch.equal(mean, torch.full((2, 2), sum(range(n)) / 3 / n))
        assert bool(flag) is (n > 1)
        assert torch.equal(narrow, torch.full((3,), 0.1, dtype=torch.bfloat16))
    assert all(torch.equal(old, torch.full((2, 2), rank / 3)) for rank, old in enumerate(before))
    assert parameters[0][0].grad is not None


def _evened(has: list[dict[str, Tensor]]) -> None:
    """Twice, beside averages of gradients."""
    cluster, n = VirtualCluster(len(has)), len(has)

    def life(rank: int) -> Any:
        replicas = Replicas(cluster.carriers[rank], range(n))
        for _ in range(2):
            yield from replicas.average(_parameters(rank))
            yield from replicas.average_buffers(has[rank])

    cluster.run({rank: life(rank) for rank in range(n)})


@pytest.mark.parametrize("lacks", [0, 1])
def test_nobody_waits_for_buffers_that_another_does_not_have(lacks: int) -> None:
    """Registered in a forward pass, for some batches only."""
    has: list[dict[str, Tensor]] = [{"late": torch.ones(2)} for _ in range(2)]
    del has[lacks]["late"]
    with pytest.warns(UserWarning, match=r"unlike buffers \(`late`\): each keeps its own") as said:
        _evened(has)
    assert len(said) == 1
    assert has[1 - lacks]["late"].tolist() == [1.0, 1.0]


def test_each_keeps_its_own_of_unlike_buffers_and_the_others_are_averaged() -> None:
    """A cache that grows with the longest batch, and one of another dtype; they may come in another order."""
    has = [
        {"cache": torch.full((2 + r,), r), "mean": torch.full((3,), float(r)), "kind": torch.ones(1).to(dtype)}
        for r, dtype in enumerate((torch.float32, torch.bfloat16))
    ]
    has[1] = {name: has[1][name] for name in ("mean", "kind", "cache")}
    with pytest.warns(UserWarning, match=r"\(`cache`, `kind`\)") as said:
        _evened(has)
    assert len(said) == 1
    assert [mine["cache"].tolist() for mine in has] == [[0, 0], [1, 1, 1]]
    assert [mine["mean"].tolist() for mine in has] == [[0.5] * 3] * 2
    assert has[1]["kind"].dtype == torch.bfloat16


def test_buffers_travel_as_wide_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of bytes is not eight times as much on its way."""
    has = [{"mask": torch.ones(10_000, dtype=torch.bool), "cos": torch.ones(10_000, dtype=torch.bfloat16)}] * 2
    cluster, sent = VirtualCluster(2), list[int]()
    post = cluster.carriers[0].post

    def weighed(peer: int, message: Message) -> bool:
        sent.append(0 if message.body is None else message.body.nbytes)
        return post(peer, message)

    monkeypatch.setattr(cluster.carriers[0], "post", weighed)
    cluster.run({r: Replicas(cluster.carriers[r], range(2)).average_buffers(has[r]) for r in range(2)})
    assert max(sent) == 10_000 + 20_000


def test_a_pipeline_that_rests_where_another_trains_on_is_named() -> None:
    """Its data ended before the other's."""
    cluster = VirtualCluster(2)
    trains, rests = (Replicas(cluster.carriers[r], range(2)) for r in range(2))
    with pytest.raises(RuntimeError, match=r"rank \d averages .* where rank \d averages .*trains on"):
        cluster.run({0: trains.average(_parameters(0)), 1: rests.average_buffers({"mean": torch.ones(1)})})


def test_a_dead_replica_is_named() -> None:
    cluster = VirtualCluster(2, silence=0.5, patience=1.0)
    cluster.kill(1, at=0.1)
    with pytest.raises(LostStageError, match="rank 1 died"):
        cluster.run({r: _average(Replicas(cluster.carriers[r], range(2)), _parameters(r), 50) for r in range(2)})
