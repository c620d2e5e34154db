"""Half-precision parameters: shifts add up exactly in float32, however small; the parameters are their rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_async.algorithms.adam import SecondMoment
from lightning_async.replica import Replica

HALF = [torch.bfloat16, torch.float16]
START = torch.randn(40, generator=torch.Generator().manual_seed(0))


def module(dtype: torch.dtype) -> nn.ParameterList:
    values = START.to(dtype)
    return nn.ParameterList([nn.Parameter(values[:25].clone()), nn.Parameter(values[25:].clone())])


def shown(parameters: nn.ParameterList) -> Tensor:
    return torch.cat([p.detach() for p in parameters])


def values(replica: Replica) -> Tensor:
    """The flat vector without its padding."""
    return torch.cat([replica.flat[:25], replica.flat[32:47]])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_the_sum_of_shifts_is_that_of_a_float32_twin_to_the_bit(dtype: torch.dtype, size: float) -> None:
    halves = module(dtype)
    twin = nn.ParameterList([nn.Parameter(p.detach().float()) for p in halves])
    one, other = Replica(halves), Replica(twin)
    assert one.flat.dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        shift = size * (1 + torch.randn(one.numel, generator=generator))
        one.shift(shift, 0.7)
        other.shift(shift, 0.7)
        assert torch.equal(one.flat, other.flat)
        assert torch.equal(shown(halves), shown(twin).to(dtype))


def test_small_shifts_move_the_parameters_in_the_end() -> None:
    halves, alone = module(torch.bfloat16), module(torch.bfloat16)
    replica, before = Replica(halves), shown(halves).clone()
    for _ in range(1000):
        replica.shift(torch.full((replica.numel,), 1e-4))
        with torch.no_grad():
            for p in alone:
                p.add_(1e-4)
    torch.testing.assert_close(shown(halves).float(), before.float() + 0.1, rtol=2**-8, atol=1e-4)
    assert torch.equal(shown(alone)[before.abs() > 0.1], before[before.abs() > 0.1])  # what would happen without


def states(optimizer: torch.optim.Optimizer) -> list[tuple[str, Any]]:
    """All that it remembers, in its order."""
    tensors = [t for one in optimizer.state_dict()["state"].values() for t in one.values() if t is not None]
    return [(str(t.dtype), t.tolist()) for t in tensors]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-6),
    "momentum": partial(torch.optim.SGD, lr=1e-7, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-6),
    "adamw": partial(torch.optim.AdamW, lr=1e-6, foreach=False),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_below_the_last_place_are_those_of_a_float32_twin_to_the_bit(dtype: torch.dtype, name: str) -> None:
    """Fed with the same gradients, widened: weights and state, also where steps are stretched as on one of 2 ranks."""
    halves = module(dtype)
    twin = nn.ParameterList([nn.Parameter(p.detach().float()) for p in halves])
    one, other = Replica(halves), Replica(twin)
    mine, theirs = OPTIMIZERS[name](halves.parameters()), OPTIMIZERS[name](twin.parameters())
    moments = [SecondMoment(o) for o in (mine, theirs) if SecondMoment.concerns(o)]
    generator, before = torch.Generator().manual_seed(4), values(one)
    for _ in range(100):
        gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in halves]
        for p, wide, gradient in zip(halves, twin, gradients, strict=True):
            p.grad, wide.grad = gradient, gradient.float()
        with one.widened(halves):
            mine.step()
        theirs.step()
        with one.widened(halves, gradients=False):
            for moment in moments:
                moment.stretch(2)
        assert torch.equal(one.flat, other.flat)
        assert torch.equal(shown(halves), shown(twin).to(dtype))
        assert all(p.grad is gradient for p, gradient in zip(halves, gradients, strict=True))
    assert not torch.equal(values(one), before)
    assert torch.equal(shown(halves)[before.abs() > 0.5], before[before.abs() > 0.5].to(dtype)), "not a place yet"
    assert states(mine) == states(theirs)
    assert {dtype for dtype, _ in states(mine)} <= {"torch.float32"}


def test_only_what_is_stepped_is_widened_and_looking_changes_nothing() -> None:
    halves = module(torch.bfloat16)
    replica = Replica(halves)
    replica.shift(torch.full((replica.numel,), 1e-5))
    before = values(replica)
    with replica.widened([halves[0]]):
        assert [p.dtype for p in halves] == [torch.float32, torch.bfloat16]
        assert torch.equal(halves[0], before[:25])
        assert torch.equal(values(replica), before)
        with replica.widened(halves):
            assert [p.dtype for p in halves] == [torch.float32, torch.float32]
        assert [p.dtype for p in halves] == [torch.float32, torch.bfloat16]
        replica.shift(torch.full((replica.numel,), 1e-5))
        assert torch.equal(halves[0], before[:25] + 1e-5)
    assert [p.dtype for p in halves] == [torch.bfloat16, torch.bfloat16]
    assert torch.equal(values(replica), before + 1e-5)
    assert torch.equal(shown(halves), values(replica).bfloat16())


def test_what_others_did_to_a_parameter_is_there_when_it_is_widened() -> None:
    halves = module(torch.bfloat16)
    replica = Replica(halves)
    replica.shift(torch.full((replica.numel,), 1e-5))
    exact = values(replica)
    with torch.no_grad():
        for p in halves:
            p.mul_(2)
    moved = shown(halves).float() - exact.bfloat16().float()
    with replica.widened(halves):
        torch.testing.assert_close(shown(halves), exact + moved, rtol=0, atol=1e-6)


def test_an_optimizer_that_replaces_the_data_steps_the_parts_too() -> None:
    halves = module(torch.bfloat16)
    replica, before = Replica(halves), START.bfloat16().float()
    with replica.widened(halves):
        for p in halves:
            p.data = p.data - 1e-6
    assert torch.equal(values(replica), before - 1e-6)
    assert torch.equal(shown(halves), (before - 1e-6).bfloat16())


def test_what_is_done_to_gradients_in_a_step_stays_done() -> None:
    halves = nn.ParameterList([nn.Parameter(torch.ones(2).bfloat16()) for _ in range(4)])
    for p in halves:
        p.grad = torch.ones(2).bfloat16()
    replica = Replica(halves)
    with replica.widened(halves):
        cleared, zeroed, replaced, _ = halves
        cleared.grad = None
        zeroed.grad.zero_()  # type: ignore[union-attr]
        replaced.grad = torch.full((2,), 3.0)
    assert halves[0].grad is None
    assert [p.grad.tolist() for p in halves[1:]] == [[0, 0], [3, 3], [1, 1]]  # type: ignore[union-attr]
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in halves)


def test_backward_goes_on_as_before() -> None:
    """Its hooks are called, and gradients add up in the parameters' own precision."""
    weight, called = nn.Parameter(torch.ones(3).bfloat16()), list[torch.dtype]()
    weight.register_post_accumulate_grad_hook(lambda p: called.append(p.dtype))  # type: ignore[no-untyped-call]
    replica = Replica([weight])
    for times in (1, 2):
        (2 * weight).sum().backward()
        with replica.widened([weight]):
            pass
        assert weight.grad is not None
        assert (weight.grad.dtype, weight.grad.tolist()) == (torch.bfloat16, [2.0 * times] * 3)
    assert called == [torch.bfloat16] * 2


