"""The contract of `mail`, on every carrier there is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from lightning_async.transport.checks import DTYPES
from lightning_async.transport.mail import FIRST_FREE_KIND, MARKER, Letter, Message
from tests.algorithms.cut_world import CuttingWorld
from tests.transport.cluster_world import ClusterWorld, NetworkWorld
from tests.transport.worlds import KIND, VirtualWorld, World, body, fold, post, take

MakeWorld = Callable[..., World]


@pytest.fixture(params=[VirtualWorld, ClusterWorld, NetworkWorld, CuttingWorld])
def make_world(request: pytest.FixtureRequest) -> Iterator[MakeWorld]:
    worlds: list[World] = []

    def make(n: int, late: int | None = None) -> World:
        world: World = request.param(n, late)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.close()


# -- who is there ----------------------------------------------------------------------------------------------------


def test_everybody_is_there_at_the_start(make_world: MakeWorld) -> None:
    world = make_world(3)
    for me, carrier in enumerate(world.carriers):
        assert (carrier.me, carrier.world) == (me, 3)
        assert carrier.members() == (0, 1, 2)
        world.until(lambda carrier=carrier: carrier.live() == (0, 1, 2))
        assert carrier.lost() == []
        assert carrier.take(KIND) == []


def test_who_comes_late_is_a_member_before_and_live_from_then_on(make_world: MakeWorld) -> None:
    world = make_world(3, late=1)
    first, late, last = world.carriers
    for carrier in (first, last):
        world.until(lambda carrier=carrier: carrier.live() == (0, 2))
        assert carrier.members() == (0, 1, 2)
        assert not carrier.free(1, KIND)
        assert not carrier.post(1, Message(KIND))
    post(world, 0, 2, Message(KIND))
    assert fold(world, 2).number == 1
    world.join()
    for carrier in world.carriers:
        world.until(lambda carrier=carrier: carrier.live() == (0, 1, 2))
        assert (carrier.members(), carrier.lost()) == ((0, 1, 2), [])
    assert late.take(KIND) == []
    for sender, receiver in ((0, 1), (1, 2), (1, 0), (2, 1)):
        post(world, sender, receiver, Message(KIND, body(sender)))
        assert (letter := fold(world, receiver)).peer == sender
        assert letter.number == 1
    late.propose("key", b"of the late")
    world.until(lambda: first.decided("key") == b"of the late")


def test_clock_goes_on(make_world: MakeWorld) -> None:
    world = make_world(2)
    start = world.carriers[0].now()
    world.until(lambda: world.carriers[0].now() > start + 0.01)


# -- mail -----------------------------------------------------------------------------------------------------------


def test_message_arrives_as_it_was_posted(make_world: MakeWorld) -> None:
    world = make_world(2)
    sent = Message(KIND, body(1, 2, 3), step=4, version=-5, echo=6, samples=7, weight=2**62, reference=9)
    post(world, 0, 1, sent)
    (letter,) = take(world, 1)
    assert (letter.peer, letter.number) == (0, 1)
    assert letter.message.body is not None
    assert torch.equal(letter.message.body, body(1, 2, 3))
    got = letter.message
    assert (got.kind, got.step, got.version, got.echo) == (KIND, 4, -5, 6)
    assert (got.samples, got.weight, got.reference) == (7, 2**62, 9)


def test_a_letter_is_taken_once_and_by_its_kind_only(make_world: MakeWorld) -> None:
    world = make_world(3)
    post(world, 0, 1, Message(KIND))
    take(world, 1)
    assert world.carriers[1].take(KIND) == []
    assert world.carriers[1].take(KIND + 1) == []
    assert world.carriers[2].take(KIND) == []


def test_the_body_is_copied_at_the_post(make_world: MakeWorld) -> None:
    world = make_world(2)
    weights = torch.ones(1000)
    post(world, 0, 1, Message(KIND, weights))
    weights.zero_()
    (letter,) = take(world, 1)
    assert letter.message.body is not None
    assert letter.message.body.sum() == 1000


def test_a_slot_is_free_when_its_message_is_folded_not_when_it_arrived(make_world: MakeWorld) -> None:
    world = make_world(2)
    sender, receiver = world.carriers
    post(world, 0, 1, Message(KIND, body(1)))
    assert not sender.free(1, KIND)
    assert not sender.post(1, Message(KIND, body(2)))
    (letter,) = take(world, 1)
    assert not sender.post(1, Message(KIND, body(2)))
    receiver.folded(letter)
    world.until(lambda: sender.free(1, KIND))
    assert sender.post(1, Message(KIND, body(3)))


def test_a_refused_post_changes_nothing(make_world: MakeWorld) -> None:
    world = make_world(2)
    post(world, 0, 1, Message(KIND, body(1)))
    for _ in range(5):
        assert not world.carriers[0].post(1, Message(KIND, body(-1)))
    assert fold(world, 1).number == 1
    post(world, 0, 1, Message(KIND, body(2)))
    (letter,) = take(world, 1)
    assert letter.number == 2
    assert letter.message.body is not None
    assert letter.message.body.tolist() == [2]


def test_kinds_and_links_have_slots_of_their_own(make_world: MakeWorld) -> None:
    world = make_world(3)
    for kind in (KIND, KIND + 1, 63):
        for peer in (0, 2):
            post(world, 1, peer, Message(kind, body(kind)))
    post(world, 0, 1, Message(KIND))
    for peer in (0, 2):
        assert [fold(world, peer, kind).number for kind in (63, KIND + 1, KIND)] == [3, 2, 1]
    assert fold(world, 1).peer == 0


def test_a_marker_is_behind_all_that_was_posted_before_it(make_world: MakeWorld) -> None:
    world = make_world(2)
    post(world, 0, 1, Message(KIND, torch.ones(300_000)))
    post(world, 0, 1, Message(MARKER))
    take(world, 1, MARKER)
    assert len(world.carriers[1].take(KIND)) == 1


def test_a_body_is_lent_until_it_is_folded(make_world: MakeWorld) -> None:
    world = make_world(2)
    post(world, 0, 1, Message(KIND, torch.full((500,), 1.0)))
    (kept,) = take(world, 1)
    for value in range(2, 6):
        post(world, 0, 1, Message(KIND + 1, torch.full((500,), float(value))))
        fold(world, 1, KIND + 1)
    assert kept.message.body is not None
    assert kept.message.body.unique().tolist() == [1.0]


def test_long_bodies_follow_each_other_whatever_their_lengths(make_world: MakeWorld) -> None:
    """Of one kind and of several, both ways at once: 9 MB are more than two pieces of the longest."""
    world = make_world(2)
    for numbers in (2_300_000, 20_000, 1_100_000, 5, 2_300_001):
        bodies = {(me, kind): torch.rand(numbers + kind) for me in range(2) for kind in (KIND, KIND + 1)}
        for (me, kind), sent in bodies.items():
            post(world, me, 1 - me, Message(kind, sent))
        for (me, kind), sent in bodies.items():
            (letter,) = take(world, 1 - me, kind)
            assert letter.message.body is not None
            assert torch.equal(letter.message.body, sent)
            world.carriers[1 - me].folded(letter)
        world.until(lambda: all(world.carriers[me].free(1 - me, kind) for me in range(2) for kind in (KIND, KIND + 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_travels(make_world: MakeWorld, dtype: torch.dtype) -> None:
    world = make_world(2)
    sent = torch.arange(100).to(dtype)
    post(world, 0, 1, Message(KIND, sent))
    (letter,) = take(world, 1)
    assert letter.message.body is not None
    assert letter.message.body.dtype == dtype
    assert torch.equal(letter.message.body, sent)


def test_an_empty_body_is_not_no_body(make_world: MakeWorld) -> None:
    world = make_world(2)
    post(world, 0, 1, Message(KIND, torch.empty(0, dtype=torch.float64)))
    post(world, 0, 1, Message(KIND + 1))
    (empty,) = take(world, 1)
    (none,) = take(world, 1, KIND + 1)
    assert empty.message.body is not None
    assert (empty.message.body.numel(), empty.message.body.dtype) == (0, torch.float64)
    assert none.message.body is None


def test_a_body_that_requires_grad_travels_as_numbers(make_world: MakeWorld) -> None:
    world = make_world(2)
    post(world, 0, 1, Message(KIND, torch.ones(3, requires_grad=True)))
    (letter,) = take(world, 1)
    assert letter.message.body is not None
    assert not letter.message.body.requires_grad


def test_echo_is_the_receivers_step_as_last_acknowledged(make_world: MakeWorld) -> None:
    world = make_world(2)
    post(world, 0, 1, Message(KIND))
    world.carriers[1].at(41)
    assert fold(world, 1).message.echo == 0
    post(world, 0, 1, Message(KIND))
    post(world, 0, 1, Message(KIND + 1, echo=7))
    assert fold(world, 1).message.echo == 41
    assert fold(world, 1, KIND + 1).message.echo == 7


def test_seconds_is_an_upper_bound_on_the_age(make_world: MakeWorld) -> None:
    world = make_world(2)
    receiver = world.carriers[1]
    for _ in range(3):
        post(world, 0, 1, Message(KIND))
        posted = receiver.now()
        world.until(lambda posted=posted: receiver.now() > posted + 0.05)
        (letter,) = take(world, 1)
        assert receiver.now() - posted >= 0.05
        assert letter.seconds >= 0.05
        receiver.folded(letter)
        world.until(lambda: world.carriers[0].free(1, KIND))
        folded = receiver.now()
    assert letter.seconds < folded - posted + 0.05 + 1.0  # dated by the acknowledgement before, not by the start


def test_wait_returns_when_a_letter_is_there_or_time_is_up(make_world: MakeWorld) -> None:
    world = make_world(2)
    receiver = world.carriers[1]
    start = receiver.now()
    receiver.wait(0.05)
    post(world, 0, 1, Message(KIND))
    letters: list[Letter] = []
    while not letters and receiver.now() < start + 10:
        receiver.wait(5.0)
        letters = receiver.take(KIND)
    assert len(letters) == 1


def test_everything_arrives_once_and_in_order(make_world: MakeWorld) -> None:
    world = make_world(3)
    chance = random.Random(5)
    kinds = [KIND, KIND + 1, KIND + 2]
    sent: dict[tuple[int, int, int], list[float]] = {}
    got: dict[tuple[int, int, int], list[float]] = {}
    numbers: dict[tuple[int, int, int], list[int]] = {}
    held: list[tuple[int, Letter]] = []
    goal = 150

    def play() -> bool:
        sender, receiver = chance.sample(range(3), 2)
        link = (sender, receiver, chance.choice(kinds))
        value = float(sum(map(len, sent.values())))
        if value < goal and world.carriers[sender].post(receiver, Message(link[2], torch.full((20,), value))):
            sent.setdefault(link, []).append(value)
        for me, carrier in enumerate(world.carriers):
            for kind in kinds:
                for letter in carrier.take(kind):
                    numbers.setdefault((letter.peer, me, kind), []).append(letter.number)
                    held.append((me, letter))
        chance.shuffle(held)
        for me, letter in held[: chance.randint(0, 3)]:
            assert letter.message.body is not None
            got.setdefault((letter.peer, me, letter.message.kind), []).append(letter.message.body[0].item())
            world.carriers[me].folded(letter)
            held.remove((me, letter))
        return sum(map(len, got.values())) == goal

    world.until(play, limit=30.0)
    assert got == sent
    assert all(n == sorted(set(n)) for n in numbers.values())
    for a in range(3):
        for b in range(3):
            on_link = [x for (s, r, _), n in numbers.items() if (s, r) == (a, b) for x in n]
            assert sorted(on_link) == list(range(1, len(on_link) + 1))


@pytest.mark.parametrize(
    ("peer", "message", "words"),
    [
        (0, Message(KIND), "no link from a member to itself"),
        (2, Message(KIND), "`peer` must be a rank from 0 to 1"),
        (-1, Message(KIND), "`peer` must be a rank from 0 to 1"),
        (1, Message(0), "`kind` must be from 1 to 63"),
        (1, Message(64), "`kind` must be from 1 to 63"),
        (1, Message(KIND, torch.ones(2, 2)), "one flat, contiguous tensor"),
        (1, Message(KIND, torch.ones(6)[::2]), "one flat, contiguous tensor"),
        (1, Message(KIND, torch.ones(3, dtype=torch.complex64)), "cannot travel"),
        (1, Message(MARKER, torch.ones(3)), "a marker has no body"),
        (1, Message(KIND, step=2**63), "64"),
    ],
)
def test_what_cannot_be_posted_is_refused_in_words(
    make_world: MakeWorld, peer: int, message: Message, words: str
) -> None:
    world = make_world(2)
    with pytest.raises(ValueError, match=words):
        world.carriers[0].post(peer, message)
    world.until(lambda: world.carriers[0].free(1, FIRST_FREE_KIND))


# -- board -----------------------------------------------------------------------------------------------------------


def test_the_first_value_stays_for_everybody(make_world: MakeWorld) -> None:
    world = make_world(3)
    assert all(carrier.decided("a/key") is None for carrier in world.carriers)
    for carrier in world.carriers:
        carrier.propose("a/key", b"from %d" % carrier.me)
    world.until(lambda: all(carrier.decided("a/key") is not None for carrier in world.carriers))
    values = {carrier.decided("a/key") for carrier in world.carriers}
    assert len(values) == 1
    assert values <= {b"from 0", b"from 1", b"from 2"}
    world.carriers[1].propose("a/key", b"late")
    world.carriers[1].propose("another", b"")
    world.until(lambda: world.carriers[2].decided("another") is not None)
    assert world.carriers[2].decided("another") == b""
    assert {carrier.decided("a/key") for carrier in world.carriers} == values


def test_what_one_member_forgets_the_others_know_until_it_is_gone(make_world: MakeWorld) -> None:
    world = make_world(2)
    first, second = world.carriers
    first.propose("key", b"1")
    world.until(lambda: first.decided("key") == b"1")
    for carrier in (first, second, first):
        first.forget("key")
        world.until(lambda carrier=carrier: carrier.decided("key") == b"1")
    first.forget("never said", gone=True)
    second.forget("key", gone=True)

    def another() -> bool:
        if first.decided("key") != b"2":
            first.forget("key")
            first.propose("key", b"2")
        return first.decided("key") == b"2"

    world.until(another)
    world.until(lambda: second.decided("key") == b"2")


def test_each_ticket_goes_to_exactly_one_member(make_world: MakeWorld) -> None:
    world = make_world(3)
    asked = [(me, 1 + (me + 2 * i) % 5) for i in range(6) for me in range(3)]
    for me, amount in asked:
        world.carriers[me].draw("samples", amount)
    world.carriers[0].draw("other", 10)
    drawn: list[list[tuple[int, int]]] = [[], [], []]

    def all_answered() -> bool:
        for me, carrier in enumerate(world.carriers):
            drawn[me] += carrier.drawn("samples")
        return sum(map(len, drawn)) == len(asked)

    world.until(all_answered)
    for me in range(3):
        assert [amount for _, amount in drawn[me]] == [amount for who, amount in asked if who == me]
    tickets = sorted(first + i for answers in drawn for first, amount in answers for i in range(amount))
    assert tickets == list(range(sum(amount for _, amount in asked)))
    others: list[tuple[int, int]] = []
    world.until(lambda: others.extend(world.carriers[0].drawn("other")) or others)
    assert others == [(0, 10)]
    assert world.carriers[0].drawn("other") == []


def test_no_tickets_cannot_be_drawn(make_world: MakeWorld) -> None:
    with pytest.raises(ValueError, match="`amount` must be at least 1"):
        make_world(2).carriers[0].draw("samples", 0)


def test_a_note_is_the_newest_word_of_its_member(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.carriers[0].publish(b"old")
    world.carriers[2].publish(b"x" * 2048)
    world.until(lambda: all(len(carrier.notes()) == 2 for carrier in world.carriers))
    world.carriers[0].publish(b"new")
    world.until(lambda: all(carrier.notes()[0] == b"new" for carrier in world.carriers))
    assert all(carrier.notes() == {0: b"new", 2: b"x" * 2048} for carrier in world.carriers)


def test_a_note_is_short(make_world: MakeWorld) -> None:
    with pytest.raises(ValueError, match="at most 2048 bytes"):
        make_world(2).carriers[0].publish(b"x" * 2049)
