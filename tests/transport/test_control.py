"""The control thread: agreement, tickets, notes, and the judgement of silence."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore
from torch.distributed.distributed_c10d import Store

from lightning_async.transport.control import Control
from lightning_async.transport.gloo import keys_of
from lightning_async.transport.heartbeat import Beat, Silence
from lightning_async.transport.requests import FLAGS, Requests
from tests.transport.far_store import far_store
from tests.transport.worlds import BUSY


def until(condition: Callable[[], object], limit: float = BUSY) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.0005)


def stays(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition()
        time.sleep(0.0005)


# beats and silence, as tables


@pytest.mark.parametrize(
    "beat",
    [Beat(1), Beat(2**40, {3: 1, 0: 9}), Beat(5, {}, b""), Beat(6, {1: 2}, bytes(range(256)) * 4), Beat(7, {}, b"=")],
)
def test_a_beat_is_read_as_it_was_written(beat: Beat) -> None:
    assert Beat.unpack(beat.pack()) == beat


def test_one_who_has_not_begun_has_no_beat() -> None:
    assert Beat.unpack(b"-") is None


LOOKS = {
    # name: [(time of the look, the peer's counter)], live, dead
    "never heard": ([(0.5, None), (1.0, None)], False, False),
    "heard": ([(0.5, 1)], True, False),
    "silent for less": ([(0.5, 1), (1.0, 1), (1.5, 1), (2.0, 1)], True, False),
    "silent": ([(0.5, 1), (1.0, 1), (1.5, 1), (2.0, 1), (2.5, 1)], False, False),
    "back": ([(0.5, 1), (1.0, 1), (1.5, 1), (2.0, 1), (2.5, 1), (3.0, 2)], True, False),
    "we were blind": ([(0.5, 1), (60.0, 1)], True, False),
    "blind, then silent": ([(0.5, 1), (60.0, 1), (61.0, 1), (62.0, 1)], False, False),
    "silent, then blind": ([(0.5, 1), (1.5, 1), (2.5, 1), (60.0, 1)], False, False),
    "silence before a blink is forgiven": ([(0.5, 1), (1.5, 1), (9.0, 1), (10.0, 1)], True, False),
    "out of patience": ([(0.5, 1), *((0.5 + n, 1) for n in range(1, 6))], False, True),
    "blind for all the patience": ([(0.5, 1), (10.0, 1), (20.0, 1), (30.0, 1)], True, False),
    "never came": ([(float(n), None) for n in range(1, 6)], False, True),
}


@pytest.mark.parametrize("name", LOOKS)
def test_silence(name: str) -> None:
    looks, live, dead = LOOKS[name]
    judge = Silence([1], silence=2.0, patience=5.0, start=0.0)
    for now, count in looks:
        judge.look(now=now, counts={} if count is None else {1: count})
    assert judge.live(1) is live
    assert (judge.verdict(1, broken=False) is not None) is dead


def test_one_who_is_to_come_is_judged_by_the_day_of_its_own() -> None:
    judge = Silence([1], silence=0.5, patience=1.0, start=0.0, late=3.0)
    for quarter in range(1, 12):
        judge.look(now=quarter / 4, counts={})
        assert judge.verdict(1, broken=False) is None
    judge.look(now=3.0, counts={})
    assert judge.verdict(1, broken=False) == "it did not come within 3 s"
    judge.look(now=3.25, counts={1: 1})
    for quarter in range(14, 19):
        judge.look(now=quarter / 4, counts={1: 1})
    assert "patience is 1 s" in (judge.verdict(1, broken=False) or "")


def test_a_broken_link_ends_patience() -> None:
    judge = Silence([1], silence=2.0, patience=30.0, start=0.0)
    judge.look(now=0.5, counts={1: 1})
    judge.look(now=1.5, counts={1: 1})
    assert judge.verdict(1, broken=True) is None
    judge.look(now=2.5, counts={1: 1})
    assert judge.verdict(1, broken=False) is None
    assert "closed" in (judge.verdict(1, broken=True) or "")


@pytest.mark.parametrize(("silence", "patience"), [(0, 1), (-1, 1), (3, 2)])
def test_impossible_patience_is_refused(silence: float, patience: float) -> None:
    with pytest.raises(ValueError, match="silence"):
        Silence([], silence=silence, patience=patience, start=0.0)


# several control threads over one store


class Room:
    """Control threads of members 0, 1, ... in this process."""

    def __init__(self, store: Store, n: int, **knobs: float) -> None:
        knobs = {"silence": 0.4, "patience": 20.0, "tick": 0.02, **knobs}
        keys = keys_of(store, "run")
        self.all = [Control(keys, me=me, world=n, **knobs) for me in range(n)]  # type: ignore[arg-type]

    def __enter__(self) -> Room:
        for one in self.all:
            one.start()
        everybody = tuple(range(len(self.all)))
        until(lambda: all(one.live() == everybody for one in self.all))
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.all:
            assert one.stop(5.0)


@pytest.fixture
def store() -> Store:
    """For members in one process; a TCP store looks up names, which takes seconds where the name service is slow."""
    return HashStore()


def test_the_first_value_stays_and_all_agree(store: Store) -> None:
    with Room(store, 3) as room:
        for key in ("a", "b", "c"):
            for one in room.all:
                one.propose(key, bytes([one.me, 0, 255]))
        for key in ("a", "b", "c"):
            until(lambda key=key: all(one.decided(key) is not None for one in room.all))
            assert len({one.decided(key) for one in room.all}) == 1
        assert room.all[0].decided("nobody proposed this") is None


def test_an_empty_value_is_a_value(store: Store) -> None:
    with Room(store, 2) as room:
        room.all[0].propose("key", b"")
        until(lambda: room.all[1].decided("key") == b"")
        room.all[1].propose("key", b"late")
        until(lambda: not room.all[1]._requests._proposals)
        assert room.all[1].decided("key") == b""


def test_a_watched_key_is_found_at_once_by_one_who_waits(store: Store) -> None:
    with Room(store, 2, tick=0.5) as room:
        told = threading.Event()
        waiter = room.all[0]
        waiter._news = told.set
        assert waiter.decided("key") is None
        waiter.waiting(True)
        begin = time.monotonic()
        room.all[1].propose("key", b"now")
        until(lambda: waiter.decided("key") == b"now")
        assert time.monotonic() - begin < 0.25
        assert told.wait(1)
        waiter.waiting(False)


def test_no_wait_hurries_for_the_flags_of_the_run() -> None:
    """They are asked for before every batch; each tick looks for them."""
    requests = Requests()
    for flag in FLAGS:
        assert requests.decided(flag) is None
    assert not requests.watched
    assert not requests.open
    assert requests.decided("round0/1/0") is None
    assert requests.watched
    assert requests.open


def test_the_flags_are_looked_for_in_the_longest_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes out of it stops at once, and not behind the next one."""
    for seconds in ("WATCH_SECONDS", "FIRST_PAUSE"):
        monkeypatch.setattr(f"lightning_async.transport.requests.{seconds}", -1.0)
    requests, keys = Requests(), keys_of(store, "run")
    for key in ("stop", "another"):
        assert requests.decided(key) is None
    requests.answer(keys, said=0, anew=True)
    for key in ("stop", "another"):
        keys.compare_set(f"say/{key}", b"", b"=1")
    requests.answer(keys, said=1, anew=True)
    assert requests.decided("stop") == b"1"
    assert requests.decided("another") is None