def test_where_more_is_trained_from_now_on_no_part_is_rounded() -> None:
    halves = module(torch.bfloat16)
    halves[0].requires_grad_(False)
    old = Replica(halves)
    old.shift(torch.full((old.numel,), 1e-5))
    exact = old.weights()
    halves[0].requires_grad_(True)
    new = Replica(halves)
    assert not torch.equal(new.parts(new.flat)[1], exact[:15])
    new.take_over(exact, old)
    assert torch.equal(new.parts(new.flat)[1], exact[:15])
    assert torch.equal(new.parts(new.flat)[0], START[:25].bfloat16().float())
    assert torch.equal(shown(halves)[25:], exact[:15].bfloat16())


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_written_into_a_parameter_is_carried_over_as_a_difference(dtype: torch.dtype) -> None:
    halves = module(dtype)
    replica = Replica(halves)
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(halves.parameters(), 0.3)
    for _ in range(50):
        replica.shift(1e-4 * torch.randn(replica.numel, generator=generator))
        wide, narrow = values(replica).double(), shown(halves).double()
        for p in halves:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
        moved = shown(halves).double() - narrow
        torch.testing.assert_close(values(replica).double(), wide + moved, rtol=0, atol=1e-6)
        assert torch.equal(shown(halves), values(replica).to(dtype))


