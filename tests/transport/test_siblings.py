"""The ranks of a member have one mean and one word, to the bit; members have one too, and only speakers carry it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_async.transport.layers import LayeredRounds, Speakers
from lightning_async.transport.mail import LONGEST, Message, Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.siblings import WORDS, Siblings
from lightning_async.transport.virtual import VirtualCluster

Say = Callable[[VirtualCluster, Siblings], Wait[Any]]


def members(ranks: int, each: int, say: Say, **knobs: Any) -> tuple[list[Any], VirtualCluster]:
    """What each of so many ranks, in members of `each`, ends with."""
    cluster = VirtualCluster(ranks)
    firsts = [rank - rank % each for rank in range(ranks)]
    own = [Siblings(cluster.carriers[r], tuple(range(f, f + each)), **knobs) for r, f in enumerate(firsts)]
    ends = cluster.run({r: say(cluster, own[r]) for r in range(ranks)})
    return [ends[r] for r in range(ranks)], cluster


def vector(rank: int, size: int = 7) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize(("ranks", "each"), [(2, 2), (3, 3), (6, 3), (4, 1)])
@pytest.mark.parametrize("size", [2, 7, 100_000])
def test_the_average_is_the_mean_of_the_members_ranks_to_the_bit_on_all(ranks: int, each: int, size: int) -> None:
    def thrice(cluster: VirtualCluster, siblings: Siblings) -> Wait[torch.Tensor]:
        for turn in range(3):
            mean = yield from siblings.average(vector(siblings.me + 10 * turn, size))
        return mean

    ends, _ = members(ranks, each, thrice)
    for first in range(0, ranks, each):
        whole = [vector(rank + 20, size) for rank in range(first, first + each)]
        slices = zip(*(one.tensor_split(each) for one in whole), strict=True)
        twin = torch.cat([_mean(owner, parts) for owner, parts in enumerate(slices)])
        for end in ends[first : first + each]:
            assert torch.equal(end, twin)


def _mean(owner: int, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Summed by its owner, which begins with its own."""
    total = parts[owner].clone()
    for number, part in enumerate(parts):
        total += part * (number != owner)
    return total / len(parts)


def test_a_word_is_the_speakers_and_so_is_a_tensor() -> None:
    def say(cluster: VirtualCluster, siblings: Siblings) -> Wait[list[Any]]:
        said = yield from siblings.word("a number", siblings.me if siblings.speaks else None)
        spread = yield from siblings.spread(vector(siblings.me) if siblings.speaks else None)
        nothing = yield from siblings.word("nothing", None)
        return [said, spread.tolist(), nothing]

    ends, _ = members(4, 2, say)
    assert ends == [[first, vector(first).tolist(), None] for first in (0, 0, 2, 2)]


def watched(cluster: VirtualCluster, me: int, sent: dict[tuple[int, int], int]) -> None:
    """Remember the longest body that this rank posts to each other one."""
    carrier = cluster.carriers[me]
    post = carrier.post

    def watching(peer: int, message: Message) -> bool:
        went = post(peer, message)
        if went and message.body is not None:
            sent[me, peer] = max(sent.get((me, peer), 0), message.body.nbytes)
        return went

    carrier.post = watching  # type: ignore[method-assign]