@pytest.mark.parametrize("seconds", [1.0, 60.0, 3600.0])
def test_what_is_said_in_a_long_batch_is_found_behind_it(
    store: Store, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for a call as a stretch begins and behind each batch hears of it behind the one under way."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lightning_async.transport.requests.time", SimpleNamespace(monotonic=lambda: clock.now))
    requests, keys = Requests(), keys_of(store, "run")

    def batch(stretch: int, says: bool) -> bytes | None:
        clock.now += 0.9 * seconds
        requests.answer(keys, said=0, anew=True)
        if says:
            keys.compare_set(f"say/call/{stretch}", b"", b"=now")
        clock.now += 0.1 * seconds
        requests.answer(keys, said=0, anew=True)
        found, *_ = (requests.decided(f"call/{stretch}") for _ in range(3))
        return found

    for stretch, batches in enumerate([1, 1, 4, 2, 3]):
        assert requests.decided(f"call/{stretch}") is None
        for number in range(1, batches + 1):
            assert batch(stretch, number == batches) == (b"now" if number == batches else None)
    clock.now += 1e6
    requests.answer(keys, said=0, anew=True)
    assert not requests.watched


class Counting:
    """A store that counts how often it is asked for a key."""

    def __init__(self, store: Store) -> None:
        self.keys, self.asked = keys_of(store, "run"), 0

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        return self.keys.check(keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.keys, name)