def test_reading_changes_nothing() -> None:
    halves = module(torch.bfloat16)
    replica = Replica(halves)
    replica.shift(1e-3 * torch.randn(replica.numel, generator=torch.Generator().manual_seed(3)))
    first, parameters = replica.weights(), shown(halves)
    for _ in range(3):
        assert torch.equal(replica.weights(), first)
        assert torch.equal(shown(halves), parameters)


def test_own_weights_come_back_to_the_bit() -> None:
    halves = module(torch.bfloat16)
    replica = Replica(halves)
    replica.shift(torch.full((replica.numel,), 1e-5))
    own, parameters = replica.weights(), shown(halves)
    replica.stand_in(torch.ones(replica.numel))
    assert torch.equal(shown(halves), torch.ones(40, dtype=torch.bfloat16))
    replica.come_back()
    assert torch.equal(replica.flat, own)
    assert torch.equal(shown(halves), parameters)


def test_replaced_data_are_carried_over() -> None:
    halves = module(torch.bfloat16)
    replica = Replica(halves)
    for p in halves:
        p.data = p.data + 1
    wanted = shown(halves).clone()
    replica.shift(torch.zeros(replica.numel))
    torch.testing.assert_close(shown(halves), wanted, rtol=2**-7, atol=0)
    assert torch.equal(shown(halves), values(replica).bfloat16())


def test_a_float32_head_on_a_half_precision_body() -> None:
    net = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 1))
    body, head = net[0].weight.detach().float(), net[1].weight.detach().clone()
    replica = Replica(net.parameters())
    for _ in range(100):
        replica.shift(torch.full((replica.numel,), 1e-5))
    torch.testing.assert_close(net[1].weight.detach(), head + 1e-3, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(net[0].weight.detach().float(), body + 1e-3, rtol=2**-8, atol=1e-5)
    assert net[0].weight.dtype == torch.bfloat16
    assert net[1].weight.data_ptr() == replica.flat[32:].data_ptr()  # 16 for the weight, 16 for the bias


def test_autograd_takes_no_notice() -> None:
    """As with views: between two backward passes of one batch a shift is no error."""
    weight = nn.Parameter(torch.ones(3).bfloat16())
    replica = Replica([weight])
    loss = (weight * weight).sum()
    replica.shift(torch.zeros(replica.numel))
    loss.backward()
    assert weight.grad is not None


class Copies(TorchDispatchMode):
    """Counts what moves or adds up numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in str(func) for word in ("copy", "add", "sub"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [True, False])
def test_widening_many_parameters_takes_no_more_calls_than_a_few(gradients: bool) -> None:
    counts = []
    for n in (2, 20):
        halves = nn.ParameterList([nn.Parameter(torch.ones(3).bfloat16()) for _ in range(n)])
        replica = Replica(halves)
        for p in halves:
            p.grad = torch.ones(3).bfloat16()
        with Copies() as copies, replica.widened(halves, gradients=gradients):
            pass
        counts.append(copies.count)
    assert counts[0] == counts[1] > 0


def test_a_sparse_gradient_is_widened_too() -> None:
    table = nn.Embedding(4, 2, sparse=True).bfloat16()
    replica = Replica(table.parameters())
    before = replica.weights()
    table(torch.tensor([1])).sum().backward()
    with replica.widened(table.parameters()):
        torch.optim.SGD(table.parameters(), 1e-5).step()
    assert torch.equal(replica.weights()[2:4], before[2:4] - 1e-5)
    assert torch.equal(replica.weights()[4:], before[4:])
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