@pytest.mark.parametrize("size", [0, 1, 16, 17, 1000])
def test_what_is_longer_than_a_link_takes_goes_in_pieces_and_is_the_same(size: int) -> None:
    sent: dict[tuple[int, int], int] = {}

    def say(cluster: VirtualCluster, siblings: Siblings) -> Wait[list[Any]]:
        ends: list[Any] = []
        watched(cluster, siblings.me, sent)
        for turn in (0, 10):
            average = yield from siblings.average(vector(siblings.me + turn, size))
            some = yield from siblings.average(vector(siblings.me, size), size // 3, size // 2)
            spread = yield from siblings.spread(vector(turn, size) if siblings.speaks else None)
            taken = yield from siblings.spread(vector(turn, size) if siblings.speaks else None, torch.Tensor.abs)
            parts = yield from siblings.collect(vector(turn, size + 20 * siblings.me), 1 + siblings.me)
            yield from siblings.word("how many", 1)
            ends += [each.tolist() for each in (average, some, spread, taken.abs())]
            ends += [(part.tolist(), weight) for part, weight in parts]
        return ends

    whole, _ = members(6, 3, say)
    assert max(sent.values()) >= 4 * size
    sent.clear()
    pieces, _ = members(6, 3, say, longest=64)
    assert pieces == whole
    assert max(sent.values()) <= 64


def test_a_speaker_says_the_words_of_a_step_before_anybody_has_heard_the_first() -> None:
    cluster = VirtualCluster(2)
    speaker, sibling = (Siblings(cluster.carriers[rank], (0, 1)) for rank in (0, 1))

    def say(siblings: Siblings, own: range) -> Wait[list[int]]:
        heard = []
        for number in own:
            heard.append((yield from siblings.word(f"word {number}", number if siblings.speaks else None)))
        return heard

    one, many = range(len(WORDS)), range(len(WORDS), 4 * len(WORDS))
    with pytest.raises(StopIteration):
        next(say(speaker, one))  # nobody runs who could hear it
    rest = say(speaker, many)
    assert next(rest) == f"rank 1, of the same member, to hear 'word {len(WORDS)}'"
    assert cluster.run({0: rest, 1: say(sibling, range(many.stop))}) == {0: [*many], 1: [*one, *many]}


def test_ranks_that_are_at_different_things_raise() -> None:
    def say(cluster: VirtualCluster, siblings: Siblings) -> Wait[None]:
        yield from siblings.word("tea" if siblings.speaks else "coffee")

    with pytest.raises(RuntimeError, match="rank 0 at 'tea', rank 1 at 'coffee'"):
        members(2, 2, say)


def test_ranks_that_are_at_different_steps_raise() -> None:
    def say(cluster: VirtualCluster, siblings: Siblings) -> Wait[None]:
        if siblings.speaks:
            yield from siblings.collect(torch.zeros(1), 1)
        yield from siblings.average(vector(0))

    with pytest.raises(RuntimeError, match="at different steps: rank 0 in its average number"):
        members(2, 2, say)


def test_a_wait_has_a_name() -> None:
    cluster = VirtualCluster(2)
    waiting = Siblings(cluster.carriers[1], (0, 1)).word("whether a meeting follows")
    assert next(waiting) == "rank 0, of the same member, to say 'whether a meeting follows'"
    assert "rank 0, of the same member, in average 1" in next(Siblings(cluster.carriers[1], (0, 1)).average(vector(0)))


def layered(cluster: VirtualCluster, siblings: Siblings) -> LayeredRounds:
    each = len(siblings.ranks)
    return LayeredRounds(cluster.carriers[siblings.me], siblings, range(0, len(cluster.carriers), each))


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
@pytest.mark.parametrize("size", [3, 100_000])
def test_what_all_ranks_combine_is_the_same_by_layers(how: Any, size: int) -> None:
    def say(cluster: VirtualCluster, siblings: Siblings) -> Wait[Any]:
        whole = vector(siblings.me, size).double()
        flat, _ = yield from Rounds(cluster.carriers[siblings.me], channel=1).exchange(whole, how)
        mine, _ = yield from layered(cluster, siblings).exchange(whole, how)
        return flat[0], mine[0]

    ends, _ = members(4, 2, say)
    for flat, mine in ends:
        assert torch.equal(mine, ends[0][1])
        assert torch.allclose(mine, flat, rtol=1e-15, atol=1e-15)


def test_a_broadcast_comes_as_it_is_to_all_ranks() -> None:
    def say(cluster: VirtualCluster, siblings: Siblings) -> Wait[Any]:
        return (yield from layered(cluster, siblings).broadcast(vector(siblings.me), 2))

    ends, _ = members(6, 2, say)
    assert all(torch.equal(end, vector(2)) for end in ends)


def test_between_members_a_tensor_travels_as_if_they_had_no_siblings() -> None:
    sent: dict[tuple[int, int, int], int] = {}

    def counted(cluster: VirtualCluster, me: int) -> None:
        carrier, world = cluster.carriers[me], len(cluster.carriers)
        post = carrier.post

        def counting(peer: int, message: Message) -> bool:
            went = post(peer, message)
            if went and message.body is not None:
                sent[world, me, peer] = sent.get((world, me, peer), 0) + message.body.nbytes
            return went

        carrier.post = counting  # type: ignore[method-assign]

    def by_layers(cluster: VirtualCluster, siblings: Siblings) -> Wait[Any]:
        counted(cluster, siblings.me)
        yield from layered(cluster, siblings).exchange(vector(siblings.me, 100_000), "mean")

    def alone(cluster: VirtualCluster, siblings: Siblings) -> Wait[Any]:
        counted(cluster, siblings.me)
        yield from Rounds(cluster.carriers[siblings.me]).exchange(vector(siblings.me, 100_000), "mean")

    members(4, 2, by_layers)
    members(2, 1, alone)
    assert sent[4, 0, 2] == sent[2, 0, 1] > 0
    assert {(me, peer) for world, me, peer in sent if world == 4 and me // 2 != peer // 2} == {(0, 2), (2, 0)}


@pytest.mark.parametrize("ranks_of_members", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2), (3,)), ((0, 1, 2, 3),)])
@pytest.mark.parametrize(("dtype", "longest"), [(torch.uint8, 200), (torch.float64, 200), (torch.float64, LONGEST)])
def test_what_is_gathered_is_everybodys_own_and_goes_by_the_speakers(
    ranks_of_members: tuple[tuple[int, ...], ...], dtype: torch.dtype, longest: int
) -> None:
    """So ranks of unlike members need no links to each other. What is longer than a message may be goes by pieces."""
    cluster, speakers = VirtualCluster(4), [ranks[0] for ranks in ranks_of_members]
    sent: dict[tuple[int, int], int] = {}

    def say(me: int) -> Wait[Any]:
        watched(cluster, me, sent)
        siblings = Siblings(cluster.carriers[me], next(ranks for ranks in ranks_of_members if me in ranks), longest)
        rounds, ends = LayeredRounds(cluster.carriers[me], siblings, speakers, longest), []
        for size in (15, 0, 3):
            own = torch.arange(size * me).add(me).to(dtype)
            ends.append((yield from rounds.exchange(own, "gather")))
            ends.append((yield from rounds.exchange(own[:size].new_ones(2), "sum")))
        return ends

    for found in cluster.run({rank: say(rank) for rank in range(4)}).values():
        for (gathered, members), size in zip(found[::2], (15, 0, 3), strict=True):
            assert members == (0, 1, 2, 3)
            assert [part.tolist() for part in gathered] == [[*range(r, r + size * r)] for r in range(4)]
            assert {part.dtype for part in gathered} == {dtype}
        assert all(total.tolist() == [4, 4] for (total,), _ in found[1::2])
    joined = {(a, b) for ranks in ranks_of_members for a in ranks for b in ranks}
    assert {pair for pair in sent if pair not in joined} <= {(a, b) for a in speakers for b in speakers}
    assert max(sent.values()) <= longest