def test_while_nothing_is_said_no_key_is_looked_for_twice(store: Store) -> None:
    mine, theirs, counting = Requests(), Requests(), Counting(store)

    def answer(requests: Requests, *, anew: bool = False) -> int:
        counting.asked = 0
        requests.answer(counting, said=counting.keys.add("said", 0), anew=anew)  # type: ignore[arg-type]
        return counting.asked

    for key in ("a", "b", "c"):
        assert mine.decided(key) is None
    assert [answer(mine), answer(mine)] == [3, 0]
    assert mine.decided("late") is None
    assert answer(mine) == 1, "what is new is looked for at once"
    mine.propose("of this member", b"")
    assert [answer(mine), answer(mine)] == [0, 0]
    theirs.propose("b", b"of another one")
    assert answer(theirs) == 0
    assert [answer(mine), answer(mine)] == [4, 0]
    assert mine.decided("b") == b"of another one"
    assert answer(mine, anew=True) == 3, "as at every beat"


def test_what_was_said_by_one_that_died_before_it_counted_it_is_heard(store: Store) -> None:
    with Room(store, 2) as room:
        assert room.all[0].decided("key") is None
        until(lambda: "key" in room.all[0]._requests._looked)
        keys_of(store, "run").compare_set("say/key", b"", b"=last words")
        until(lambda: room.all[0].decided("key") == b"last words")


def test_why_one_left_is_known_when_it_is_known_that_it_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Room(store, 2) as room:
        here, there = room.all
        assert here.decided("stop") is None
        until(lambda: "stop" in here._requests._looked)
        read, seen = here._read, []

        def late(*args: Any, **knobs: Any) -> None:
            if there in room.all:  # between two looks of this member: the other one says why, and leaves
                room.all.remove(there)
                there.propose("stop", b"1")
                until(lambda: there.decided("stop"))
                assert there.stop(5.0)
            read(*args, **knobs)
            seen.append((here.members(), here.decided("stop")))

        monkeypatch.setattr(here, "_read", late)
        until(lambda: seen)
        assert seen[0] == ((0,), b"1")


def test_tickets_go_to_one_member_each(store: Store) -> None:
    with Room(store, 3) as room:
        for turn in range(20):
            for one in room.all:
                one.draw("samples", 1 + (one.me + turn) % 3)
        drawn: list[tuple[int, int]] = []
        until(lambda: drawn.extend(d for one in room.all for d in one.drawn("samples")) or len(drawn) == 60)
        tickets = sorted(first + k for first, amount in drawn for k in range(amount))
        assert tickets == list(range(120))
        assert room.all[0].drawn("samples") == []
        with pytest.raises(ValueError, match="amount"):
            room.all[0].draw("samples", 0)


def test_notes_travel_and_outlive_their_member(store: Store) -> None:
    with Room(store, 3) as room:
        room.all[0].publish(b"old")
        room.all[0].publish(b"\x00new")
        assert room.all[0].notes() == {0: b"\x00new"}
        until(lambda: room.all[1].notes() == {0: b"\x00new"})
        room.all[0].publish(b"last")
        assert room.all[0].stop(5.0)
        until(lambda: room.all[1].members() == room.all[2].members() == (1, 2))
        assert room.all[1].notes() == {0: b"last"}
        assert "left" in room.all[1].reasons[0]
        with pytest.raises(ValueError, match="2048"):
            room.all[1].publish(b"x" * 2049)


