"""An edge gives back what was sent into it: every shape, in order, never more than its depth at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async.pipeline.edge import ACTIVATIONS, DEPTH, LostStageError, Receiver, Sender
from lightning_async.transport.virtual import VirtualCluster

SHAPES = [(), (0,), (3,), (2, 0, 3), (1, 2, 3, 4, 5, 6), (70000,)]


def _pair(cluster: VirtualCluster, **options: Any) -> tuple[Sender, Receiver]:
    sender, receiver = cluster.carriers
    return (
        Sender(sender, 1, ACTIVATIONS, **options),
        Receiver(receiver, 0, ACTIVATIONS, ended=lambda: None, **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_shape_comes_as_it_went(dtype: torch.dtype) -> None:
    cluster = VirtualCluster(2)
    sender, receiver = _pair(cluster)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES * 3]

    def send() -> Any:
        for batch, tensor in enumerate(tensors):
            yield from sender.send(batch, tensor, stamp=batch + 7)

    def receive() -> Any:
        got = []
        for batch in range(len(tensors)):
            got.append((yield from receiver.receive(batch)))
        return got

    parcels = cluster.run({0: send(), 1: receive()})[1]
    assert all(torch.equal(p.tensor, t) and p.tensor.shape == t.shape for p, t in zip(parcels, tensors, strict=True))
    assert [p.stamp for p in parcels] == [batch + 7 for batch in range(len(tensors))]


def test_a_full_queue_makes_its_sender_wait() -> None:
    cluster = VirtualCluster(2, limit=1.0)
    sender, _ = _pair(cluster)
    sent = []

    def send() -> Any:
        for batch in range(DEPTH + 1):
            yield from sender.send(batch, torch.zeros(2))
            sent.append(batch)

    with pytest.raises(Exception, match=f"rank 1 to take batch {DEPTH}"):
        cluster.run({0: send()})
    assert sent == list(range(DEPTH))


def test_bf16_on_the_wire_rounds_once() -> None:
    cluster = VirtualCluster(2)
    sender, receiver = _pair(cluster, wire="bf16")
    exact, x = torch.arange(4.0), torch.randn(4)

    def send() -> Any:
        yield from sender.send(1, exact)
        yield from sender.send(2, x)

    def receive() -> Any:
        one = yield from receiver.receive(1)
        two = yield from receiver.receive(2)
        return one.tensor, two.tensor

    one, two = cluster.run({0: send(), 1: receive()})[1]
    assert torch.equal(one, exact)
    assert torch.equal(two, x.bfloat16().float())


def test_too_many_dimensions() -> None:
    sender, _ = _pair(VirtualCluster(2))
    with pytest.raises(ValueError, match="at most 6 dimensions"):
        next(sender.send(1, torch.zeros([1] * 7)))


def test_another_batch_than_the_one_that_is_due() -> None:
    cluster = VirtualCluster(2)
    sender, receiver = _pair(cluster)
    with pytest.raises(LostStageError, match="rank 0 sent batch 2 where batch 1 was due"):
        cluster.run({0: sender.send(2, torch.zeros(1)), 1: receiver.receive(1)})


def test_what_was_sent_right_before_the_end_is_received() -> None:
    """The batch and the word that it was the last may both come between two looks of the receiver."""
    cluster = VirtualCluster(2)
    sender, receiver = cluster.carriers
    edge = Receiver(receiver, 0, ACTIVATIONS, ended=lambda: ended[0])
    ended: list[int | None] = [None]
    looks = 0
    take = receiver.take

    def late(kind: int) -> Any:
        nonlocal looks
        looks += 1
        if looks < 3:
            return []
        ended[0] = 1
        return take(kind) if looks > 3 else []

    receiver.take = late  # type: ignore[method-assign]
    got = cluster.run({0: Sender(sender, 1, ACTIVATIONS).send(1, torch.ones(2)), 1: edge.receive(1)})[1]
    assert got.tensor.tolist() == [1.0, 1.0]
