"""The carrier of real runs: several members over one store, and processes that are killed and stopped."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore
from torch.distributed.distributed_c10d import Store

from lightning_async.transport import header as wire_header
from lightning_async.transport.cluster import ClusterCarrier
from lightning_async.transport.mail import Carrier, Letter, Message
from tests.transport.worlds import BUSY

FORK = multiprocessing.get_context("fork")
KIND = 20


def until(carriers: list[ClusterCarrier], condition: Callable[[], object], limit: float = BUSY) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it never happened"
        carriers[0].wait(0.001)


def take(carriers: list[ClusterCarrier], carrier: ClusterCarrier, kind: int = KIND) -> Letter:
    found: list[Letter] = []
    until(carriers, lambda: found.extend(carrier.take(kind)) or found)
    return found[0]


def linked(carriers: list[ClusterCarrier]) -> bool:
    return all(a.free(b.me, 63) for a in carriers for b in carriers if a is not b)


def make(store: Store, me: int, world: int, **knobs: Any) -> ClusterCarrier:
    knobs = {"silence": 0.5, "patience": 20.0, "tick": 0.02, "interface": "lo", **knobs}
    return ClusterCarrier(store=store, me=me, world=world, run="test", **knobs)


@pytest.fixture
def store() -> Store:
    """For members in one process; a TCP store looks up names, which takes seconds where the name service is slow."""
    return HashStore()


@pytest.fixture
def cluster(store: Store) -> Iterator[Callable[..., list[ClusterCarrier]]]:
    with ExitStack() as stack:

        def start(n: int, **knobs: Any) -> list[ClusterCarrier]:
            carriers = [make(store, me, n, **knobs) for me in range(n)]
            for carrier in carriers:
                stack.callback(carrier.close)
                carrier.start()
            until(carriers, lambda: linked(carriers))
            return carriers

        yield start


Cluster = Callable[..., list[ClusterCarrier]]


def test_it_is_a_carrier(store: Store) -> None:
    carrier: Carrier = make(store, 1, 3)
    assert (carrier.me, carrier.world, carrier.members(), carrier.live()) == (1, 3, (0, 1, 2), (1,))


def test_a_post_without_a_link_is_refused_and_asks_for_one(store: Store) -> None:
    carriers = [make(store, me, 3, tick=10.0) for me in range(3)]
    with carriers[0], carriers[1], carriers[2]:
        assert not carriers[0].post(1, Message(KIND))
        begin = time.monotonic()
        until(carriers, lambda: carriers[0].post(1, Message(KIND, torch.ones(3))))
        assert time.monotonic() - begin < 2
        letter = take([carriers[1]], carriers[1])
        assert (letter.peer, letter.number) == (0, 1)
        assert set(carriers[0]._links.by_peer) == {1}
        assert set(carriers[2]._links.by_peer) == set()


def test_a_first_link_that_is_wanted_late_is_given_its_time(store: Store) -> None:
    """Before it was wanted nobody was silent on it, for however long."""
    a, b = carriers = [make(store, me, 2) for me in range(2)]
    with a, b:
        until(carriers, lambda: all(c.live() == (0, 1) for c in carriers))
        for c in carriers:
            c._links._lines._quiet[1 - c.me] = 2 * 20.0  # of patience
        until(carriers, lambda: a.failed or b.failed or a.post(1, Message(KIND, torch.ones(3))))
        assert (take([b], b).peer, a.members(), a.failed, b.failed) == (0, (0, 1), None, None)


def test_mail_of_all_to_all(cluster: Cluster) -> None:
    carriers = cluster(4)
    for round_ in range(20):
        for a in carriers:
            a.at(round_)
            for b in carriers:
                if a is not b:
                    until(carriers, lambda a=a, b=b: a.free(b.me, KIND))
                    assert a.post(b.me, Message(KIND, torch.full((2000,), float(a.me)), step=round_))
        for a in carriers:
            letters: list[Letter] = []
            until(carriers, lambda a=a, letters=letters: letters.extend(a.take(KIND)) or len(letters) == 3)
            for letter in letters:
                assert letter.message.step == round_
                assert torch.equal(letter.message.body, torch.full((2000,), float(letter.peer)))  # type: ignore[arg-type]
                a.folded(letter)
    for a in carriers:
        assert all(row[KIND].messages_in == 20 and row[KIND].bytes_out == 160_000 for row in a.traffic().values())


def test_wait_returns_at_news_and_not_before(cluster: Cluster) -> None:
    a, b = cluster(2, silence=10.0)
    until([b], lambda: b.free(0, KIND))
    b.wait(0.0)
    later = threading.Timer(0.2, lambda: a.post(1, Message(KIND)))
    later.start()
    begin = time.monotonic()
    while not b.take(KIND):
        b.wait(5.0)
    assert time.monotonic() - begin < 2
    later.join()


def test_decisions_and_tickets(cluster: Cluster) -> None:
    carriers = cluster(3)
    for carrier in carriers:
        carrier.propose("winner", bytes([carrier.me]))
        carrier.draw("tickets", 2)
        carrier.publish(b"I am %d" % carrier.me)
    until(carriers, lambda: all(carrier.decided("winner") for carrier in carriers))
    assert len({carrier.decided("winner") for carrier in carriers}) == 1
    drawn: list[tuple[int, int]] = []
    until(carriers, lambda: drawn.extend(d for c in carriers for d in c.drawn("tickets")) or len(drawn) == 3)
    assert sorted(drawn) == [(0, 2), (2, 2), (4, 2)]
    until(carriers, lambda: carriers[0].notes() == {k: b"I am %d" % k for k in range(3)})


def test_one_that_leaves_is_dead_at_once_and_its_unfolded_mail_is_lost(cluster: Cluster) -> None:
    a, b, c = cluster(3)
    assert b.post(0, Message(KIND, torch.arange(5)))
    assert a.post(1, Message(KIND, torch.arange(3), weight=7))
    until([b], lambda: KIND in b.traffic()[0] and b.traffic()[0][KIND].messages_in)
    until([a], lambda: a.traffic()[1][KIND].messages_in)
    begin = time.monotonic()
    b.close()
    until([a], lambda: a.members() == (0, 2))
    assert time.monotonic() - begin < 2
    (loss,) = a.lost()
    assert (loss.peer, loss.number, loss.message.weight) == (1, 1, 7)
    assert torch.equal(loss.message.body, torch.arange(3))  # type: ignore[arg-type]
    assert a.lost() == []
    assert not a.free(1, KIND)
    assert not a.post(1, Message(KIND))
    letter = take([a], a)
    assert torch.equal(letter.message.body, torch.arange(5)), "what it sent stays"  # type: ignore[arg-type]
    a.folded(letter)
    assert c.lost() == []
    assert a.post(2, Message(KIND)), "others are not concerned"


def test_a_link_that_breaks_is_mended_and_loses_nothing(cluster: Cluster) -> None:
    a, b = cluster(2)
    assert a.post(1, Message(KIND, torch.ones(1000)))
    letter = take([b], b)
    assert a.post(1, Message(KIND + 1, torch.ones(2000)))
    a._links.by_peer[1].line.wire.cancel()  # type: ignore[union-attr]
    b.folded(letter)
    until([a], lambda: a._links.by_peer.get(1) is not None and a._links.by_peer[1].generation > 1 and a.free(1, KIND))
    assert take([b], b, KIND + 1).message.body.numel() == 2000  # type: ignore[union-attr]
    assert not a.free(1, KIND + 1)
    assert a.lost() == b.lost() == []
    assert a.members() == (0, 1)


def test_two_that_beat_but_cannot_talk_do_not_go_on_for_ever(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    carriers = cluster(3)
    links = carriers[0]._links
    monkeypatch.setattr("lightning_async.transport.links.Link", lambda *args, **knobs: _Deaf())
    links.by_peer[2].line.wire.cancel()  # type: ignore[union-attr]
    until(carriers, lambda: isinstance(links.by_peer.get(2), _Deaf))
    assert carriers[0].members() == (0, 1, 2)
    quiet = links._lines._quiet  # all the patience with one line is spent; a shorter one would end others' lives too
    until(carriers, lambda: quiet.update({2: 2 * 20.0}) or carriers[2].failed is not None)
    assert "no connection with member 0" in (carriers[2].failed or "")
    until(carriers, lambda: carriers[0].members() == carriers[1].members() == (0, 1))


class _Deaf:
    """A link that never comes up."""

    error, refused, since = None, False, 0.0

    def __init__(self, generation: int = 1) -> None:
        self.state, self.generation = "opening", generation

    def close(self) -> bool:
        return True


def test_a_link_that_could_not_be_made_for_long_stays_when_it_is(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its greeting is a sign of life: nobody is asked for more before a ping is due."""
    monkeypatch.setattr("lightning_async.transport.link.PING", 10 * BUSY)
    carriers = a, b = cluster(2)
    with monkeypatch.context() as cut:
        cut.setattr("lightning_async.transport.links.Link", lambda *args, **knobs: _Deaf(knobs["generation"]))
        a._links.by_peer[1].line.wire.cancel()  # type: ignore[union-attr]
        until([a], lambda: all(isinstance(c._links.by_peer.get(1 - c.me), _Deaf) for c in carriers))
    looks = []
    for c in carriers:
        c._links._lines._quiet[1 - c.me] = 1.5 * 20.0  # of patience
        look = c._links.look
        monkeypatch.setattr(c._links, "look", lambda control, look=look: (looks.append(control), look(control))[1])
        c._links.by_peer[1 - c.me].state = "dead"  # type: ignore[misc]
    until([a], lambda: linked([a, b]))
    links = [c._links.by_peer[1 - c.me] for c in carriers]
    a._links._lines._quiet[1] = 2 * 20.0  # a moment later
    looks.clear()
    until([a], lambda: min(looks.count(c._control) for c in carriers) > 2)
    assert [c._links.by_peer.get(1 - c.me) for c in carriers] == links
    assert [(c.members(), c.failed) for c in carriers] == [((0, 1), None)] * 2


