"""A replica: reads copy, writes add, parameters are views, own weights come back to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_async.replica import Replica


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1, bias=False))


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_flattening_changes_no_weight_and_parameters_are_views() -> None:
    module, before = net(), flat(net())
    replica = Replica(module.parameters())
    assert torch.equal(flat(module), before)
    replica.shift(torch.ones(replica.numel), 0.5)
    assert torch.equal(flat(module), before + 0.5)
    assert all(p.data_ptr() % 64 == replica.flat.data_ptr() % 64 for p in module.parameters())


def test_reads_copy() -> None:
    replica = Replica(net().parameters())
    copy = replica.weights()
    replica.shift(torch.ones(replica.numel))
    assert torch.equal(copy + 1, replica.flat)


def test_steps_of_an_optimizer_are_seen_and_padding_stays_zero() -> None:
    module = net()
    replica = Replica(module.parameters())
    before = replica.weights()
    module(torch.randn(4, 3)).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert not torch.equal(before, replica.flat)
    assert replica.flat.count_nonzero() <= sum(p.numel() for p in module.parameters())


def test_frozen_and_tied_parameters() -> None:
    module = net()
    module[1].requires_grad_(False)
    module.tied = module[0]
    assert Replica(module.parameters()).flat.count_nonzero() == 20


def test_views_that_were_broken_are_mended_with_the_new_weights() -> None:
    module = net()
    replica = Replica(module.parameters())
    for p in module.parameters():
        p.data = p.data.clone() + 1
    wanted = flat(module)
    replica.shift(torch.ones(replica.numel))
    assert torch.equal(flat(module), wanted + 1)


def test_own_weights_come_back_to_the_bit() -> None:
    module = net()
    replica = Replica(module.parameters())
    own = flat(module)
    replica.stand_in(torch.zeros(replica.numel))
    replica.stand_in(torch.ones(replica.numel))
    assert replica.away
    assert torch.equal(flat(module), torch.ones_like(own))
    replica.come_back()
    assert not replica.away
    assert torch.equal(flat(module), own)


def test_those_that_stay_are_the_own_ones() -> None:
    replica = Replica(net().parameters())
    replica.stand_in(torch.zeros(replica.numel))
    replica.stay()
    replica.come_back()
    assert not replica.flat.any()


def test_it_knows_what_it_was_made_of() -> None:
    module = net()
    replica = Replica(module.parameters())
    assert replica.holds(module.parameters())
    module[1].requires_grad_(False)
    assert not replica.holds(module.parameters())


def test_a_vector_is_carried_to_where_its_parameters_lie_now() -> None:
    module = net()
    module[0].requires_grad_(False)
    old = Replica(module.parameters())
    vector = torch.arange(float(old.numel)) + 1
    module[0].requires_grad_(True)
    module.append(nn.Linear(1, 1))
    new = Replica(module.parameters())
    thawed, thawed_bias, kept, *appended = new.parts(new.carried(vector, old))
    assert torch.equal(kept, vector[:5])
    assert not any(part.any() for part in (thawed, thawed_bias, *appended))


def test_a_module_that_is_converted_in_mid_run_is_refused() -> None:
    module = net()
    replica = Replica(module.parameters())
    module.bfloat16()
    with pytest.raises(ValueError, match=r"was torch.float32 on cpu when `fit` began, and is torch.bfloat16"):
        replica.check()


def test_weights_that_are_kept_aside_come_back_to_the_bit() -> None:
    module = net()
    replica = Replica(module.parameters())
    shown, own = flat(module), torch.rand(replica.numel)
    replica.keep_aside(own)
    assert replica.away
    assert torch.equal(flat(module), shown)
    assert torch.equal(replica.own, own)
    replica.come_back()
    assert torch.equal(replica.flat, own)
    with pytest.raises(ValueError, match=f"to keep aside have 3 elements, this replica {replica.numel}"):
        replica.keep_aside(torch.zeros(3))


BAD = [
    ([], "no trainable parameters"),
    (
        [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, device="meta"))],
        "one device, found cpu and meta: move them to one, or freeze those that stay",
    ),
    ([nn.Parameter(torch.zeros(1, dtype=torch.complex64))], "float32, float64, found torch.complex64"),
]


@pytest.mark.parametrize(("parameters", "sentence"), BAD)
def test_refusals(parameters: list[nn.Parameter], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Replica(parameters)
