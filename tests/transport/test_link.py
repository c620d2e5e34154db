"""One link: order, content and slots; strangers; and that it can be closed at any time, whatever the other end does."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pytest
import torch
from torch.distributed import HashStore, TCPStore
from torch.distributed.distributed_c10d import Store

from lightning_async.transport import header as wire_header
from lightning_async.transport import link as link_module
from lightning_async.transport.checks import DTYPES
from lightning_async.transport.gloo import Clients, keys_of
from lightning_async.transport.line import AHEAD
from lightning_async.transport.link import Link
from lightning_async.transport.mail import Letter, Message
from lightning_async.transport.pieces import Pieces
from lightning_async.transport.shared import SharedBodies
from lightning_async.transport.slots import HEADERS, Here, Inbox, Slots
from tests.transport.worlds import BUSY

FORK = multiprocessing.get_context("fork")


def until(condition: Callable[[], object], limit: float = BUSY) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.0005)


@dataclass
class End:
    """One end of a link with all that outlives the link."""

    store: Store
    me: int
    peer: int
    max_bytes: int = 1 << 30
    shared_memory: bool = True

    def __post_init__(self) -> None:
        self.here = Here()
        self.inbox = Inbox(here=self.here)
        self.slots = Slots(self.peer, inbox=self.inbox, here=self.here, max_bytes=self.max_bytes)
        self.clients = Clients(keys_of(self.store, "test"))

    def open(self, *, run: str = "run", generation: int = 1, fragment_bytes: int = 1 << 20) -> Link:
        self.link = Link(
            self.clients,
            me=self.me,
            slots=self.slots,
            here=self.here,
            run=run,
            generation=generation,
            pieces=Pieces(fragment_bytes),
            connect_timeout=10.0,
            interface="lo",
            shared_memory=self.shared_memory,
        )
        return self.link

    def take(self, kind: int) -> Letter:
        found: list[Letter] = []
        until(lambda: found.extend(self.inbox.take(kind)) or found)
        (letter,) = found
        return letter


@pytest.fixture
def store() -> Store:
    """For ends in one process; a TCP store looks up names, which takes seconds where the name service is slow."""
    return HashStore()


@pytest.fixture(params=["shared", "gloo", "one wants"])
def pair(store: Store, request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    a, b = End(store, 0, 1), End(store, 1, 0, shared_memory=request.param == "shared")
    a.shared_memory = request.param != "gloo"
    with ExitStack() as stack:
        for end in (a, b):
            stack.callback(end.open().close)
        until(lambda: a.link.state == b.link.state == "up")
        assert all(isinstance(end.link.line.wire, SharedBodies) == (request.param == "shared") for end in (a, b))
        yield a, b


def test_bodies_of_every_dtype_and_size_arrive_as_they_were(pair: tuple[End, End]) -> None:
    a, b = pair
    for dtype in DTYPES:
        for n in (0, 1, 1000, 5000):
            body = torch.randint(0, 100, (n,)).to(dtype)
            assert a.slots.post(Message(20, body, step=n, version=2, samples=3, weight=-(2**62), reference=5))
            letter = b.take(20)
            got = letter.message
            assert got.body is not None
            assert got.body.dtype == dtype
            assert torch.equal(got.body, body)
            assert (got.step, got.version, got.samples, got.weight, got.reference) == (n, 2, 3, -(2**62), 5)
            b.slots.folded(letter)
            until(lambda: a.slots.free(20))
    assert a.slots.post(Message(20))
    assert b.take(20).message.body is None


def test_the_slot_is_free_when_the_message_was_folded_and_not_before(pair: tuple[End, End]) -> None:
    a, b = pair
    body = torch.ones(10)
    assert a.slots.post(Message(20, body))
    body.zero_()
    assert not a.slots.free(20)
    assert not a.slots.post(Message(20))
    assert a.slots.post(Message(21)), "another kind has a slot of its own"
    letter = b.take(20)
    b.take(21)
    assert not a.slots.free(20)
    assert torch.equal(letter.message.body, torch.ones(10)), "the carrier took a copy"  # type: ignore[arg-type]
    b.slots.folded(letter)
    until(lambda: a.slots.free(20))
    with pytest.raises(ValueError, match="given back already"):
        b.slots.folded(letter)


def test_buffers_are_kept(pair: tuple[End, End]) -> None:
    a, b = pair
    places = set()
    for _ in range(5):
        assert a.slots.post(Message(20, torch.ones(10000)))
        letter = b.take(20)
        places.add(letter.message.body.data_ptr())  # type: ignore[union-attr]
        b.slots.folded(letter)
        until(lambda: a.slots.free(20))
    assert len(places) == 1
    assert len(a.link.sender.pages) + len(a.link.sender.flying) < 20


Talk = tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]


def _chat(end: End, seed: int, count: int, hurries: bool) -> Talk:
    """Post `count` random messages and fold what comes in random order, until all is folded on both sides."""
    with end.here.gathering.gathered("at once") if hurries else nullcontext():
        return _talk(end, seed, count)


def _talk(end: End, seed: int, count: int) -> Talk:
    chance, sent, got, held = random.Random(seed), [], [], []
    kinds = [1, 2, 16, 17, 40, 63]
    end_at = time.monotonic() + BUSY
    while len(sent) < count or len(got) < count or not end.slots.idle():
        assert time.monotonic() < end_at
        kind, n = chance.choice(kinds), chance.choice([0, 1, 100, 1024, 1025, 3000, 30000, 70000])
        if len(sent) < count and end.slots.post(Message(kind, torch.full((n,), float(len(sent))), reference=n)):
            sent.append((len(sent) + 1, kind, n))
        for other in kinds:
            held += end.inbox.take(other)
        chance.shuffle(held)
        if held and chance.random() < 0.7:
            letter = held.pop()
            body = letter.message.body
            assert body is not None
            assert torch.equal(body, torch.full((letter.message.reference,), float(letter.number - 1)))
            got.append((letter.number, letter.message.kind, body.numel()))
            end.slots.folded(letter)
        elif not held:
            end.here.gathering.send()
            time.sleep(0.0001)
    return sent, got


def _chat_on_both(a: End, b: End, count: int, hurries: bool) -> None:
    results: dict[int, Talk] = {}
    chats = [
        threading.Thread(target=lambda e=e: results.update({e.me: _chat(e, e.me, count, hurries)})) for e in (a, b)
    ]
    for chat in chats:
        chat.start()
    for chat in chats:
        chat.join()
    for end in (a, b):
        assert results[end.me][0] == sorted(results[end.peer][1]), "all of it, once"


@pytest.mark.few(1)
@pytest.mark.parametrize("hurries", [False, True])
def test_thousands_of_random_messages_both_ways(pair: tuple[End, End], hurries: bool) -> None:
    a, b = pair
    _chat_on_both(a, b, 1000, hurries)
    for end, other in ((a, b), (b, a)):
        sent = [(kind, count.messages_out, count.bytes_out) for kind, count in end.slots.traffic.items() if kind]
        read = [(kind, count.messages_in, count.bytes_in) for kind, count in other.slots.traffic.items() if kind]
        assert sorted(sent) == sorted(read)
        assert sum(messages for _, messages, _ in sent) == 1000
        assert end.slots.traffic[HEADERS].bytes_out >= 256 * 1000


def test_who_hurries_writes_what_is_short_by_himself(pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    wire, writers = a.link.line.wire, []
    send = wire.send  # type: ignore[union-attr]
    monkeypatch.setattr(wire, "send", lambda *args: (writers.append(threading.current_thread()), send(*args))[1])
    with a.here.gathering.gathered("at once"):
        assert a.slots.post(Message(20, torch.ones(100)))
        assert writers.count(threading.current_thread()) == 1  # the line's own thread may answer a greeting meanwhile
        assert a.slots.post(Message(21, torch.ones(100_000)))
        b.take(20)
        b.take(21)
    assert writers.count(threading.current_thread()) == 1


def test_a_profiler_of_the_thread_that_writes_hears_nothing_of_it(pair: tuple[End, End]) -> None:
    """It would hear of the end in the thread that waits for it, which kills a process now and then."""
    a, b = pair
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        for step in range(20):
            with a.here.gathering.gathered("at once"):
                assert a.slots.post(Message(20, torch.ones(100), step=step))
            b.slots.folded(b.take(20))
            until(lambda: a.slots.free(20))
    heard = {event.name for event in profiler.events()}  # type: ignore[no-untyped-call]
    assert "aten::ones" in heard
    assert not any("gloo" in name for name in heard)


def test_who_is_interrupted_while_he_writes_costs_a_connection_and_no_message(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = End(store, 0, 1), End(store, 1, 0)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with ExitStack() as stack:
        for generation in (1, 2):
            for end in (a, b):
                stack.callback(end.open(generation=generation).close)
            until(lambda: a.link.state == b.link.state == "up")
            if generation == 1:
                monkeypatch.setattr(a.link.line.wire, "send", interrupted)
                with pytest.raises(KeyboardInterrupt), a.here.gathering.gathered("at once"):
                    a.slots.post(Message(20, torch.ones(5)))
                assert a.link.state == "dead"
                for end in (a, b):
                    assert end.link.close()
        assert torch.equal(b.take(20).message.body, torch.ones(5))  # type: ignore[arg-type]
        assert a.slots.post(Message(21))
        assert b.take(21).number == 2, "and nothing twice"


def test_each_body_is_cut_as_its_sender_says(pair: tuple[End, End]) -> None:
    a, b = pair
    for length in (1 << 20, 1 << 16, 33_333, 1001):
        a.link.line.pieces.length = length
        body = torch.randint(0, 256, (70_000,), dtype=torch.uint8)
        assert a.slots.post(Message(20, body))
        letter = b.take(20)
        assert torch.equal(letter.message.body, body)  # type: ignore[arg-type]
        b.slots.folded(letter)
        until(lambda: a.slots.free(20))


def test_letters_come_in_the_order_of_their_posts_also_behind_a_long_one(store: Store) -> None:
    a, b = End(store, 0, 1), End(store, 1, 0)
    order: list[int] = []
    b.inbox = Inbox(here=b.here)
    b.slots = Slots(0, inbox=b.inbox, here=b.here, max_bytes=1 << 30)
    put = b.inbox.put
    b.inbox.put = lambda *args: (order.append(args[1]), put(*args))[1]  # type: ignore[method-assign, func-returns-value]
    for kind, n in ((20, 2_000_000), (1, 0), (21, 10), (22, 50_000), (23, 0)):
        assert a.slots.post(Message(kind, torch.ones(n)) if n else Message(kind))
    with ExitStack() as stack:
        for end in (a, b):
            stack.callback(end.open().close)
        until(lambda: len(order) == 5)
    assert order == [1, 2, 3, 4, 5]


def test_every_header_carries_step_and_clock(pair: tuple[End, End]) -> None:
    a, b = pair
    b.here.step = 41
    assert a.slots.post(Message(20))
    b.slots.folded(b.take(20))
    until(lambda: a.slots.free(20))
    b.here.step = 44
    assert a.slots.post(Message(20))
    assert a.slots.post(Message(21, echo=3))
    posted = b.here.now()
    until(lambda: 21 in b.slots.traffic and b.slots.traffic[21].messages_in == 1)
    age = b.here.now() - posted
    first, second = b.take(20), b.take(21)
    assert first.message.echo == 41
    assert second.message.echo == 3
    assert age <= first.seconds < age + 2.0, "an upper bound, and a close one"


def test_too_long_a_body_is_refused_by_the_sender(store: Store) -> None:
    a, b = End(store, 0, 1), End(store, 1, 0, max_bytes=8000)
    with ExitStack() as stack:
        for end in (a, b):
            stack.callback(end.open().close)
        until(lambda: a.link.state == b.link.state == "up")
        with pytest.raises(ValueError, match="8004 bytes is longer"):
            a.slots.post(Message(20, torch.ones(2001)))
        assert a.slots.free(20)
        assert a.slots.post(Message(20, torch.ones(2000)))
        assert b.take(20).message.body.numel() == 2000  # type: ignore[union-attr]


@pytest.mark.parametrize("stranger", ["run", "version"])
def test_a_stranger_is_turned_away_in_words_on_both_sides(
    store: Store, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = End(store, 0, 1), End(store, 1, 0)
    if stranger == "version":
        versions = iter([1, 2])
        pack = wire_header.pack_into

        def pack_one_of_each(buffer: memoryview, header: wire_header.Header, *, run: int) -> None:
            pack(buffer, header, run=run)
            buffer[8:16] = next(versions).to_bytes(8, "little")

        monkeypatch.setattr("lightning_async.transport.line.pack_into", pack_one_of_each)
        monkeypatch.setattr("lightning_async.transport.header.PROTOCOL", 9)
    with ExitStack() as stack:
        stack.callback(a.open(run="one").close)
        stack.callback(b.open(run="two" if stranger == "run" else "one").close)
        until(lambda: a.link.state == b.link.state == "dead", limit=3)
    for end in (a, b):
        assert end.link.refused
        assert end.link.error is not None
        assert ("another run" if stranger == "run" else "of the protocol") in end.link.error


@pytest.mark.few(1)
@pytest.mark.parametrize("hurries", [False, True])
def test_a_broken_connection_is_made_anew_and_nothing_is_lost_or_doubled(store: Store, hurries: bool) -> None:
    a, b = End(store, 0, 1), End(store, 1, 0)
    done = threading.Event()
    chance = random.Random(1)

    def break_and_mend() -> None:
        generation = 0
        while not done.is_set():
            generation += 1
            for end in (a, b):
                end.open(generation=generation, fragment_bytes=16384)
            until(lambda: a.link.state == b.link.state == "up")
            done.wait(chance.uniform(0.01, 0.06))
            if not done.is_set():
                chance.choice([a, b]).link.line.wire.cancel()  # type: ignore[union-attr]
                until(lambda: a.link.state == b.link.state == "dead")
            for end in (a, b):
                assert end.link.close()
        results.append(generation)

    results: list[int] = []
    breaker = threading.Thread(target=break_and_mend)
    breaker.start()
    try:
        _chat_on_both(a, b, 150, hurries)
    finally:
        done.set()
        breaker.join()
    assert results
    assert results[0] > 2


def test_nothing_is_left(store: Store) -> None:
    def resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    a, b = End(store, 0, 1), End(store, 1, 0)
    before = resources()
    for generation in range(1, 4):
        for end in (a, b):
            end.open(generation=generation)
        until(lambda: a.link.state == b.link.state == "up")
        assert a.slots.post(Message(20 + generation, torch.ones(100_000)))
        b.take(20 + generation)  # through memory
        assert a.link.close()
        assert b.link.close()
        assert a.link.close(), "again is nothing"
    until(lambda: resources() == before)


def test_close_before_the_peer_came(store: Store) -> None:
    a = End(store, 0, 1)
    link = a.open()
    begin = time.monotonic()
    assert link.close(), "nobody waited in vain: the thread that looks for the peer was woken"
    assert time.monotonic() - begin < 1
    assert link.state == "closed"
    End(store, 1, 0).open().close()  # the rendezvous ends when the other one comes, or after `connect_timeout`


# the other end in a process of its own


def _other_end(port: int, shared_memory: bool, done: Connection) -> None:
    end = End(TCPStore("127.0.0.1", port, is_master=False), 1, 0, shared_memory=shared_memory)
    end.open()
    until(lambda: end.link.state == "up")
    end.slots.post(Message(20, torch.ones(16 << 20)))
    done.recv()
    os._exit(0)


@pytest.fixture(params=[True, False], ids=["memory", "network"])
def far(request: pytest.FixtureRequest) -> Iterator[tuple[End, int]]:
    """This end of a link, not opened yet, and the process id of the other one, which sends 64 MB and folds nothing."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    gc.collect()  # a store's server that is garbage in the child makes it wait for a thread that was not forked
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=_other_end, args=(server.port, request.param, theirs))
    process.start()
    end = End(server, 0, 1, shared_memory=request.param)
    try:
        assert process.pid is not None
        yield end, process.pid
    finally:
        process.kill()
        process.join()
        process.close()
        mine.close()
        theirs.close()


