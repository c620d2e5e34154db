"""The ranks of one member step with the mean of their gradients, whichever of them has one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_async.algorithms import common_step
from lightning_async.algorithms.common_step import CommonStep
from lightning_async.replica import Replica
from lightning_async.transport.mail import Message
from lightning_async.transport.siblings import PART, Siblings
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


# -- beside backward ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Four layers of one size, the last of which may be left out, and what `watch` says when backward ends."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def loss(self, rank: int, turn: int, use: int = 4) -> Tensor:
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * turn + rank))
        for layer in self.layers[:use]:
            x = torch.tanh(layer(x))
        return x.square().sum()


Backward = Callable[[Net, int, int], None]


def plain(net: Net, rank: int, turn: int) -> None:
    net.loss(rank, turn).backward()


class Watched:
    """A carrier, and what was posted through it."""

    def __init__(self, carrier: Any) -> None:
        self._carrier, self.posted = carrier, list[int]()

    def post(self, peer: int, message: Message) -> bool:
        done: bool = self._carrier.post(peer, message)
        self.posted += [message.kind] * done
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)


def steps(n: int, backward: Backward, *, beside: bool, sent: list[int] | None = None) -> list[list[Any]]:
    """The gradients of each rank after each of three steps, the second of which adds to those of the first."""
    cluster, ranks = VirtualCluster(n), tuple(range(n))

    def life(rank: int) -> Any:
        net, step, found = Net(), CommonStep(), []
        watched: Any = Watched(cluster.carriers[rank])
        replica, siblings = Replica(net.parameters()), Siblings(watched, ranks)
        if sent is not None:
            first: Any = net.layers[0].weight
            first.register_hook(lambda _: sent.append(watched.posted.count(PART)))
        for turn in range(3):
            if turn != 1:
                net.zero_grad()
            with step.beside(replica, siblings.average) if beside else nullcontext():
                backward(net, rank, turn)
            yield from step.average(replica, siblings.average)
            found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
        return found

    ends = cluster.run({rank: life(rank) for rank in ranks})
    return [ends[rank] for rank in ranks]


def equal(some: list[list[Any]], others: list[list[Any]]) -> bool:
    pairs = zip(*([g for rank in ranks for step in rank for g in step] for ranks in (some, others)), strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_step, "BUCKET", 100)


@pytest.mark.usefixtures("small_buckets")
def test_the_first_bucket_leaves_before_backward_has_ended() -> None:
    sent: list[int] = []
    steps(2, plain, beside=True, sent=sent)
    assert len(sent) == 6
    assert max(sent[:2]) >= 1  # the first bucket's owner sends none of it
    steps(2, plain, beside=False, sent=(late := []))
    assert late[:2] == [0, 0]


@pytest.mark.usefixtures("small_buckets")
def test_a_sibling_that_is_behind_is_not_waited_for_in_backward() -> None:
    cluster, net = VirtualCluster(2), Net()
    step, replica = CommonStep(), Replica(net.parameters())
    siblings = Siblings(cluster.carriers[0], (0, 1))
    with step.beside(replica, siblings.average):
        plain(net, 0, 0)
    assert "rank 1, of the same member, in average 1" in next(step.average(replica, siblings.average))


def leaves_out(net: Net, rank: int, turn: int) -> None:
    net.loss(rank, turn, use=2 + (rank == turn)).backward()


def twice(net: Net, rank: int, turn: int) -> None:
    plain(net, rank, turn)
    if rank == 0:
        plain(net, rank, turn + 1)


def scales_afterwards(net: Net, rank: int, turn: int) -> None:
    plain(net, rank, turn)
    if rank == 1:
        net.layers[3].bias.grad *= 3.0  # type: ignore[operator]


def takes_away_afterwards(net: Net, rank: int, turn: int) -> None:
    plain(net, rank, turn)
    net.layers[3].bias.grad = None


def freezes(net: Net, rank: int, turn: int) -> None:
    net.layers[turn].requires_grad_(False)
    plain(net, rank, turn)
    net.layers[turn].requires_grad_(True)


def nothing(net: Net, rank: int, turn: int) -> None:
    """No loss in this batch."""


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("bucket", [1, 100, 300, 1 << 22])
@pytest.mark.parametrize(
    "backward", [plain, leaves_out, twice, scales_afterwards, takes_away_afterwards, freezes, nothing]
)
def test_beside_backward_gradients_are_the_same_to_the_bit(
    backward: Backward, bucket: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(n, backward, beside=False)
    monkeypatch.setattr(common_step, "BUCKET", bucket)
    assert equal(steps(n, backward, beside=True), expected)
    assert len({str(found) for found in expected}) == 1


@pytest.mark.usefixtures("small_buckets")
def test_an_error_in_backward_is_its_own_and_leaves_no_hooks() -> None:
    cluster, net = VirtualCluster(1), Net()
    step, siblings = CommonStep(), Siblings(cluster.carriers[0], (0,))

    def fails() -> None:
        with step.beside(Replica(net.parameters()), siblings.average):
            plain(net, 0, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


# -- where the weights are not in host memory --------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Weights on the meta device stand for those on a GPU: what is copied from there has no numbers.

    Attributes:
        made: The bytes of each memory that was made, there and in host memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, list[int]] = {"meta": [], "cpu": []}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if function is torch.ops.aten._to_copy.default and args[0].is_meta:
            function, args, kwargs = torch.ops.aten.zeros.default, (args[0].shape,), {"dtype": args[0].dtype}
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.untyped_storage()._cdata not in known:
            self.made[found.device.type].append(found.nbytes)
        return found


def test_off_the_cpu_there_is_one_vector_there_and_one_in_host_memory_and_no_step_makes_another() -> None:
    cluster, steps = VirtualCluster(2), [CommonStep(), CommonStep()]
    nets = [nn.Linear(100, 100, device="meta") for _ in steps]
    replicas = [Replica(net.parameters()) for net in nets]
    for parameter in [p for net in nets for p in net.parameters()]:
        parameter.grad = torch.zeros_like(parameter)

    def life(rank: int) -> Any:
        siblings = Siblings(cluster.carriers[rank], (0, 1))
        for _ in range(3):
            yield from steps[rank].average(replicas[rank], siblings.average)

    with Sizes() as sizes:
        cluster.run({rank: life(rank) for rank in (0, 1)})
    whole = replicas[0].numel * 4
    for there in ("meta", "cpu"):
        assert len([size for size in sizes.made[there] if size >= whole]) == 2, there


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused() -> None:
    cluster, layer = VirtualCluster(1), nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"a gradient is sparse, .* or leave `inner` out"):
        cluster.run({0: CommonStep().average(Replica(layer.parameters()), Siblings(cluster.carriers[0], (0,)).average)})
