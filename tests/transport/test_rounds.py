"""Rounds on every carrier: all members get the same, to the bit, in spite of deaths in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_async.transport.mail import LONGEST, Message, Wait
from lightning_async.transport.rounds import SHORT, Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.transport.cluster_world import ClusterWorld
from tests.transport.worlds import VirtualWorld, World

MakeWorld = Callable[[int], World]
SIZES = [1, 5, 1000]


@pytest.fixture(params=[VirtualWorld, ClusterWorld])
def make_world(request: pytest.FixtureRequest) -> Iterator[MakeWorld]:
    worlds: list[World] = []

    def make(n: int) -> World:
        worlds.append(request.param(n))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def together(world: World, waits: list[Wait[Any]], limit: float = 20.0) -> list[Any]:
    """Drive one `Wait` of each member to its end, or to its exception."""
    results: dict[int, Any] = {}

    def step() -> bool:
        for i, wait in enumerate(waits):
            if i not in results:
                try:
                    next(wait)
                except StopIteration as end:
                    results[i] = end.value
                except (ValueError, RuntimeError) as error:
                    results[i] = error
        return len(results) == len(waits)

    world.until(step, limit)
    return [results[i] for i in range(len(waits))]


def parts(n: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n * size)
    return [torch.randn(size, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_reductions(make_world: MakeWorld, how: Any, size: int) -> None:
    world, brought = make_world(3), parts(3, size)
    waits = [Rounds(c).exchange(brought[r], how) for r, c in enumerate(world.carriers)]
    results = [result for (result,), members in together(world, waits) if members == (0, 1, 2)]
    stacked = torch.stack(brought).double()
    expected = {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[how]
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_weighted_mean_and_gather_of_unequal_sizes(make_world: MakeWorld) -> None:
    world = make_world(3)
    rounds = [Rounds(c) for c in world.carriers]
    brought = [torch.full((2,), float(r)) for r in range(3)]
    means = together(world, [rounds[r].exchange(brought[r], "mean", weight=r) for r in range(3)])
    assert all(torch.equal(result[0], torch.full((2,), 5 / 3)) for result, _ in means)
    gathered = together(world, [rounds[r].exchange(torch.arange(r + 1), "gather") for r in range(3)])
    assert [[part.tolist() for part in result] for result, _ in gathered] == [[[0], [0, 1], [0, 1, 2]]] * 3
    collected = together(world, [rounds[r].collect(torch.arange(r + 1), 1) for r in range(3)])
    assert [[part.tolist() for part in result] for result, _ in collected] == [[], [[0], [0, 1], [0, 1, 2]], []]


@pytest.mark.parametrize(("dtype", "short"), [(torch.float32, SHORT), (torch.float32, 0), (torch.int64, 0)])
def test_what_is_longer_than_a_message_goes_piece_by_piece(
    make_world: MakeWorld, dtype: torch.dtype, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All to all, and by way of owners."""
    monkeypatch.setattr("lightning_async.transport.rounds.SHORT", short)
    world, brought = make_world(3), [(9 * part).to(dtype) for part in parts(3, 10)]
    rounds, posted = [Rounds(c, longest=16) for c in world.carriers], list[int]()
    for carrier in world.carriers:
        carrier.post = _weighed(carrier.post, posted)  # type: ignore[method-assign]
    most = together(world, [rounds[r].exchange(brought[r], "max") for r in range(3)])
    gathered = together(world, [rounds[r].exchange(brought[r][: 5 * r], "gather") for r in range(3)])
    collected = together(world, [rounds[r].collect(brought[r][: 5 * r], 0) for r in range(3)])
    sent = together(world, [rounds[r].broadcast(brought[r], 2) for r in range(3)])
    assert all(torch.equal(result[0], torch.stack(brought).amax(0)) for result, _ in most)
    for result, members in [*gathered, collected[0]]:
        assert members == (0, 1, 2)
        assert all(torch.equal(part, mine[: 5 * r]) for r, (part, mine) in enumerate(zip(result, brought, strict=True)))
    assert [result for result, _ in collected[1:]] == [[], []]
    assert all(torch.equal(result, brought[2]) for result in sent)
    assert max(posted) == 16


def _weighed(post: Callable[..., bool], posted: list[int]) -> Callable[..., bool]:
    def weigh(peer: int, message: Message) -> bool:
        posted.append(0 if message.body is None else message.body.nbytes)
        return post(peer, message)

    return weigh


def test_the_mean_of_equals_is_that_to_the_bit(make_world: MakeWorld) -> None:
    world, (weights, *_) = make_world(3), parts(1, 1000)
    for (result,), _ in together(world, [Rounds(c).exchange(weights, "mean") for c in world.carriers]):
        assert torch.equal(result, weights)


