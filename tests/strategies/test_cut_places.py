"""Where a state dict holds what is trained: by its memory, whatever it is called; what cannot be told is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_async.replica import Replica
from lightning_async.strategies.cut_places import averaged_places, places_of, shown

State = dict[str, Any]


class Net(nn.Module):
    """A tied layer, a frozen one, a transposed use, a normalisation, and what nobody else has."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, dtype=dtype), nn.Linear(3, 3, dtype=dtype)
        self.tied = self.second
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)


def as_it_is(state: State) -> None:
    """No hook."""


def renamed(state: State) -> None:
    """As of another package."""
    for name in list(state):
        state[f"model.{name}"] = state.pop(name)


def taken_apart(state: State) -> None:
    """Rows of a matrix, and its transpose."""
    weight = state.pop("first.weight")
    state["first.0"], state["first.1"], state["first.t"] = weight[:1], weight[1:], weight.t()


def copied(state: State) -> None:
    """Under their own names."""
    for name, value in state.items():
        state[name] = value.clone()


def halved(state: State) -> None:
    """And in half precision."""
    state["first.weight"] = state["first.weight"].half()
    state["norm.running_mean"] = state["norm.running_mean"].half()


def dropped(state: State) -> None:
    """What is frozen, and one that is not, need not be in it."""
    for name in ("first.bias", "frozen.weight"):
        del state[name]


def added(state: State) -> None:
    """Beside all that is trained."""
    state["metric.sum"], state["count"], state["text"] = torch.ones(3), torch.ones(3, dtype=torch.int64), "x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hook", [as_it_is, renamed, taken_apart, copied, halved, dropped, added])
def test_the_consensus_stands_wherever_the_weights_stood(hook: Callable[[State], None], dtype: torch.dtype) -> None:
    """The file is what the hook would have made of a module that is the consensus."""
    net = Net(dtype)
    with torch.no_grad():  # so that halves are exact
        for p in net.parameters():
            p.copy_(torch.randint(-8, 9, p.shape))
    replica = Replica(net.parameters())
    mine: State = dict(net.state_dict())
    hook(mine)
    places = places_of(net, replica, mine, "gossip_ring")
    buffers = {name: b for name, b in net.named_buffers() if b.is_floating_point()}
    averaged = averaged_places(buffers, net, mine)
    consensus, means = replica.weights().double() + 1, torch.cat([b + 2 for b in buffers.values()]).double()
    file = {name: value.clone() if isinstance(value, Tensor) else value for name, value in mine.items()}
    both = torch.cat([consensus, means])  # one vector, as of a cut: both of its halves begin where they begin
    file |= shown(both[: len(consensus)], places) | shown(both[len(consensus) :], averaged)
    with torch.no_grad():
        for p, _ in replica.places:
            p.add_(1)
        for b in buffers.values():
            b.add_(2)
    wanted: State = dict(net.state_dict())
    hook(wanted)
    assert file.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            assert (file[name].dtype, file[name].tolist()) == (value.dtype, value.tolist()), name


def unknown(state: State) -> None:
    """Beside all that is trained: a container of numbers."""
    state["more"] = {"of": [torch.ones(3)]}
    taken_apart(state)


@pytest.mark.parametrize("hook", [copied, halved, unknown])
@pytest.mark.parametrize("broken", [False, True])
def test_a_copy_is_one_whatever_it_rounds_off_and_of_what_is_no_number(
    hook: Callable[[State], None], broken: bool
) -> None:
    """Of weights as they come: what a half holds of them is not what they are."""
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape))
        if broken:
            net.first.weight[0, 0], net.first.bias[1] = torch.nan, torch.inf
    replica, state = Replica(net.parameters()), dict(net.state_dict())
    hook(state)
    places = places_of(net, replica, state, "gossip_ring")
    for name, value in shown(replica.weights().double(), places).items():
        assert value.dtype == state[name].dtype
        torch.testing.assert_close(value, state[name], rtol=0.0, atol=0.0, equal_nan=True)
    assert len(places) >= 6


def test_what_is_one_in_memory_is_one_in_the_file() -> None:
    net = Net()
    replica = Replica(net.parameters())
    file = shown(replica.weights(), places_of(net, replica, net.state_dict(), "gossip_ring"))
    assert file["second.weight"] is file["tied.weight"]


def averages(state: State) -> None:
    """Other numbers in the place of the weights: an average that somebody keeps."""
    state["first.weight"] = state["first.weight"] * 0.5


def fused(state: State) -> None:
    """Two in one, which is a copy of both."""
    state["both"] = torch.cat([state.pop("first.weight"), state.pop("second.weight")])


def renamed_copies(state: State) -> None:
    """Nothing says of which they are."""
    renamed(state)
    copied(state)


def partly_copied(state: State) -> None:
    """A row of the matrix, and a copy of the others."""
    weight = state.pop("first.weight")
    state["row"], state["others"] = weight[:1], weight[1:].clone()


def nested(state: State) -> None:
    """In a container of its own, of which its `on_load_checkpoint` knows."""
    state["net"] = {name: state.pop(name) for name in list(state)}


@pytest.mark.parametrize(
    ("hook", "entry"),
    [
        (averages, "first.weight"),
        (fused, "both"),
        (renamed_copies, "model.first.weight"),
        (partly_copied, "others"),
        (nested, "net"),
    ],
)
def test_what_a_hook_makes_of_the_weights_is_refused(hook: Callable[[State], None], entry: str) -> None:
    net = Net()
    with torch.no_grad():
        net.first.weight.fill_(1.0)
    replica, state = Replica(net.parameters()), dict(net.state_dict())
    hook(state)
    with pytest.raises(MisconfigurationException, match=rf"makes `{entry}` of what is trained.*Rename without a copy"):
        places_of(net, replica, state, "gossip_ring")
