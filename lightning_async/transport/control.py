"""The control thread: the only one that touches the store.

    training thread                       control thread                          store
    propose, draw, decided, publish ----> requests, then a tick:
                                            anything new? --------------------->  multi_get bell/me, said
                                            answer requests ------------------->  compare_set, add, check + get
                                            beat due, or the bell rang? ------->  set beat/me, multi_get beat/*, dead/*
                                            judge silence; declare the dead --->  compare_set dead/k
    live, members, notes, drawn   <----     what was read

With the store's host frozen every call blocks, so the training thread only leaves requests and reads what was found.
Keys: `beat/k`, `dead/k` (first reason stays), `bell/k` (a counter that others ring: there is something to read),
`say/...` (decisions), `said` (how often one was proposed), `draw/...` (tickets). What is read without a `check` is made
at the start, so that no read waits for a missing key.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from torch.distributed import DistError

from lightning_async.transport.checks import check_amount, check_note
from lightning_async.transport.gloo import Keys, client_of
from lightning_async.transport.heartbeat import Beat
from lightning_async.transport.requests import SAID, Requests
from lightning_async.transport.roll import LEFT, NOBODY, Roll

HURRY_SECONDS = 0.003
"""The tick while somebody waits for an answer."""
BRISK_SECONDS, BRISK_FOR = 0.001, 0.02
"""The tick behind an answer, for so long: where all come to a meeting, the next word follows at once."""
SOON_SECONDS, SOON_FOR = 0.04, 0.2
"""The beat while notes are wanted soon, in a small run; for how long after the last such note."""


class Control:
    """One member's view of all the others, kept by a thread of its own.

    Args:
        keys: A store whose keys belong to this run alone; it is cloned, not used.
        me: This member.
        world: How many there were at the start.
        members: Those alive at the start.
        tick: Seconds between looks at the bell.
        silence: See `heartbeat`.
        patience: See `heartbeat`.
        late: See `heartbeat`.
        look: Called in the control thread at every tick; True asks for the next one soon.
        bury: Called in the control thread with each peer found dead, before anybody is told that it is.
        news: Called when something was found that somebody may wait for.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        me: int,
        world: int,
        members: Iterable[int] | None = None,
        tick: float = 0.1,
        silence: float = 2.0,
        patience: float = 30.0,
        late: float | None = None,
        look: Callable[[], bool] = lambda: False,
        bury: Callable[[int], None] = lambda peer: None,
        news: Callable[[], None] = lambda: None,
    ) -> None:
        self.roll = Roll(me=me, world=world, members=members, silence=silence, patience=patience, late=late, bury=bury)
        if tick <= 0:
            raise ValueError(f"`tick` must be above 0, got {tick}")
        self.me, self.world = me, world
        self.store_lost: str | None = None
        self._keys, self._look, self._news = keys, look, news
        self._tick, self._beat = tick, min(0.5, silence / 4)
        self._requests = Requests()
        self._changed = self._requests.changed
        self._stop = False
        self._waiting = False
        self._notes: dict[int, bytes] = {}
        self._beats: dict[int, Beat] = {}
        self._wants: dict[int, int] = {}
        self._rings: set[int] = set()
        self._count = 0
        self._due = self._beaten = self._soon_until = self._brisk_until = 0.0
        self._soon = min(self._beat, SOON_SECONDS * max(1.0, world / 16))  # all read all: the store's work is n * n
        self._bell = b""
        self._thread = threading.Thread(target=self._run, name=f"control-{me}", daemon=True)

    # the training thread

    @property
    def failed(self) -> str | None:
        """Why this member cannot go on, in words: declared dead, or the store lost."""
        return self.roll.failed or self.store_lost

    @property
    def reasons(self) -> dict[int, str]:
        """Why each dead member is."""
        return self.roll.reasons

    def start(self) -> None:
        """Begin to look and to be seen."""
        self._thread.start()

    def stop(self, timeout: float = 1.0) -> bool:
        """Leave the run; True if the thread is gone. A thread that the store holds up ends when the store answers."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def propose(self, key: str, value: bytes) -> None:
        """See `Board.propose`."""
        self._requests.propose(key, value)

    def decided(self, key: str) -> bytes | None:
        """See `Board.decided`."""
        return self._requests.decided(key)

    def forget(self, key: str, *, gone: bool = False) -> None:
        """See `Board.forget`."""
        self._requests.forget(key, gone=gone)

    def draw(self, counter: str, amount: int) -> None:
        """See `Board.draw`."""
        check_amount(amount)
        self._requests.draw(counter, amount)

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """See `Board.drawn`."""
        return self._requests.drawn(counter)

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """See `Board.publish`."""
        check_note(note)
        with self._changed:
            self._notes[self.me] = bytes(note)
        if soon:
            self._soon_until = time.monotonic() + SOON_FOR
            self._due = min(self._due, self._beaten + self._soon)

    def notes(self) -> dict[int, bytes]:
        """See `Board.notes`."""
        with self._changed:
            return dict(self._notes)

    def members(self) -> tuple[int, ...]:
        """Those not declared dead."""
        return self.roll.members

    def live(self) -> tuple[int, ...]:
        """Those heard of lately."""
        return self.roll.live

    def waiting(self, waits: bool) -> None:
        """Whether somebody waits now: then watched keys are looked for every few milliseconds."""
        self._waiting = waits
        if waits and self._requests.watched:
            self.soon()

    def soon(self) -> None:
        """Ask for a tick now."""
        self._requests.hurry()

    # links, in the control thread only

    def want(self, peer: int, generation: int) -> None:
        """Tell everybody which link to `peer` this member wants, and ring at the peer's."""
        self._wants[peer] = generation
        self._rings.add(peer)

    def has_begun(self, peer: int) -> bool:
        """Whether the peer was ever heard of."""
        return peer in self._beats

    def wanted(self, peer: int) -> int:
        """Which link the peer wants to us; 0 for none."""
        beat = self._beats.get(peer)
        return 0 if beat is None else beat.wants.get(self.me, 0)

    # the control thread

    def _run(self) -> None:
        ended = "the control thread ended by an error; its traceback is in the log"
        try:
            store = client_of(self._keys)
            self._prepare(store)
            while not self._stop:
                self._one_tick(store)
            self._leave(store)
            ended = ""
        except DistError as error:
            ended = (
                f"the store is lost ({type(error).__name__}: {error}): the process that hosts it is gone, which is "
                "rank 0 or torchrun's agent. Launch with torchrun, so that the agent hosts it and no rank's death "
                "takes it away"
            )
        finally:
            if ended and not self._stop:
                self.store_lost = ended
                self._news()

    def _prepare(self, store: Keys) -> None:
        for k in range(self.world):
            store.compare_set(f"beat/{k}", b"", NOBODY)
            store.compare_set(f"dead/{k}", b"", NOBODY)
            store.add(f"bell/{k}", 0)
        store.add(SAID, 0)

    def _one_tick(self, store: Keys) -> None:
        bell, said = store.multi_get([f"bell/{self.me}", SAID])
        due, rang, self._bell = time.monotonic() >= self._due, bell != self._bell, bell
        if self._requests.answer(store, said=int(said), anew=due):
            self._brisk_until = time.monotonic() + BRISK_FOR
            self._news()
        if due or rang:
            self._read(store, said=int(said))
            self._requests.sweep(store)
        soon = self._look()
        if self._rings:
            self._write(store)
            self._ring(store, self._rings)
            self._rings = set()
        with self._changed:
            hurry = soon or (self._waiting and self._requests.open)
            now = time.monotonic()
            hurried = BRISK_SECONDS if now < self._brisk_until else HURRY_SECONDS
            timeout = hurried if hurry else max(0.0, min(self._tick, self._due - now))
            self._changed.wait_for(lambda: self._requests.asked or self._stop, timeout)
            self._requests.asked = False

    def _write(self, store: Keys) -> None:
        self._count += 1
        beat = Beat(self._count, self._wants, self._notes.get(self.me))
        store.set(f"beat/{self.me}", beat.pack())

    def _read(self, store: Keys, said: int) -> None:
        self._beaten = time.monotonic()
        self._due = self._beaten + (self._soon if self._beaten < self._soon_until else self._beat)
        self._write(store)
        keys = [f"beat/{k}" for k in range(self.world)] + [f"dead/{k}" for k in range(self.world)]
        values = store.multi_get(keys)
        beats = {k: beat for k in range(self.world) if (beat := Beat.unpack(values[k])) is not None}
        with self._changed:
            self._beats = beats
            self._notes |= {k: beat.note for k, beat in beats.items() if beat.note is not None and k != self.me}
        flags = {k: values[self.world + k] for k in range(self.world)}
        self.roll.look({k: beat.count for k, beat in beats.items()}, flags)
        if self.roll.declare(store):
            self._ring(store, self.roll.peers)
        if self.roll.shrinks:  # who left may have said why just before
            self._requests.answer(store, said=said, anew=True)
        if self.roll.settle():
            self._news()

    def _ring(self, store: Keys, peers: Iterable[int]) -> None:
        for peer in peers:
            store.add(f"bell/{peer}", 1)

    def _leave(self, store: Keys) -> None:
        self._write(store)
        store.compare_set(f"dead/{self.me}", NOBODY, LEFT)
        self._ring(store, self.roll.peers)
