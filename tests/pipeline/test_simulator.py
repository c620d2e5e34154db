"""The laws of the method, in one process: one stage is plain training, and a late gradient is the one it should be."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lightning_async.pipeline.schedule import Order, delay, schedule
from lightning_async.pipeline.stash import Semantics
from tests.pipeline.nets import (
    MakeOptimizer,
    Net,
    adam,
    data,
    frozen,
    noisy_blocks,
    plain_blocks,
    sgd,
    train_by_table,
    train_plainly,
    works,
)

BATCHES = 9


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("make", [sgd, adam])
def test_one_stage_is_plain_training_to_the_bit(make: MakeOptimizer, every: int) -> None:
    plain, piped = Net(noisy_blocks(), 1, make), Net(noisy_blocks(), 1, make)
    assert train_by_table(piped, data(BATCHES), every=every) == train_plainly(plain, data(BATCHES), every=every)
    assert _equal(piped.weights(), plain.weights())


@pytest.mark.parametrize("semantics", ["stash", "recompute", "hybrid"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_with_lr_0_gradients_are_the_ordinary_ones_times_beta_to_the_power_of_the_hops(
    stages: int, beta: float, semantics: Semantics
) -> None:
    plain, piped = Net(noisy_blocks(), stages, frozen), Net(noisy_blocks(), stages, frozen, {"semantics": semantics})
    train_plainly(plain, data(BATCHES, last=3))
    train_by_table(piped, data(BATCHES, last=3), shrink=beta)
    for stage in range(stages):
        factor = beta ** (stages - 1 - stage)
        expected = [[g * factor for g in one] for one in plain.gradients(stage)]
        assert all(_equal(a, b) for a, b in zip(piped.gradients(stage), expected, strict=True))
        assert len(piped.gradients(stage)) == BATCHES
    assert _equal(piped.weights(), plain.weights())  # statistics too: each batch is seen once


@pytest.mark.parametrize("order", ["update_first", "forward_first"])
def test_who_works_when(order: Order) -> None:
    assert works(3, BATCHES, order=order) == list(schedule(3, BATCHES, order=order))


@pytest.mark.parametrize("order", ["update_first", "forward_first"])
def test_no_more_graphs_than_the_delay_and_none_in_the_end(order: Order) -> None:
    net = Net(plain_blocks(), 3)
    train_by_table(net, data(BATCHES), order=order)
    assert [len(stage.stash) for stage in net.places] == [0, 0, 0]
    extra = int(order == "forward_first")
    assert [stage.stash.most for stage in net.places] == [4 + extra, 2 + extra, 0]


class Oracle:
    """Replays each batch through the recorded weights, with the recorded gradient from behind."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.weights: dict[tuple[int, int], list[Tensor]] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.errors: list[tuple[int, int]] = []
        for stage in net.places[:-1]:
            self._watch(stage)

    def _watch(self, stage: object) -> None:
        forward, backward = stage.forward, stage.backward  # type: ignore[attr-defined]
        index: int = stage.index  # type: ignore[attr-defined]
        chain = self.net.chains[index]

        def recorded_forward(batch: int, x: Tensor, compute: object, *, step: int = 0) -> Tensor:
            self.weights[index, batch] = [p.detach().clone() for p in chain.parameters()]
            self.inputs[index, batch] = x.detach().clone()
            return forward(batch, x, compute, step=step)  # type: ignore[no-any-return]

        def checked_backward(batch: int, gradient: Tensor, factor: float = 1.0) -> Tensor | None:
            entering = backward(batch, gradient, factor)
            expected = self._gradients(index, batch, gradient * factor)
            got = [sum_ for sum_ in stage._sums if sum_ is not None]  # type: ignore[attr-defined]
            if entering is not None:
                got.append(entering)
            self.errors += [(index, batch)] * (not _equal(got, expected))
            return entering  # type: ignore[no-any-return]

        stage.forward, stage.backward = recorded_forward, checked_backward  # type: ignore[attr-defined]

    def _gradients(self, index: int, batch: int, gradient: Tensor) -> list[Tensor]:
        chain = copy.deepcopy(self.net.chains[index])
        x = self.inputs[index, batch].requires_grad_()
        for p, old in zip(chain.parameters(), self.weights[index, batch], strict=True):
            p.grad, p.data = None, old
        torch.manual_seed(1000 * batch + index)
        wanted = [*chain.parameters(), *([x] if index else [])]
        return list(torch.autograd.grad(chain(x.view_as(x)), wanted, gradient))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("blocks", [plain_blocks, noisy_blocks])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_stashed_gradient_is_the_oracles(stages: int, blocks: object, make: MakeOptimizer) -> None:
    net = Net(blocks(), stages, make)  # type: ignore[operator]
    oracle = Oracle(net)
    train_by_table(net, data(BATCHES), shrink=0.5)
    assert oracle.errors == []
    assert len(oracle.weights) == (stages - 1) * BATCHES