def test_broadcast_takes_nothing_from_the_others(make_world: MakeWorld) -> None:
    world = make_world(3)
    brought = [torch.full((7,), float("nan")), torch.arange(7.0), torch.full((7,), float("inf"))]
    for result in together(world, [Rounds(c).broadcast(brought[r], 1) for r, c in enumerate(world.carriers)]):
        assert torch.equal(result, torch.arange(7.0))


CROSSINGS: list[tuple[list[Callable[[Rounds], Wait[Any]]], str]] = [
    (
        [Rounds.barrier, Rounds.barrier, lambda r: r.exchange(torch.zeros(10))],
        "ranks 0, 1 are at 'barrier', rank 2 is at 'exchange sum float32 10'",
    ),
    (
        [lambda r: r.agree(b"0", what="settle"), lambda r: r.broadcast(torch.zeros(2), 1), lambda r: r.agree(b"0")],
        "rank 0 is at 'settle', rank 1 is at 'broadcast from 1 float32 2', rank 2 is at 'agree'",
    ),
    (
        [lambda r: r.exchange(torch.zeros(3 + r.carrier.me))] * 3,
        "rank 0 is at 'exchange sum float32 3', rank 1 is at 'exchange sum float32 4', rank 2 is at",
    ),
    (
        [lambda r: r.exchange(torch.zeros(1 + r.carrier.me), "gather"), *[lambda r: r.exchange(torch.zeros(1))] * 2],
        "rank 0 is at 'exchange gather float32', ranks 1, 2 are at 'exchange sum float32 1'",
    ),
    (
        [
            lambda r: r.exchange(torch.zeros(1, dtype=torch.float64), "max"),
            *[lambda r: r.broadcast(torch.ones(1), 0)] * 2,
        ],
        "rank 0 is at 'exchange max float64 1', ranks 1, 2 are at 'broadcast from 0 float32 1'",
    ),
]


@pytest.mark.parametrize(("calls", "words"), CROSSINGS)
def test_crossed_rounds_raise_at_once_on_every_member(make_world: MakeWorld, calls: list[Any], words: str) -> None:
    """Nobody reads another one's word as something else, and nobody waits for what will not come."""
    world = make_world(3)

    def life(me: int) -> Wait[None]:
        rounds = Rounds(world.carriers[me])
        yield from rounds.exchange(torch.zeros(3), "max")
        yield from calls[me](rounds)

    errors = together(world, [life(me) for me in range(3)])
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith(f"the ranks are at different things: {words}")
    assert "must call the same things in the same order" in str(errors[0])


def test_channels_do_not_cross(make_world: MakeWorld) -> None:
    """What one channel is doing is nobody's business on the other, and a word may hold anything."""
    world = make_world(2)

    def life(me: int) -> Wait[Any]:
        one, two = Rounds(world.carriers[me]), Rounds(world.carriers[me], channel=1)
        yield from one.barrier()
        said = yield from two.agree(b"\n\0\n" * (1 + me), what="settle")
        return said

    assert together(world, [life(0), life(1)]) == [{0: b"\n\0\n", 1: b"\n\0\n\n\0\n"}] * 2


def test_what_a_dead_member_was_at_crosses_nobody() -> None:
    cluster = VirtualCluster(3, silence=0.1)
    cluster.kill(2, at=0.05)

    def life(me: int) -> Any:
        rounds = Rounds(cluster.carriers[me])
        yield 0.1 if me == 2 else 0.01
        yield from (rounds.agree(b"", what="another thing") if me == 2 else rounds.barrier())
        return (yield from rounds.barrier())

    assert cluster.run({me: life(me) for me in range(3)}) == {0: (0, 1), 1: (0, 1)}


def test_who_said_its_first_word_and_died_was_there_for_all() -> None:
    """Also for one that comes to its first round when the death is known already."""
    cluster = VirtualCluster(3, silence=0.1)
    cluster.kill(2, at=0.5)

    def life(me: int) -> Any:
        yield 1.0 if me == 1 else 0.01
        return (yield from Rounds(cluster.carriers[me]).barrier())

    assert cluster.run({me: life(me) for me in range(3)}) == dict.fromkeys((0, 1), (0, 1, 2))


@pytest.mark.parametrize("size", [1, 30_000])
def test_who_said_its_word_in_an_exchange_and_died_is_missed_by_all(size: int) -> None:
    """Those who waited for its part and one who comes to its first round behind its death begin again together."""
    cluster = VirtualCluster(3, silence=0.1)
    cluster.kill(2, at=0.5)

    def life(me: int) -> Any:
        yield 1.0 if me == 1 else 0.01
        (result,), members = yield from Rounds(cluster.carriers[me]).exchange(torch.full((size,), float(2**me)))
        return result.unique().tolist(), members

    assert cluster.run({me: life(me) for me in range(3)}) == dict.fromkeys((0, 1), ([3.0], (0, 1)))


