"""One bit a number: what was pushed, decompressed, and what is left at home are all that was to be pushed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms import sign_wire
from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.shards import cut
from lightning_async.algorithms.sign_wire import SMALL, codecs
from lightning_async.algorithms.sync_global import SyncGlobal
from lightning_async.algorithms.training import Trained, train
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

LENGTHS = (7000, 33, 70_001, SMALL - 1, SMALL)


def replica(dtype: torch.dtype = torch.float32) -> Replica:
    return Replica([nn.Parameter(torch.zeros(n, dtype=dtype)) for n in LENGTHS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_what_was_pushed_and_what_is_left_is_all_that_was_to_be_pushed(shards: int, dtype: torch.dtype) -> None:
    member = replica(dtype)
    parts = cut(member.numel, shards)
    here, there = (codecs("sign", parts, member.places, member.flat) for _ in range(2))
    generator = torch.Generator().manual_seed(shards)
    base, pushed, moved = (torch.zeros(member.numel, dtype=torch.float64) for _ in range(3))
    for step in range(20):
        move = torch.zeros_like(member.flat)
        for one in member.parts(move):
            one.copy_(torch.randn(one.numel(), generator=generator) * 10 ** (step % 3))
        member.shift(move)
        moved += move
        for shard in parts:
            correction = (member.flat[shard.part] - base[shard.part].to(dtype)).contiguous()
            body = here.of(shard.number).encode(correction)
            seen = there.of(shard.number).decode(body, dtype)  # on another object, as another rank has it
            assert torch.equal(seen, here.of(shard.number).decode(body, dtype))
            base[shard.part] += seen
            pushed[shard.part] += seen
        left = member.flat.double() - base
        torch.testing.assert_close(pushed + left, moved, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)
    assert left.norm() < moved.norm()


@pytest.mark.parametrize("shards", [1, 8])
def test_it_takes_a_thirty_second_of_the_bytes_and_the_gaps_nothing(shards: int) -> None:
    member = replica()
    parts = cut(member.numel, shards)
    wires = codecs("sign", parts, member.places, member.flat)
    sent = 0
    for shard in parts:
        ones = torch.ones(shard.end - shard.begin)
        body = wires.of(shard.number).encode(ones)
        sent += body.numel()
        member.shift(wires.of(shard.number).decode(body, torch.float32), at=shard.begin)
    small = 4 * sum(n for n in LENGTHS if n < SMALL)
    assert sent - small - 8 * 4 * shards * SMALL < 1.1 * member.numel / 8  # a cut may leave small ends
    filled = torch.zeros(member.numel)
    for one in member.parts(filled):
        one.fill_(1.0)
    assert torch.equal(member.flat, filled)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_arrives_as_that(bad: float) -> None:
    member = replica()
    wires = codecs("sign", parts := cut(member.numel, 2), member.places, member.flat)
    values = torch.ones(parts[1].end - parts[1].begin)
    values[-5] = bad
    codec = wires.of(1)
    assert not torch.isfinite(codec.decode(codec.encode(values), torch.float32)).all()


# -- in a run ----------------------------------------------------------------------------------------------------------

SIZE = 4 * SMALL


def world(n: int, speeds: list[float], spoiled: int | None = None, **knobs: Any) -> tuple[dict[int, Trained], Tensor]:
    """Members whose steps are random; the consensus each ought to reach: the mean of all their steps."""
    cluster = VirtualCluster(n, latency=0.01, jitter=1.0)
    parameters = [nn.Parameter(torch.zeros(SIZE)) for _ in range(n)]
    totals, programs = torch.zeros(n, SIZE), {}
    for r, carrier in enumerate(cluster.carriers):

        def move(k: int, r: int = r) -> None:
            generator = torch.Generator().manual_seed(1000 * r + k)
            step = torch.randn(SIZE, generator=generator) + 0.1 * torch.arange(SIZE) / SIZE
            parameters[r].data += step
            totals[r] += step
            if spoiled == r and k == 10:
                parameters[r].data[7] = math.nan

        programs[r] = train(
            AsyncGlobal(wire="sign", **knobs),
            Replica([parameters[r]]),
            carrier,
            steps=int(100 / speeds[r]),
            take_step=move,
            optimizer_step=lambda: None,
            seconds=lambda me, k: 0.02 * speeds[me],
            mass=UNIT,
            rounds=Rounds(carrier),
        )
    return cluster.run(programs), totals.mean(0)


@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1.0], [1.0, 1.0, 4.0]], ids=str)
def test_at_a_meeting_all_that_was_moved_is_in_the_consensus(speeds: list[float]) -> None:
    """Nothing is left at home then, so a checkpoint needs no residual."""
    trained, expected = world(len(speeds), speeds, attenuation="none")
    for one in trained.values():
        assert one.waits == 0
        assert torch.equal(one.consensus, trained[0].consensus)  # type: ignore[arg-type]
    torch.testing.assert_close(trained[0].consensus, expected, rtol=2e-3, atol=2e-3)


def test_who_is_not_finite_is_refused_and_given_the_weights() -> None:
    trained, _ = world(3, [1.0, 1.0, 1.0], spoiled=1)
    assert [any(a.fate is Fate.REFUSED for a in trained[r].arrivals) for r in range(3)] == [False, True, False]
    assert torch.isfinite(trained[0].consensus).all()  # type: ignore[arg-type]


def test_what_a_rank_has_not_pushed_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of like numbers loses (1 - phi) of its square at every push: the rest is some steps long, not all."""
    left: list[float] = []
    encode = sign_wire.SignWire.encode

    def watched(self: sign_wire.SignWire, values: Tensor) -> Tensor:
        left.append(values.norm().item() / values.numel() ** 0.5)
        return encode(self, values)

    monkeypatch.setattr(sign_wire.SignWire, "encode", watched)
    world(2, [1.0, 1.0], attenuation="none")
    assert len(left) > 50
    assert max(left) < 12.0  # a step has about 1; all 100 in a row 11.4 of noise and 10 of drift
    assert sum(left[len(left) // 2 :]) < 1.3 * sum(left[: len(left) // 2]) + 5


def test_rounds_of_all_cannot_have_signs() -> None:
    with pytest.raises(ValueError, match="wire='sign' has no meaning with mode='sync'"):
        SyncGlobal(wire="sign")