@pytest.mark.parametrize("semantics", ["recompute", "hybrid"])
def test_the_oracle_sees_a_gradient_of_other_weights(semantics: Semantics) -> None:
    net = Net(plain_blocks(), 3, sgd, {"semantics": semantics})
    oracle = Oracle(net)
    train_by_table(net, data(BATCHES))
    assert oracle.errors


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_first_update_of_a_stage_comes_with_its_first_gradient(stages: int) -> None:
    begun: dict[int, int] = {}
    net = Net(plain_blocks(), stages)
    start = [net.chains[s][0].state_dict() for s in range(stages)]
    start = [{k: v.clone() for k, v in state.items()} for state in start]

    def watch(work: object) -> None:
        for stage in range(stages):
            moved = any(not torch.equal(v, start[stage][k]) for k, v in net.chains[stage][0].state_dict().items())
            if moved:
                begun.setdefault(stage, work.tick)  # type: ignore[attr-defined]

    train_by_table(net, data(BATCHES), watch=watch)
    assert begun == {s: 2 * stages - (s + 1) for s in range(stages) if net.chains[s][0].state_dict()}


@pytest.mark.parametrize(("order", "less"), [("update_first", 1), ("forward_first", 0)])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_updates_between_a_batchs_two_passes(every: int, order: Order, less: int) -> None:
    """Every `every` batches there is one, so of a delay of d batches about d / every are left (ADL)."""
    stages, batches, launched, seen = 3, 24, {}, Counter()
    late: dict[int, list[int]] = {0: [], 1: []}

    def watch(work: object) -> None:
        _, stage, direction, batch = work  # type: ignore[misc]
        if direction == "F":
            launched[stage, batch] = seen[stage]
        elif stage < stages - 1:
            applied = sum(1 for at, _ in net.seen if at == stage)
            late[stage].append(applied - launched[stage, batch] - (batch % every == 0))
            seen[stage] = applied

    net = Net(plain_blocks(), stages)
    train_by_table(net, data(batches), every=every, order=order, watch=watch)
    for stage, delays in late.items():
        d = delay(stage, stages) - less
        assert set(delays[d : batches - d]) <= {d // every, -(-d // every)}


def test_beta_is_a_learning_rate_for_sgd_and_nothing_for_adam() -> None:
    def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.05, momentum=0.9)

    slower, shrunk = Net(plain_blocks(), 3, momentum), Net(plain_blocks(), 3, momentum)
    for stage, optimizer in enumerate(slower.optimizers):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (2 - stage)
    train_by_table(slower, data(BATCHES))
    train_by_table(shrunk, data(BATCHES), shrink=0.5)
    for a, b in zip(slower.weights(), shrunk.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def tiny(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, 0.01, eps=1e-30)

    one, half = Net(plain_blocks(), 3, tiny), Net(plain_blocks(), 3, tiny)
    train_by_table(one, data(BATCHES))
    train_by_table(half, data(BATCHES), shrink=0.5)
    for a, b in zip(one.weights(), half.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