def test_a_round_costs_one_word_a_member() -> None:
    """The name travels in the word: what is written on the board is what it was."""
    cluster, written = VirtualCluster(2), []
    for carrier in cluster.carriers:
        carrier.propose = lambda key, value, write=carrier.propose: (written.append(key), write(key, value))  # type: ignore[method-assign]
    cluster.run({c.me: Rounds(c).exchange(torch.zeros(3)) for c in cluster.carriers})
    assert sorted(written) == ["round0/1/0", "round0/1/1", "round0/2/0", "round0/2/1"]


def test_many_rounds_on_two_channels(make_world: MakeWorld) -> None:
    world = make_world(3)

    def life(r: int) -> Wait[list[float]]:
        one, two, got = Rounds(world.carriers[r]), Rounds(world.carriers[r], channel=1), []
        for k in range(10):
            for rounds in (one, two):
                (result,), _ = yield from rounds.exchange(torch.full((3,), float(r + k)))
                got.append(float(result[0]))
            yield from one.barrier()
        return got

    assert together(world, [life(r) for r in range(3)]) == [[float(3 + 3 * k) for k in range(10) for _ in "12"]] * 3


def test_words_of_rounds_past_are_held_by_nobody(make_world: MakeWorld) -> None:
    """Neither by a member nor by the board: a run may have millions of them."""
    world, n, count = make_world(3), 3, 8

    def life(r: int) -> Wait[None]:
        one, two = Rounds(world.carriers[r]), Rounds(world.carriers[r], channel=1)
        for k in range(count):
            yield from one.agree(b"%d" % k)
            yield from two.barrier()

    together(world, [life(r) for r in range(n)])
    said = [[f"round{channel}/{k + 1}/{r}" for channel in range(2) for r in range(n)] for k in range(count)]
    world.until(lambda: not any(held(world, key) for keys in said[:-1] for key in keys))
    assert all(held(world, key) for key in said[-1]), "whoever is slow still reads these"


def held(world: World, key: str) -> bool:
    """Whether a decision is on the board, or in a member's memory."""
    if isinstance(world, VirtualWorld):
        return key in world.cluster._board._values
    assert isinstance(world, ClusterWorld)
    return world.carriers[0]._keys.check([f"say/{key}"]) or any(
        key in memory for c in world.carriers for r in [c._control._requests] for memory in (r._decided, r._watched)
    )


@pytest.mark.parametrize(("longest", "short"), [(LONGEST, SHORT), (1500, SHORT), (1500, 0)])
@pytest.mark.parametrize("seed", range(20))
def test_a_death_in_the_middle_leaves_the_living_with_one_result(
    seed: int, longest: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it comes: either all have the dead member's part, or none. Who comes late is waited for."""
    monkeypatch.setattr("lightning_async.transport.rounds.SHORT", short)
    cluster = VirtualCluster(4, bandwidth=1e6, latency=0.003, seed=seed, silence=0.1)
    cluster.kill(seed % 4, at=0.001 * seed)
    if seed % 3:
        cluster.join((seed + seed % 3) % 4, at=0.002 * seed)

    def life(r: int) -> Any:
        rounds, got = Rounds(cluster.carriers[r], longest=longest), []
        for _ in range(3):
            (result,), members = yield from rounds.exchange(torch.full((1000,), float(2**r)))
            got.append((*result.unique().tolist(), members))
        return got

    results = list(cluster.run({r: life(r) for r in range(4)}).values())
    assert len(results) >= 3
    for result in results:
        assert result == results[0]
        for total, members in result:
            assert set(members) >= set(range(4)) - {seed % 4}
            assert total == sum(2**r for r in members)


@pytest.mark.few(5)
@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize(("n", "size", "killed"), [(10, 4_000, 9), (10, 4_000, 0), (4, 12_000, 3)])
def test_a_death_in_a_long_exchange_keeps_nobody(n: int, size: int, killed: int, seed: int) -> None:
    """Nor who waits for the living alone: those have given up because of it, and wait behind the round."""
    assert 4 * size * (n - 1) > SHORT, "by way of owners, which ten are not all"
    silence = 0.1
    cluster = VirtualCluster(n, bandwidth=1e6, latency=0.003, seed=seed, silence=silence, limit=10 * silence)
    cluster.kill(killed, at=0.004 * seed)

    def life(r: int) -> Any:
        rounds, got = Rounds(cluster.carriers[r]), []
        for _ in range(2):
            (result,), members = yield from rounds.exchange(torch.full((size,), float(2**r)))
            got.append((result.unique().tolist(), members))
        return got

    results = cluster.run({r: life(r) for r in range(n)})
    assert {*results} >= {*range(n)} - {killed}
    first, *others = results.values()
    assert all(other == first for other in others)
    for total, members in first:
        assert {*members} >= {*range(n)} - {killed}
        assert total == [sum(2**r for r in members)]