def test_the_silent_are_not_live_and_the_patient_bury_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Room(store, 3, patience=1.0) as room:
        monkeypatch.setattr(room.all[2], "_leave", lambda store: None)
        assert room.all[2].stop(5.0)
        begin = time.monotonic()
        until(lambda: room.all[0].live() == (0, 1))
        assert room.all[0].members() == (0, 1, 2)
        until(lambda: all(one.members() == (0, 1) for one in room.all[:2]))
        assert 0.8 < time.monotonic() - begin < 3
        assert "patience" in room.all[0].reasons[2]
        assert room.all[0].reasons == room.all[1].reasons, "the first reason stays"


def test_one_that_was_declared_dead_is_told_and_never_comes_back(store: Store) -> None:
    with Room(store, 3) as room:
        room.all[0].roll.condemn(2, "for this test")
        until(lambda: room.all[2].failed is not None)
        assert "for this test" in (room.all[2].failed or "")
        until(lambda: room.all[0].members() == room.all[1].members() == (0, 1))
        stays(lambda: room.all[0].members() == room.all[1].live() == (0, 1), 0.3)


def test_who_was_not_there_at_the_start_is_no_member(store: Store) -> None:
    keys = keys_of(store, "run")
    assert Control(keys, me=0, world=3, members=[0, 2]).members() == (0, 2)
    with pytest.raises(ValueError, match="members"):
        Control(keys, me=0, world=3, members=[1, 2])
    with pytest.raises(ValueError, match="members"):
        Control(keys, me=0, world=3, members=[0, 3])


# the store's host


@pytest.fixture
def host() -> Iterator[tuple[int, int]]:
    with far_store() as found:
        yield found


def test_with_the_host_frozen_nobody_is_judged_and_nothing_blocks(host: tuple[int, int]) -> None:
    """Also for longer than its clients were told to wait when they were made: that is for reaching it."""
    pid, port = host
    store = TCPStore("127.0.0.1", port, is_master=False)
    store.set_timeout(timedelta(seconds=1))
    with Room(store, 3) as room:
        os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + 1.5  # nearly four times `silence`
        slowest = 0.0
        while time.monotonic() < end:
            begin = time.perf_counter()
            room.all[0].propose("key", b"v")
            room.all[0].decided("other")
            room.all[0].draw("d", 1)
            room.all[0].publish(b"note")
            assert room.all[0].live() == (0, 1, 2)
            slowest = max(slowest, time.perf_counter() - begin)
            time.sleep(0.01)
        os.kill(pid, signal.SIGCONT)
        stays(lambda: all(one.live() == (0, 1, 2) for one in room.all), 0.5)
        until(lambda: room.all[1].decided("key") == b"v")
        room.all[2].propose("behind it", b"w")
        until(lambda: room.all[1].decided("behind it") == b"w")
        assert [one.failed for one in room.all] == [None] * 3
        assert slowest < 0.2


def test_the_loss_of_the_host_is_told_in_words(host: tuple[int, int]) -> None:
    pid, port = host
    with Room(TCPStore("127.0.0.1", port, is_master=False), 2) as room:
        os.kill(pid, signal.SIGKILL)
        until(lambda: all(one.failed is not None for one in room.all), limit=3)
        assert "torchrun" in (room.all[0].failed or "")
        assert room.all[0].members() == (0, 1)


def test_notes_that_are_wanted_soon_do_not_wait_for_the_beat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a beat would take longer than the test."""
    with Room(store, 2, silence=4 * 60.0, patience=300.0) as room:
        for one in room.all:
            one._beat = 60.0
            one.publish(b"on time")
        until(lambda: all(one._due > time.monotonic() + 30 for one in room.all))
        room.all[0].publish(b"soon", soon=True)
        until(lambda: room.all[1].publish(b"me too", soon=True) or room.all[1].notes().get(0) == b"soon")
