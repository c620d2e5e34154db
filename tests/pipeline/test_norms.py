"""Where all have told, the norm of the whole is what was asked for; before, it is never below a stage's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async.pipeline.edge import ACTIVATIONS, Receiver, Sender
from lightning_async.pipeline.norms import Norms
from lightning_async.pipeline.place import Place
from lightning_async.transport.virtual import VirtualCluster
from tests.pipeline.nets import Net, data, frozen, plain_blocks

LIMIT = 0.01


def _clipped(stages: int, batches: list[Any], seconds: float) -> list[list[float]]:
    """The squared norm of each applied gradient, by stage; weights stay as they are."""
    net, cluster = Net(plain_blocks(), stages, frozen), VirtualCluster(stages, latency=0.004)
    ranks = list(reversed(range(stages)))
    found: list[list[float]] = [[] for _ in range(stages)]

    def life(index: int) -> Any:
        stage, chain = net.places[index], net.chains[index]

        def update() -> None:
            place.norms.clip(chain.parameters(), LIMIT)
            found[index].append(sum(float(p.grad.square().sum()) for p in chain.parameters() if p.grad is not None))

        place = Place(stage, cluster.carriers[ranks[index]], ranks, update=update)
        for batch, (x, y) in enumerate(batches, start=1):
            yield seconds * (1 + index)
            if not stage.last:
                yield from place.turn(batch, None if index else x, chain.__call__)
                continue
            entered, out = stage.enter(batch, (yield from place.arrived(batch)).tensor, chain.__call__)
            (out - y).square().mean().backward()
            yield from place.give_back(batch, entered.grad)
            update()
            stage.after_step()
        yield from place.drain()

    cluster.run({ranks[index]: life(index) for index in range(stages)})
    return found


@pytest.mark.parametrize("stages", [2, 3])
def test_the_norm_of_the_whole_is_what_was_asked_for(stages: int) -> None:
    found = _clipped(stages, data(1) * 14, 0.01)
    assert sum(norms[-1] for norms in found) == pytest.approx(LIMIT**2, rel=1e-3)
    assert all(norms[0] <= LIMIT**2 * 1.001 for norms in found)


def test_at_any_speed_the_same() -> None:
    assert _clipped(3, data(9), 0.01) == _clipped(3, data(9), 0.0)


def test_gradients_of_another_size_keep_their_direction() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    norms = Norms()
    parameter.grad = torch.tensor([3.0, 4.0])
    assert norms.clip([parameter], 10.0) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    norms.before, norms.behind = 24.0, 576.0
    assert norms.clip([parameter], 12.5) == 25.0
    torch.testing.assert_close(parameter.grad, torch.tensor([1.5, 2.0]))
    assert norms.clip([], 1.0) == pytest.approx(600**0.5)


def test_gradients_in_double_precision_are_clipped_in_it() -> None:
    wide, narrow = (torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16))
    wide.grad, narrow.grad = torch.full((2,), 1 / 3, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.bfloat16)
    norm = Norms().clip([wide, narrow], 1.0)
    assert norm == pytest.approx((2 / 9 + 8) ** 0.5, rel=1e-15)
    assert wide.grad.tolist() == pytest.approx([1 / 3 / (norm + 1e-6)] * 2, rel=1e-15)


@pytest.mark.parametrize("told", [0.0, 1.5, 1e30, 1e300, float("inf"), float("nan"), -float("nan")])
def test_what_is_told_beside_a_stamp_leaves_it_as_it_is(told: float) -> None:
    """The most that float32 can hold stands for more."""
    cluster = VirtualCluster(2)
    sender, receiver = (carrier for carrier in cluster.carriers)
    edge = Sender(sender, 1, ACTIVATIONS), Receiver(receiver, 0, ACTIVATIONS, ended=lambda: None)
    stamp = (1 << 32) - 1
    parcel = cluster.run({0: edge[0].send(1, torch.zeros(1), stamp, told), 1: edge[1].receive(1)})[1]
    assert parcel.stamp == stamp
    assert parcel.told == pytest.approx(min(told, 3e38), rel=1e-6, nan_ok=True)