@pytest.mark.few(1)
def test_an_idle_link_goes_on_after_a_peer_was_frozen_for_long(
    far: tuple[End, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more signs of life are piled up than it may leave unread, and it hears new ones when it thaws."""
    monkeypatch.setattr(link_module, "PING", 0.01)
    end, pid = far
    link = end.open()
    try:
        until(lambda: link.state == "up")
        end.take(20)
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: len(link.sender.flying) >= AHEAD)
        finally:
            os.kill(pid, signal.SIGCONT)
        before = end.slots.traffic[HEADERS].messages_out
        until(lambda: end.slots.traffic[HEADERS].messages_out > before + AHEAD, limit=10)
    finally:
        assert link.close()


@pytest.mark.few(2)
@pytest.mark.parametrize("direction", ["sender", "receiver"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_ends_or_stops_in_mid_transfer(
    far: tuple[End, int], how: signal.Signals, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel itself wakes both threads: none of them would look by itself for longer than `close` waits for it."""
    monkeypatch.setattr(link_module, "PING", BUSY)
    end, pid = far
    hit = threading.Event()
    link = end.open()
    half, name = (link.sender, "send_fragment") if direction == "sender" else (link.receiver, "receive_fragment")
    go_on = getattr(half, name)

    def strike_in_the_middle(about: object) -> None:
        number = getattr(about, "sent", None)
        if (number if number is not None else about.fragment) == 5:  # type: ignore[attr-defined]
            os.kill(pid, how)
            hit.set()
        go_on(about)

    monkeypatch.setattr(half, name, strike_in_the_middle)
    try:
        until(lambda: link.state == "up")
        assert end.slots.post(Message(20, torch.ones(16 << 20)))
        assert hit.wait(10)
        if how == signal.SIGKILL:
            until(lambda: link.state == "dead", limit=5)
            assert link.error
    finally:
        begin = time.monotonic()
        closed = link.close()
        took = time.monotonic() - begin
    assert closed
    assert took < 1
    (loss,) = end.slots.bury()
    assert (loss.peer, loss.number) == (1, 1)
    assert torch.equal(loss.message.body, torch.ones(16 << 20))  # type: ignore[arg-type]
    assert not end.slots.free(20)
    assert not end.slots.post(Message(21))