def test_what_is_gathered_is_gathered_without_a_member_whose_speaker_died() -> None:
    """Its sibling had said its word for the round, and is no member without it."""
    cluster, speakers = VirtualCluster(4, silence=0.3, patience=1.0, limit=30.0), (0, 2)

    def say(me: int) -> Wait[Any]:
        carrier = cluster.carriers[me]
        rounds = LayeredRounds(carrier, Siblings(carrier, (0, 1) if me < 2 else (2, 3)), speakers)
        return (yield from rounds.exchange(torch.full((me + 1,), me, dtype=torch.uint8), "gather"))

    def mute(me: int) -> Wait[Any]:
        while True:
            yield "nothing"

    cluster.kill(2, at=0.5)
    cluster.kill(3, at=3.0)
    found = cluster.run({0: say(0), 1: say(1), 2: mute(2), 3: say(3)})
    for rank in (0, 1):
        gathered, members = found[rank]
        assert members == (0, 1)
        assert [part.tolist() for part in gathered] == [[0], [1, 1]]


def test_only_speakers_are_members() -> None:
    cluster = VirtualCluster(6)
    seen = Speakers(cluster.carriers[2], (0, 2, 4))
    assert (seen.me, seen.world, seen.members(), seen.live()) == (2, 3, (0, 2, 4), (0, 2, 4))