def test_who_freezes_in_a_rendezvous_has_all_the_patience(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection was closed: there was none."""
    carriers = a, b = [make(store, me, 2) for me in range(2)]
    frozen, thawed, tick = threading.Event(), threading.Event(), b._control._one_tick

    def freeze(store: Any) -> None:
        frozen.set()
        assert thawed.wait(BUSY)
        tick(store)

    def alone(*args: Any, **knobs: Any) -> None:
        raise RuntimeError("the other one did not come")

    with a, b:
        until(carriers, lambda: all(c.live() == (0, 1) for c in carriers))
        try:
            with monkeypatch.context() as cut:
                cut.setattr("lightning_async.transport.link.Wire", alone)
                until(carriers, lambda: a.post(1, Message(KIND)) or a._links._generations.get(1, 0) > 1)
                cut.setattr(b._control, "_one_tick", freeze)
                assert frozen.wait(BUSY)
                until([a], lambda: a.live() == (0,))
                assert a.members() == (0, 1)
        finally:
            thawed.set()
        until(carriers, lambda: linked(carriers))
        assert [(c.members(), c.failed) for c in carriers] == [((0, 1), None)] * 2


def test_a_peer_of_another_version_is_a_fault_of_both(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both are heard, so that all others can be told."""
    versions, pack = iter([1, 2]), wire_header.pack_into

    def pack_one_of_each(buffer: memoryview, header: wire_header.Header, *, run: int) -> None:
        pack(buffer, header, run=run)
        buffer[8:16] = next(versions).to_bytes(8, "little")

    monkeypatch.setattr("lightning_async.transport.line.pack_into", pack_one_of_each)
    monkeypatch.setattr("lightning_async.transport.header.PROTOCOL", 9)
    carriers = a, b = [make(store, me, 2, peers=[1 - me]) for me in range(2)]
    with a, b:
        until(carriers, lambda: a.fault and b.fault)
        for c in carriers:
            assert "of the protocol" in str(c.fault)
            assert c.failed == str(c.fault)
        a._control.roll.condemn(1, "for this test")
        until(carriers, lambda: b.fault is None)
        assert "for this test" in (b.failed or "")


def test_one_who_is_to_come_is_waited_for(store: Store) -> None:
    """Also by the links: with nobody there they are not silent, but not there yet."""
    with make(store, 0, 2, peers=[1], silence=0.2, patience=0.2, late=math.inf) as carrier:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            carrier.wait(0.01)
            assert carrier.members() == (0, 1)


def test_lingering_lets_the_last_words_arrive(cluster: Cluster) -> None:
    a, b = cluster(2)
    got: list[Letter] = []

    def fold() -> None:
        got.append(take([b], b))
        b.folded(got[0])

    assert a.post(1, Message(KIND, torch.ones(1 << 20)))
    folder = threading.Thread(target=fold)
    folder.start()
    begin = time.monotonic()
    a.close(linger=5.0)
    assert time.monotonic() - begin < 3
    folder.join()
    assert got[0].message.body.sum() == 1 << 20  # type: ignore[union-attr]


def test_lingering_ends_when_the_last_word_has_left(cluster: Cluster) -> None:
    """Also where that is no news: the other end's slot is free, and nothing more comes of it here."""
    a, b = cluster(2)
    assert a.post(1, Message(KIND, torch.ones(10)))
    letter = take([b], b)
    with b.gathered("later"):
        b.folded(letter)
    begin = time.monotonic()
    b.close(linger=2 * BUSY)
    assert time.monotonic() - begin < BUSY
    until([a], lambda: a.traffic()[1][KIND].seconds_out > 0)


def test_starting_and_closing_twice_and_never(store: Store) -> None:
    before = len(os.listdir("/proc/self/task"))
    never = make(store, 0, 2)
    never.close()
    a, b = make(store, 0, 2, peers=[1]), make(store, 1, 2)
    for _ in range(2):
        a.start()
        b.start()
    until([a], lambda: a.free(1, KIND))
    for _ in range(2):
        a.close()
        b.close()
    a.start()
    assert not a.post(1, Message(KIND))
    until([never], lambda: len(os.listdir("/proc/self/task")) <= before)  # one of an earlier test may have been ending


def test_a_control_thread_that_outlives_the_carrier_opens_no_link(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store held it up, as it does while its host is frozen, and the peer still wants one."""
    a, b = cluster(2)
    held, go_on, tick = threading.Event(), threading.Event(), a._control._one_tick

    def frozen(store: Any) -> None:
        held.set()
        assert go_on.wait(BUSY)
        tick(store)

    monkeypatch.setattr(a._control, "_one_tick", frozen)
    assert held.wait(BUSY)
    control = a._control._thread
    a.close()
    assert control.is_alive()
    until([b], lambda: b._links._generations[0] == 2)
    go_on.set()
    control.join(BUSY)
    assert not control.is_alive()
    assert a._links.by_peer == {}
    until([b], lambda: not any(thread.name.startswith("link-0-") for thread in threading.enumerate()))


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"max_bytes": -1}, "max_bytes"),
        ({"fragment_bytes": 0}, "fragment_bytes"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"tick": 0}, "tick"),
        ({"silence": 3.0, "patience": 1.0}, "silence"),
        ({"peers": [0]}, "member 0"),
        ({"peers": [2]}, "peer"),
        ({"members": [1]}, "members"),
    ],
)
def test_impossible_knobs_are_refused(store: Store, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(store, 0, 2, **knobs)


def test_what_cannot_travel_is_refused_also_without_a_link(store: Store) -> None:
    a = make(store, 0, 2, max_bytes=100)
    for peer, message in (
        (0, Message(KIND)),
        (2, Message(KIND)),
        (1, Message(64)),
        (1, Message(0)),
        (1, Message(KIND, torch.ones(26))),
        (1, Message(KIND, torch.ones(2, 2))),
        (1, Message(KIND, torch.ones(2, dtype=torch.complex64))),
        (1, Message(KIND, weight=2**63)),
    ):
        with pytest.raises(ValueError):
            a.post(peer, message)


# a member in a process of its own


def _member(port: int, me: int, world: int, shared_memory: bool, out: Connection) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False)
    with make(store, me, world, shared_memory=shared_memory) as carrier:
        until([carrier], lambda: carrier.post(0, Message(KIND, torch.ones(16 << 20))))
        out.send("posted")
        signal.pause()


@pytest.fixture(params=[True, False], ids=["memory", "network"])
def mixed(request: pytest.FixtureRequest) -> Iterator[tuple[list[ClusterCarrier], int]]:
    """Members 0 and 1 here, and the process id of member 2, which sends 64 MB to member 0 and folds nothing."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        gc.collect()  # a store's server that is garbage in the child makes it wait for a thread that was not forked
        mine, theirs = (stack.enter_context(end) for end in FORK.Pipe())
        process = FORK.Process(target=_member, args=(server.port, 2, 3, request.param, theirs))
        process.start()
        stack.callback(process.close)
        stack.callback(process.join)
        stack.callback(process.kill)
        carriers = [make(server, me, 3, shared_memory=request.param) for me in range(2)]
        for carrier in carriers:
            stack.callback(carrier.close)
            carrier.start()
        until(carriers, lambda: linked(carriers) and carriers[0].free(2, KIND))
        assert mine.recv() == "posted"
        assert process.pid is not None
        yield carriers, process.pid


def test_a_killed_member_is_buried(mixed: tuple[list[ClusterCarrier], int]) -> None:
    (a, b), pid = mixed
    assert a.post(2, Message(KIND, torch.full((16 << 20,), 3.0)))
    until([a], lambda: a._links.by_peer[2].line.sending)
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    until([a], lambda: a.members() == b.members() == (0, 1))
    assert time.monotonic() - begin < 3, "a closed connection and silence are enough"
    assert "its connection was closed" in a._control.reasons[2], "that and silence are enough: nobody was patient"
    (loss,) = a.lost()
    assert loss.message.body.numel() == 16 << 20  # type: ignore[union-attr]
    assert b.lost() == []
    assert a.post(1, Message(KIND)), "the others go on"
    begin = time.monotonic()
    a.close()
    assert time.monotonic() - begin < 1, "no wait of it ran out, and of those the control thread's is the shortest"


def test_a_stopped_member_costs_nobody_anything(mixed: tuple[list[ClusterCarrier], int]) -> None:
    (a, b), pid = mixed
    assert a.post(2, Message(KIND, torch.full((16 << 20,), 3.0)))
    os.kill(pid, signal.SIGSTOP)
    until([a], lambda: a.live() == (0, 1))
    assert a.members() == (0, 1, 2)
    assert not a.post(2, Message(KIND + 1))
    begin = time.monotonic()
    for _ in range(20):
        until([a], lambda: a.post(1, Message(KIND, torch.ones(5000))))
        b.folded(take([b], b))
    assert time.monotonic() - begin < 2, "the other link does not notice"
    os.kill(pid, signal.SIGCONT)
    until([a], lambda: a.live() == (0, 1, 2))
    letter = take([a], a)
    assert letter.message.body.numel() == 16 << 20  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    a.close()
    assert time.monotonic() - begin < 1, "no wait of it ran out, and of those the control thread's is the shortest"
