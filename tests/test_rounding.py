"""Half-precision parameters: shifts add up exactly in float32, however small; the parameters are their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize("dtype", HALF)
def test_a_step_of_the_optimizer_is_carried_over_as_a_difference(dtype: torch.dtype) -> None:
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
