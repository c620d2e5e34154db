"""The control thread: the only one that touches the store.

    training thread                       control thread                          store
    propose, draw, decided, publish ----> requests, then a tick:
                                            answer requests ------------------->  compare_set, add, check + get
                                            beat due, or the bell rang? ------->  set beat/me, multi_get beat/*, dead/*
                                            judge silence; declare the dead --->  compare_set dead/k
    live, members, notes, drawn   <----     what was read

With the store's host frozen every call blocks, so the training thread only leaves requests and reads what was found.
Keys: `beat/k`, `dead/k` (first reason stays), `bell/k` (a counter that others ring: there is something to read),
`say/...` (decisions), `draw/...` (tickets). All are made at the start, so that no read waits for a missing one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from torch.distributed import DistError

from lightning_async.transport.checks import check_amount, check_note
from lightning_async.transport.gloo import Keys
from lightning_async.transport.heartbeat import Beat, Silence

_NOBODY = b"-"
WATCH_SECONDS = 10.0
"""A key is looked for until this long after `decided` last asked for it."""
HURRY_SECONDS = 0.003
"""The tick while somebody waits for an answer."""


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
        look: Callable[[], bool] = lambda: False,
        bury: Callable[[int], None] = lambda peer: None,
        news: Callable[[], None] = lambda: None,
    ) -> None:
        alive = sorted(range(world) if members is None else set(members))
        if not 0 <= me < world or me not in alive or alive[0] < 0 or alive[-1] >= world:
            raise ValueError(f"`me` ({me}) must be one of `members`, and these below `world` ({world}), got {alive}")
        if tick <= 0:
            raise ValueError(f"`tick` must be above 0, got {tick}")
        self.me, self.world = me, world
        self.failed: str | None = None
        self.reasons: dict[int, str] = {k: "not there at the start" for k in range(world) if k not in alive}
        self._keys, self._look, self._bury, self._news = keys, look, bury, news
        self._tick, self._beat = tick, min(0.5, silence / 4)
        self._peers = tuple(k for k in alive if k != me)
        self._judge = Silence(self._peers, silence=silence, patience=patience, start=time.monotonic())
        self._changed = threading.Condition()
        self._asked = False
        self._stop = False
        self._waiting = False
        self._members = tuple(alive)
        self._live: tuple[int, ...] = (me,)
        self._proposals: deque[tuple[str, bytes]] = deque()
        self._draws: deque[tuple[str, int]] = deque()
        self._drawn: dict[str, list[tuple[int, int]]] = {}
        self._watched: dict[str, float] = {}
        self._decided: dict[str, bytes] = {}
        self._notes: dict[int, bytes] = {}
        self._beats: dict[int, Beat] = {}
        self._wants: dict[int, int] = {}
        self._rings: set[int] = set()
        self._broken: set[int] = set()
        self._condemned: dict[int, str] = {}
        self._count = 0
        self._due = 0.0
        self._bell = b""
        self._thread = threading.Thread(target=self._run, name=f"control-{me}", daemon=True)

    # the training thread

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
        self._request(lambda: self._proposals.append((key, value)))

    def decided(self, key: str) -> bytes | None:
        """See `Board.decided`."""
        value = self._decided.get(key)
        if value is None:
            new = key not in self._watched
            self._watched[key] = time.monotonic()
            if new:
                self._request(lambda: None)
        return value

    def draw(self, counter: str, amount: int) -> None:
        """See `Board.draw`."""
        check_amount(amount)
        self._request(lambda: self._draws.append((counter, amount)))

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """See `Board.drawn`."""
        with self._changed:
            return self._drawn.pop(counter, [])

    def publish(self, note: bytes) -> None:
        """See `Board.publish`."""
        check_note(note)
        with self._changed:
            self._notes[self.me] = bytes(note)

    def notes(self) -> dict[int, bytes]:
        """See `Board.notes`."""
        with self._changed:
            return dict(self._notes)

    def members(self) -> tuple[int, ...]:
        """Those not declared dead."""
        return self._members

    def live(self) -> tuple[int, ...]:
        """Those heard of lately."""
        return self._live

    def waiting(self, waits: bool) -> None:
        """Whether somebody waits now: then watched keys are looked for every few milliseconds."""
        self._waiting = waits
        if waits and self._watched:
            self._request(lambda: None)

    def soon(self) -> None:
        """Ask for a tick now."""
        self._request(lambda: None)

    def _request(self, note: Callable[[], None]) -> None:
        with self._changed:
            note()
            self._asked = True
            self._changed.notify_all()

    # links, in the control thread only

    def want(self, peer: int, generation: int) -> None:
        """Tell everybody which link to `peer` this member wants, and ring at the peer's."""
        self._wants[peer] = generation
        self._rings.add(peer)

    def wanted(self, peer: int) -> int:
        """Which link the peer wants to us; 0 for none."""
        beat = self._beats.get(peer)
        return 0 if beat is None else beat.wants.get(self.me, 0)

    def broken(self, peer: int, broken: bool) -> None:
        """Whether the connection to `peer` was closed by the other side and is not up again."""
        (self._broken.add if broken else self._broken.discard)(peer)

    def condemn(self, peer: int, reason: str) -> None:
        """Declare a peer dead for a reason of the carrier's."""
        self._condemned[peer] = reason

    # the control thread

    def _run(self) -> None:
        ended = "the control thread ended by an error; its traceback is in the log"
        try:
            store = self._keys.clone()
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
                self.failed = self.failed or ended
                self._news()

    def _prepare(self, store: Keys) -> None:
        for k in range(self.world):
            store.compare_set(f"beat/{k}", b"", _NOBODY)
            store.compare_set(f"dead/{k}", b"", _NOBODY)
            store.add(f"bell/{k}", 0)

    def _one_tick(self, store: Keys) -> None:
        self._answer(store)
        if time.monotonic() >= self._due or self._bell_rang(store):
            self._read(store)
        soon = self._look()
        if self._rings:
            self._write(store)
            self._ring(store, self._rings)
            self._rings = set()
        with self._changed:
            hurry = soon or (self._waiting and bool(self._watched or self._proposals))
            timeout = HURRY_SECONDS if hurry else max(0.0, min(self._tick, self._due - time.monotonic()))
            self._changed.wait_for(lambda: self._asked or self._stop, timeout)
            self._asked = False

    def _answer(self, store: Keys) -> None:
        """Requests in the order in which they were made, kind by kind."""
        found = bool(self._proposals or self._draws)
        while self._proposals:
            key, value = self._proposals[0]
            # The mark in front keeps an empty value from looking like a missing one, which would be overwritten.
            self._decided[key] = store.compare_set(f"say/{key}", b"", b"=" + value)[1:]
            self._proposals.popleft()
        while self._draws:
            counter, amount = self._draws.popleft()
            first = store.add(f"draw/{counter}", amount) - amount
            with self._changed:
                self._drawn.setdefault(counter, []).append((first, amount))
        for key, asked in list(self._watched.items()):
            if key not in self._decided and store.check([f"say/{key}"]):
                self._decided[key] = store.get(f"say/{key}")[1:]
                found = True
            if key in self._decided or time.monotonic() - asked > WATCH_SECONDS:
                self._watched.pop(key, None)
        if found:
            self._news()

    def _bell_rang(self, store: Keys) -> bool:
        bell = store.multi_get([f"bell/{self.me}"])[0]
        rang, self._bell = bell != self._bell, bell
        return rang

    def _write(self, store: Keys) -> None:
        self._count += 1
        beat = Beat(self._count, self._wants, self._notes.get(self.me))
        store.set(f"beat/{self.me}", beat.pack())

    def _read(self, store: Keys) -> None:
        self._due = time.monotonic() + self._beat
        self._write(store)
        keys = [f"beat/{k}" for k in range(self.world)] + [f"dead/{k}" for k in range(self.world)]
        values = store.multi_get(keys)
        now = time.monotonic()
        beats = {k: beat for k in range(self.world) if (beat := Beat.unpack(values[k])) is not None}
        self._judge.look(now=now, counts={k: beat.count for k, beat in beats.items()})
        with self._changed:
            self._beats = beats
            self._notes |= {k: beat.note for k, beat in beats.items() if beat.note is not None and k != self.me}
        self._mourn({k: values[self.world + k] for k in range(self.world)})
        self._declare(store)
        self._settle()

    def _mourn(self, flags: dict[int, bytes]) -> None:
        for k, flag in flags.items():
            if flag != _NOBODY and k not in self.reasons:
                self.reasons[k] = flag.decode()
                if k == self.me:
                    self.failed = (
                        f"member {k} (this one) was declared dead by the others ({self.reasons[k]}), and the dead do "
                        "not come back: it must end, and may join the next run"
                    )

    def _declare(self, store: Keys) -> None:
        for peer in self._peers:
            reason = self._condemned.get(peer) or self._judge.verdict(peer, broken=peer in self._broken)
            if reason is not None and peer not in self.reasons:
                self._mourn({peer: store.compare_set(f"dead/{peer}", _NOBODY, reason.encode())})
                self._ring(store, self._peers)

    def _settle(self) -> None:
        """Publish who is there; news for those who wait."""
        peers = [k for k in self._peers if k not in self.reasons]
        for dead in set(self._members).difference(peers, [self.me]):
            self._bury(dead)
        members = tuple(sorted([*peers, self.me]))
        live = tuple(sorted([*(k for k in peers if self._judge.live(k)), self.me]))
        if (members, live) != (self._members, self._live) or self.failed:
            self._members, self._live = members, live
            self._news()

    def _ring(self, store: Keys, peers: Iterable[int]) -> None:
        for peer in peers:
            store.add(f"bell/{peer}", 1)

    def _leave(self, store: Keys) -> None:
        """Say that this is no accident: nobody needs to be patient with one who has left."""
        self._write(store)
        store.compare_set(f"dead/{self.me}", _NOBODY, b"it left the run")
        self._ring(store, self._peers)
