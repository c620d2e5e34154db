"""The virtual cluster: its arithmetic is exact, its faults do what they say, and a seed says it all."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lightning_async.transport.mail import MARKER, Carrier, Letter, Message
from lightning_async.transport.virtual import Deadlock, Program, VirtualCluster
from lightning_async.transport.virtual_wire import HEADER_BYTES
from tests.transport.worlds import KIND

MB = 250_000  # elements of one megabyte


def exact(n: int = 3, **options: Any) -> VirtualCluster:
    """No jitter: one second of latency, one megabyte a second."""
    return VirtualCluster(
        n, **{"bandwidth": 1e6, "latency": 1.0, "jitter": 0.0, "silence": 5, "patience": 50, **options}
    )


def receive(
    cluster: VirtualCluster, me: int, kind: int, count: int = 1
) -> Generator[str, None, list[tuple[int, float]]]:
    """The (peer, virtual time) of the next letters."""
    came = []
    while len(came) < count:
        for letter in cluster.carriers[me].take(kind):
            came.append((letter.peer, cluster.time))
            cluster.carriers[me].folded(letter)
        if len(came) < count:
            yield "a letter"
    return came


def until_lost(carrier: Carrier) -> Generator[str, None, Any]:
    while not (losses := carrier.lost()):
        yield "a loss"
    return losses


def sleep(*seconds: float) -> Program:
    yield from seconds


def times_of(cluster: VirtualCluster, naps: list[float]) -> Program:
    """When each nap was over."""
    ends = []
    for nap in naps:
        yield nap
        ends.append(cluster.time)
    return ends


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_bulk_takes_turns_in_the_uplink_and_small_ones_pass() -> None:
    cluster = exact()
    header = HEADER_BYTES / 1e6
    sender = cluster.carriers[0]
    assert sender.post(1, Message(KIND, torch.zeros(MB)))
    assert sender.post(2, Message(KIND, torch.zeros(2 * MB)))
    assert sender.post(2, Message(KIND + 1, torch.zeros(10)))  # behind the bulk of its own link
    cluster.carriers[1].post(0, Message(KIND, torch.zeros(10)))
    results = cluster.run({0: receive(cluster, 0, KIND), 1: receive(cluster, 1, KIND), 2: receive(cluster, 2, KIND)})
    assert results[0] == [(1, pytest.approx(1 + header + 40e-6, abs=1e-12))]
    assert results[1] == [(0, pytest.approx(1 + header + 1, abs=1e-12))]
    assert results[2] == [(0, pytest.approx(3 + 2 * header + 1, abs=1e-12))]
    assert len(cluster.carriers[2].take(KIND + 1)) == 0
    cluster.advance(1e-9)
    assert len(cluster.carriers[2].take(KIND + 1)) == 1


def test_small_message_passes_the_bulk_of_another_link() -> None:
    cluster = exact()
    cluster.carriers[0].post(1, Message(KIND, torch.zeros(MB)))
    cluster.carriers[0].post(2, Message(MARKER))
    (arrival,) = cluster.run({2: receive(cluster, 2, MARKER)})[2]
    assert arrival == (0, pytest.approx(1 + HEADER_BYTES / 1e6, abs=1e-12))


def test_acknowledgement_takes_a_latency_and_dates_the_next_message() -> None:
    cluster = exact(2, bandwidth=None)
    sender, receiver = cluster.carriers
    sender.post(1, Message(KIND))
    cluster.advance(1.5)
    (letter,) = receiver.take(KIND)
    assert letter.seconds == pytest.approx(1.5)
    receiver.at(9)
    receiver.folded(letter)
    cluster.advance(0.99)
    assert not sender.free(1, KIND)
    cluster.advance(0.02)
    assert sender.post(1, Message(KIND))
    cluster.advance(1.0)
    (letter,) = receiver.take(KIND)
    assert (letter.message.echo, letter.seconds) == (9, pytest.approx(0.99 + 0.02 + 1.0))


def test_clocks_do_not_agree() -> None:
    cluster = VirtualCluster(3)
    assert len({round(carrier.now()) for carrier in cluster.carriers}) == 3


def test_a_letter_is_folded_once() -> None:
    cluster = exact(2)
    cluster.carriers[0].post(1, Message(KIND))
    cluster.advance(2.0)
    (letter,) = cluster.carriers[1].take(KIND)
    cluster.carriers[1].folded(letter)
    with pytest.raises(ValueError, match="letter 1 of member 0 is not in the hands of member 1"):
        cluster.carriers[1].folded(letter)


def test_a_body_is_spoilt_once_its_slot_is_free() -> None:
    cluster = exact(2)
    cluster.carriers[0].post(1, Message(KIND, torch.ones(3)))
    cluster.advance(2.0)
    (letter,) = cluster.carriers[1].take(KIND)
    cluster.carriers[1].folded(letter)
    cluster.advance(2.0)
    assert letter.message.body is not None
    assert letter.message.body.isnan().all()


# -- programs --------------------------------------------------------------------------------------------------------


def gossip(carrier: Carrier, steps: int, weights: torch.Tensor, seconds: float) -> Program:
    right, folds = (carrier.me + 1) % carrier.world, 0
    for step in range(1, steps + 1):
        yield seconds
        carrier.at(step)
        for letter in carrier.take(KIND):
            assert letter.message.body is not None
            weights.lerp_(letter.message.body, 0.25)
            carrier.folded(letter)
            folds += 1
        carrier.post(right, Message(KIND, weights, step=step))
    return folds


def trace_of(seed: int) -> tuple[list[Any], list[list[float]]]:
    cluster = VirtualCluster(5, bandwidth=1e5, latency=0.01, seed=seed)
    cluster.clock.trace = trace = []
    cluster.freeze(1, 0.3, at=0.2)
    cluster.slow(2, 3.0, at=0.1)
    cluster.cut(3, 4, seconds=0.2, at=0.15)
    weights = [torch.full((10,), float(me)) for me in range(5)]
    cluster.run({c.me: gossip(c, 20, weights[c.me], 0.03) for c in cluster.carriers})
    return trace, [w.tolist() for w in weights]


def test_a_seed_says_it_all() -> None:
    assert trace_of(seed=3) == trace_of(seed=3)
    assert trace_of(seed=3)[0] != trace_of(seed=4)[0]


def test_slow_stretches_what_is_left_of_the_computing() -> None:
    cluster = exact()
    cluster.slow(0, 2.0, at=1.5)
    assert cluster.run({0: times_of(cluster, [1.0, 1.0, 1.0])}) == {0: [1.0, 2.5, 4.5]}


def test_a_frozen_members_time_stands_still() -> None:
    cluster = exact()
    cluster.freeze(0, 2.0, at=1.5)
    cluster.freeze(0, 1.0, at=2.0)  # within the other
    results = cluster.run({0: times_of(cluster, [1.0, 1.0]), 1: times_of(cluster, [1.0, 1.0])})
    assert results == {0: [1.0, 4.0], 1: [1.0, 2.0]}


def test_a_frozen_member_that_waits_is_not_resumed_before_the_thaw() -> None:
    cluster = exact()
    cluster.freeze(1, 4.0, at=0.5)
    cluster.carriers[0].post(1, Message(KIND))
    assert cluster.run({1: receive(cluster, 1, KIND)}) == {1: [(0, 4.5)]}


def test_a_killed_program_is_closed_and_has_no_result() -> None:
    cluster = exact()
    closed = []

    def program() -> Program:
        try:
            yield 10.0
        finally:
            closed.append(cluster.time)

    cluster.kill(0, at=2.0)
    assert cluster.run({0: program(), 1: times_of(cluster, [3.0])}) == {1: [3.0]}
    assert closed == [2.0]
    assert cluster.run({0: program()}) == {}


def test_programs_of_a_second_run_go_on_from_there() -> None:
    cluster = exact()
    cluster.run({0: sleep(1.0)})
    assert cluster.run({0: times_of(cluster, [1.0])}) == {0: [2.0]}


def test_deadlock_names_every_wait() -> None:
    cluster = exact(patience=5)

    def waits(words: str) -> Program:
        while True:
            yield words

    with pytest.raises(Deadlock, match=r"member 0 waits for a letter; member 1 waits for Godot") as error:
        cluster.run({0: receive(cluster, 0, KIND), 1: waits("Godot"), 2: sleep(3.0)})
    assert "member 2" not in str(error.value)


def test_time_outs_of_a_program_are_noticed_though_nothing_is_under_way() -> None:
    cluster = exact()
    carrier = cluster.carriers[0]

    def patient() -> Program:
        start = carrier.now()
        while carrier.now() < start + 20:
            yield "somebody"
        return carrier.now() - start

    assert 20 <= cluster.run({0: patient()})[0] < 21.1


def test_who_waits_too_long_is_named() -> None:
    cluster = exact(2, limit=10.0)
    with pytest.raises(TimeoutError, match=r"member 0 waited 1\d\.\d s for a letter"):
        cluster.run({0: receive(cluster, 0, KIND), 1: sleep(*[1.0] * 100)})


def test_an_error_says_whose_it_is() -> None:
    cluster = exact()

    def fails() -> Program:
        yield 1.0
        raise KeyError("x")

    with pytest.raises(KeyError) as error:
        cluster.run({0: sleep(5.0), 2: fails()})
    assert any("member 2" in note for note in getattr(error.value, "__notes__", ["member 2"]))
    assert cluster.run({0: times_of(cluster, [1.0])}) == {0: [2.0]}  # nothing of the failed run is left


def test_a_program_may_not_pass_time_in_any_other_way() -> None:
    cluster = exact()

    def cheats() -> Program:
        yield 1.0
        cluster.carriers[0].wait(1.0)

    with pytest.raises(RuntimeError, match="by yielding"):
        cluster.run({0: cheats()})


# -- faults ----------------------------------------------------------------------------------------------------------


def views(cluster: VirtualCluster) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(carrier.live(), carrier.members()) for carrier in cluster.carriers]


ALL = (0, 1, 2)


def test_frozen_member_is_not_live_after_silence_and_back_after_the_thaw() -> None:
    cluster = exact()
    cluster.freeze(1, 20.0)
    cluster.advance(4.9)
    assert views(cluster) == [(ALL, ALL)] * 3
    cluster.advance(0.2)
    assert [live for live, _ in views(cluster)] == [(0, 2), ALL, (0, 2)]
    assert not cluster.carriers[0].free(1, KIND)
    assert not cluster.carriers[0].post(1, Message(KIND))
    cluster.advance(15.0)
    assert views(cluster) == [(ALL, ALL)] * 3
    assert cluster.carriers[0].post(1, Message(KIND))


def test_frozen_member_is_dead_after_patience_and_stays_dead() -> None:
    cluster = exact()
    cluster.freeze(1, 60.0)
    cluster.advance(49.9)
    assert cluster.carriers[0].members() == ALL
    cluster.advance(1.2)
    assert cluster.carriers[0].members() == cluster.carriers[2].live() == (0, 2)
    cluster.advance(60.0)
    assert cluster.carriers[0].members() == cluster.carriers[2].live() == (0, 2)
    assert not cluster.carriers[1].post(0, Message(KIND))


def test_killed_member_is_dead_after_silence() -> None:
    cluster = exact()
    cluster.kill(2)
    cluster.advance(4.9)
    assert cluster.carriers[0].live() == ALL
    cluster.advance(1.2)
    assert cluster.carriers[0].live() == cluster.carriers[0].members() == (0, 1)


def test_a_loss_is_reported_once_with_its_body() -> None:
    cluster = exact()
    cluster.carriers[0].post(1, Message(KIND, torch.arange(3.0), weight=7))
    cluster.carriers[0].post(1, Message(KIND + 1))
    cluster.carriers[0].post(2, Message(KIND))
    cluster.kill(1, at=0.5)
    losses = cluster.run({0: until_lost(cluster.carriers[0])})[0]
    assert [(x.peer, x.number, x.message.kind) for x in losses] == [(1, 1, KIND), (1, 2, KIND + 1)]
    assert losses[0].message.body.tolist() == [0, 1, 2]
    assert losses[0].message.weight == 7
    assert cluster.carriers[0].lost() == []
    assert cluster.time == pytest.approx(6.5)  # killed at 0.5, silence of 5, the news takes 1


def test_what_was_folded_and_acknowledged_is_not_lost() -> None:
    cluster = exact()
    cluster.carriers[0].post(1, Message(KIND))
    cluster.advance(1.5)
    (letter,) = cluster.carriers[1].take(KIND)
    cluster.carriers[1].folded(letter)
    cluster.kill(1)
    cluster.advance(20.0)
    assert cluster.carriers[0].members() == (0, 2)
    assert cluster.carriers[0].lost() == []


def test_killed_senders_bulk_is_gone_and_what_had_left_arrives() -> None:
    cluster = exact()
    cluster.carriers[0].post(1, Message(KIND, torch.zeros(MB)))
    cluster.carriers[0].post(2, Message(KIND, torch.zeros(MB)))
    cluster.carriers[0].post(2, Message(MARKER))  # behind what is gone, so it is gone too
    cluster.kill(0, at=1.5)
    cluster.advance(4.0)
    assert len(cluster.carriers[1].take(KIND)) == 1
    assert cluster.carriers[2].take(KIND) + cluster.carriers[2].take(MARKER) == []


def test_a_cut_holds_back_and_keeps_the_order() -> None:
    cluster = exact()
    sender, receiver = cluster.carriers[0], cluster.carriers[1]
    cluster.cut(0, 1, seconds=4.0)
    for kind in (KIND, KIND + 1):
        sender.post(1, Message(kind))
    cluster.advance(3.5)
    sender.post(1, Message(KIND + 2))
    assert receiver.take(KIND) == []
    cluster.advance(0.5)
    letters: list[Letter] = [x for k in range(3) for x in receiver.take(KIND + k)]
    assert [x.number for x in letters] == [1, 2]
    cluster.advance(0.6)
    assert [x.number for x in receiver.take(KIND + 2)] == [3]


def test_a_cut_between_two_hushes_them_for_each_other() -> None:
    cluster = exact()
    cluster.cut(2, 1, seconds=10.0)
    cluster.advance(6.0)
    assert [live for live, _ in views(cluster)] == [ALL, (0, 1), (0, 2)]
    cluster.advance(5.0)
    assert views(cluster) == [(ALL, ALL)] * 3


def test_a_cut_between_two_that_never_heals_ends_the_higher_one() -> None:
    cluster = exact()
    cluster.cut(2, 1)
    cluster.carriers[1].post(2, Message(KIND))
    cluster.advance(52.0)
    assert cluster.carriers[0].members() == cluster.carriers[1].members() == (0, 1)
    assert len(cluster.carriers[1].lost()) == 1


def test_a_cut_link_of_a_dead_member_ends_nobody_else() -> None:
    cluster = exact()
    cluster.cut(2, 1)
    cluster.kill(1)
    cluster.advance(60.0)
    assert cluster.carriers[0].members() == (0, 2)


def tokens(carrier: Carrier, start: float, end: float, chance: random.Random, book: Book) -> Program:
    """Post tokens to anybody until `end` after `start`, then fold for as long again."""
    while carrier.now() < start + 2 * end:
        yield 0.02 + 0.05 * chance.random()
        for letter in [letter for kind in (KIND, KIND + 1) for letter in carrier.take(kind)]:
            book.folded.append((letter.peer, carrier.me, letter.number))
            carrier.folded(letter)
        book.lost += [(carrier.me, loss.peer, loss.number) for loss in carrier.lost()]
        peer = chance.randrange(carrier.world)
        message = Message(KIND + chance.randrange(2), torch.zeros(chance.choice([0, 5, 2000])))
        if carrier.now() < start + end and peer != carrier.me and carrier.post(peer, message):
            number = book.posted.get((carrier.me, peer), 0) + 1
            book.posted[carrier.me, peer] = number


@dataclass
class Book:
    """What was posted on each link, and the (sender, receiver, number) of what was folded and lost."""

    posted: dict[tuple[int, int], int] = field(default_factory=dict)
    folded: list[tuple[int, int, int]] = field(default_factory=list)
    lost: list[tuple[int, int, int]] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(20))
def test_under_any_faults_a_message_is_folded_once_or_lost_once(seed: int) -> None:
    n, chance, book = 5, random.Random(seed), Book()
    cluster = VirtualCluster(n, bandwidth=1e5, latency=0.01, seed=seed, silence=0.5, patience=2.0)
    for _ in range(6):
        at, seconds, (a, b) = 5 * chance.random(), 3 * chance.random(), chance.sample(range(n), 2)
        faults = [
            lambda a=a, b=b, s=seconds, at=at: cluster.cut(a, b, seconds=s, at=at),
            lambda a=a, s=seconds, at=at: cluster.cut(a, seconds=s, at=at),
            lambda a=a, s=seconds, at=at: cluster.freeze(a, s, at=at),
            lambda a=a, at=at: cluster.kill(a, at=at),
        ]
        chance.choices(faults, weights=[3, 2, 3, 1])[0]()
    for late in random.Random(seed).sample(range(n), seed % 3):
        cluster.join(late, at=6 * chance.random())
    survivors = set(cluster.run({c.me: tokens(c, c.now(), 8.0, chance, book) for c in cluster.carriers}))
    assert len(set(book.folded)) == len(book.folded)
    assert len(set(book.lost)) == len(book.lost)
    ended = set(book.folded) | set(book.lost)
    for (sender, receiver), count in book.posted.items():
        on_link = [number for s, r, number in book.folded if (s, r) == (sender, receiver)]
        assert len(on_link) <= count
        if sender in survivors:
            assert {(sender, receiver, number) for number in range(1, count + 1)} <= ended
        if {sender, receiver} <= survivors:
            assert sorted(on_link) == list(range(1, count + 1))
    assert all(receiver not in survivors for _, receiver, _ in book.lost)


def test_who_is_cut_off_hears_nobody_and_keeps_what_it_knew() -> None:
    cluster = exact()
    cluster.carriers[1].publish(b"before")
    cluster.carriers[0].propose("known", b"1")
    cluster.advance(3.0)
    assert cluster.carriers[0].notes() == {1: b"before"}
    cluster.cut(0, seconds=20.0)
    cluster.carriers[0].propose("key", b"0")
    cluster.carriers[0].draw("counter", 3)
    cluster.carriers[1].propose("key", b"1")
    cluster.carriers[1].draw("counter", 3)
    cluster.carriers[1].publish(b"after")
    cluster.advance(6.0)
    assert [live for live, _ in views(cluster)] == [(0,), (1, 2), (1, 2)]
    assert cluster.carriers[0].notes() == {1: b"before"}
    assert [c.decided("key") for c in cluster.carriers] == [None, b"1", b"1"]
    assert [c.decided("known") for c in cluster.carriers] == [b"1"] * 3
    assert cluster.carriers[1].drawn("counter") == [(0, 3)]
    cluster.advance(20.0)
    assert [c.decided("key") for c in cluster.carriers] == [b"1"] * 3
    assert cluster.carriers[0].notes() == {1: b"after"}
    assert cluster.carriers[0].drawn("counter") == [(3, 3)]
    assert views(cluster) == [(ALL, ALL)] * 3


def test_who_is_cut_off_for_good_is_dead() -> None:
    cluster = exact()
    cluster.cut(0)
    results = cluster.run({0: times_of(cluster, [100.0]), 1: until_lost_or(cluster.carriers[1], 55.0), 2: sleep(60.0)})
    assert 0 not in results
    assert cluster.carriers[1].members() == (1, 2)


def until_lost_or(carrier: Carrier, seconds: float) -> Program:
    assert carrier.post(0, Message(KIND))
    yield seconds
    assert len(carrier.lost()) == 1


def test_overlapping_faults_are_one_silence() -> None:
    cluster = exact()
    cluster.freeze(1, 4.0)
    cluster.cut(1, seconds=4.0, at=3.0)
    cluster.advance(5.1)
    assert cluster.carriers[0].live() == (0, 2)
    cluster.advance(2.0)
    assert cluster.carriers[0].live() == ALL


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "`n` must be at least 1"),
        ({"bandwidth": 0.0}, "`bandwidth` must be positive or None"),
        ({"latency": -1.0}, "must not be negative"),
        ({"silence": 40.0}, "at most `patience`"),
        ({"bandwidth": math.nan}, "`bandwidth`"),
    ],
)
def test_knobs_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VirtualCluster(**{"n": 2, **options})


def test_faults_are_checked() -> None:
    cluster = exact()
    with pytest.raises(ValueError, match="no member 3 among the 3"):
        cluster.kill(3)
    with pytest.raises(ValueError, match="`factor` must be positive"):
        cluster.slow(0, 0.0)
    with pytest.raises(ValueError, match="no link to itself"):
        cluster.cut(1, 1)


# -- joins -----------------------------------------------------------------------------------------------------------


def test_a_late_member_is_a_member_that_nobody_hears_and_nothing_reaches() -> None:
    cluster = exact()
    cluster.join(1, at=100.0)  # patience is 50
    for _ in range(2):
        assert views(cluster) == [((0, 2), ALL), ((1,), ALL), ((0, 2), ALL)]
        assert not cluster.carriers[0].free(1, KIND)
        assert not cluster.carriers[0].post(1, Message(KIND))
        assert not cluster.carriers[1].post(0, Message(KIND))
        cluster.advance(99.0 - cluster.time)
    cluster.advance(1.0)
    assert views(cluster) == [(ALL, ALL)] * 3
    assert cluster.carriers[0].post(1, Message(KIND))
    assert cluster.carriers[1].post(0, Message(KIND))
    cluster.advance(200.0)
    assert views(cluster) == [(ALL, ALL)] * 3
    assert [len(carrier.take(KIND)) for carrier in cluster.carriers] == [1, 1, 0]


def test_a_late_members_program_begins_when_it_joins() -> None:
    cluster = exact()
    cluster.join(1, at=7.0)
    cluster.slow(1, 2.0, at=3.0)
    assert cluster.run({0: times_of(cluster, [1.0]), 1: times_of(cluster, [1.0, 1.0])}) == {0: [1.0], 1: [9.0, 11.0]}
    assert cluster.run({1: times_of(cluster, [1.0])}) == {1: [13.0]}


def test_who_waits_looks_when_a_late_member_joins() -> None:
    cluster = exact()
    cluster.join(1, at=7.0)

    def until_live() -> Program:
        while 1 not in cluster.carriers[0].live():
            yield "member 1"
        return cluster.time

    assert cluster.run({0: until_live(), 1: sleep(1.0)})[0] == 7.0


def test_a_late_member_knows_what_was_decided_and_who_died() -> None:
    cluster = exact()
    cluster.join(2, at=20.0)
    cluster.carriers[0].propose("key", b"0")
    cluster.carriers[0].publish(b"note")
    cluster.kill(1, at=2.0)
    cluster.advance(20.0)
    late = cluster.carriers[2]
    assert (late.members(), late.live(), late.lost()) == ((0, 2), (0, 2), [])
    assert (late.decided("key"), late.notes()) == (b"0", {0: b"note"})


@pytest.mark.parametrize("thaw", [90.0, 110.0, 160.0])
def test_patience_with_a_late_member_that_is_frozen_begins_when_it_joins(thaw: float) -> None:
    cluster = exact()
    cluster.join(1, at=100.0)
    cluster.freeze(1, thaw - 10.0, at=10.0)

    def watch() -> Program:
        seen = []
        for nap in (95.0, 6.0, 48.5):
            yield nap
            seen.append(1 in cluster.carriers[0].live())
        return seen

    came = cluster.run({0: watch(), 1: times_of(cluster, [1.0])})
    assert came[0] == [False, thaw < 100, thaw < 150]
    assert came.get(1) == (None if thaw > 150 else [max(thaw, 100.0) + 1.0])
    assert cluster.carriers[0].members() == ALL
    cluster.advance(3.0)
    assert cluster.carriers[0].members() == ((0, 2) if thaw > 150 else ALL)


def test_patience_with_a_cut_link_of_a_late_member_begins_when_it_joins() -> None:
    cluster = exact()
    cluster.join(1, at=100.0)
    cluster.cut(1, 2)
    cluster.advance(149.0)
    assert [live for live, _ in views(cluster)] == [ALL, (0, 1), (0, 2)]
    assert [members for _, members in views(cluster)] == [ALL] * 3
    cluster.advance(3.0)
    assert cluster.carriers[0].members() == (0, 1)


def test_a_late_member_that_is_killed_before_never_comes() -> None:
    cluster = exact()
    cluster.join(1, at=100.0)
    cluster.kill(1, at=10.0)
    assert cluster.run({1: sleep(1.0), 0: sleep(149.5)}) == {0: None}
    assert (cluster.carriers[0].members(), cluster.carriers[0].live()) == (ALL, (0, 2))
    cluster.advance(3.0)
    assert cluster.carriers[0].members() == (0, 2)


def test_joins_are_checked() -> None:
    cluster = exact()
    with pytest.raises(ValueError, match="no member 3 among the 3"):
        cluster.join(3, at=1.0)
    for at in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"`at` must be a number of seconds above 0, got {at}"):
            cluster.join(1, at=at)
    cluster.join(1, at=1.0)
    with pytest.raises(ValueError, match="member 1 joins at another time already"):
        cluster.join(1, at=2.0)
    cluster.advance(0.5)
    with pytest.raises(RuntimeError, match="member 2 is there already: say who comes late before any time has passed"):
        cluster.join(2, at=1.0)


# -- speed -----------------------------------------------------------------------------------------------------------


def race(members: int, steps: int, elements: int) -> float:
    """Seconds of a real core for a ring of gossip. (A thousand members with real gradients: `benchmarks.thousand`.)"""
    cluster = VirtualCluster(members, bandwidth=1e8)
    weights = [torch.zeros(elements) for _ in range(members)]
    start = time.process_time()
    folds = cluster.run({c.me: gossip(c, steps, weights[c.me], 0.01) for c in cluster.carriers})
    assert sum(folds.values()) >= 0.4 * members * steps  # a slot is free again a step later
    return time.process_time() - start


def test_it_is_fast() -> None:
    assert race(members=200, steps=25, elements=1000) < 6.0  # about 0.1 s when nothing else runs
