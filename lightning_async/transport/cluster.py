"""The carrier over torch.distributed: a link to each peer that mail was posted to, and the control thread.

    training thread --- post, take, folded, ... --> slots, inbox         (never blocks)
    per link: sender, receiver ------------------>  gloo, one connection for each pair
    control thread ------------------------------>  store: beats, deaths, decisions, tickets; opens and closes links

Links are tended in the control thread (`links.py`), so nothing here waits for a store or a peer, but for `wait` itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

from torch.distributed.distributed_c10d import Store

from lightning_async.transport.checks import check_kind, check_message, check_peer
from lightning_async.transport.control import Control
from lightning_async.transport.gathering import When
from lightning_async.transport.gloo import Clients, keys_of
from lightning_async.transport.header import WIRE_BYTES
from lightning_async.transport.line import AHEAD, WINDOW
from lightning_async.transport.links import Links
from lightning_async.transport.mail import LONGEST, Letter, Loss, Message, Service
from lightning_async.transport.pieces import LEAST
from lightning_async.transport.service import Loop, ServiceThread
from lightning_async.transport.shared import PLACES
from lightning_async.transport.slots import Here, Inbox, Slots
from lightning_async.transport.traffic import Count

PIECE = 4 << 20
"""Bytes of the longest piece in which a body travels."""
LOOK = 0.003
"""Seconds between looks of one that lingers."""
HEADS = 2 * AHEAD * WIRE_BYTES
"""Bytes of the headers of a link, those that stand ready and those under way."""


def link_bytes(piece: int, *, near: bool) -> int:
    """The host memory of a link, whatever travels on it; `near`: with its half of what both ends on one host see."""
    return HEADS + (WINDOW + PLACES * near) * piece


def piece_of(staging: object) -> int:
    """The longest pieces for which a link needs no more than `staging` bytes of host memory."""
    least = link_bytes(LEAST, near=True)
    if not isinstance(staging, int) or isinstance(staging, bool) or staging < least:
        raise ValueError(f"`staging` must be an integer of at least {least} (bytes), or None, got {staging!r}")
    return min(PIECE, (staging - HEADS) // (WINDOW + PLACES) // LEAST * LEAST)


class ClusterCarrier:
    """One member's mail and board in a real run. See `mail.Carrier` for what each method promises.

    Args:
        store: A client of the run's store (a TCPStore); it is cloned, never used.
        me: This member's rank.
        world: How many members the run begins with.
        run: The run's id; the same on all members, and another for each attempt of a job.
        members: Those alive at the start; all by default.
        peers: Links to open at once, in the background. Others are opened by the first post.
        silence: Seconds without a heartbeat after which a member is not `live`.
        patience: Seconds after which it is declared dead.
        late: Seconds after which one that has not begun at all is declared dead; by default `patience`.
        max_bytes: The longest body that this member takes.
        fragment_bytes: The longest piece in which a body travels.
        connect_timeout: The longest that a rendezvous may take when the peer dies on its way to it.
        interface: The network interface of the links; by default GLOO_SOCKET_IFNAME's, else the one of the host's name.
        shared_memory: Whether long bodies to members of this host go through memory.
        tick: Seconds between looks at the store's bell.
    """

    def __init__(
        self,
        *,
        store: Store,
        me: int,
        world: int,
        run: str,
        members: Iterable[int] | None = None,
        peers: Iterable[int] = (),
        silence: float = 2.0,
        patience: float = 30.0,
        late: float | None = None,
        max_bytes: int = LONGEST,
        fragment_bytes: int = PIECE,
        connect_timeout: float = 30.0,
        interface: str | None = None,
        shared_memory: bool = True,
        tick: float = 0.1,
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"`max_bytes` must be at least 0, got {max_bytes}")
        if connect_timeout <= 0:
            raise ValueError(f"`connect_timeout` must be above 0, got {connect_timeout}")
        self._keys = keys_of(store, f"lightning_async/{run}")
        self._me, self._world = me, world
        self._news_count = self._noticed = 0
        self._changed = threading.Condition()
        self._here = Here()
        self._inbox = Inbox(here=self._here, news=self._news)
        self._slots = {
            peer: Slots(peer, inbox=self._inbox, here=self._here, max_bytes=max_bytes, news=self._news)
            for peer in range(world)
            if peer != me
        }
        self._losses: list[Loss] = []
        self._service: ServiceThread | None = None
        self._fault: RuntimeError | None = None
        self._loop = Loop(me, self._deliver)
        self._state = "made"
        wished = set(peers)
        for peer in wished:
            check_peer(me, world, peer)
        self._links = Links(
            Clients(self._keys),
            me=me,
            slots=self._slots,
            here=self._here,
            run=run,
            wished=wished,
            silence=silence,
            patience=patience,
            fragment_bytes=fragment_bytes,
            connect_timeout=connect_timeout,
            interface=interface,
            shared_memory=shared_memory,
            news=self._news,
        )
        self._control = Control(
            self._keys,
            me=me,
            world=world,
            members=members,
            tick=tick,
            silence=silence,
            patience=patience,
            late=late,
            look=lambda: self._links.look(self._control),
            bury=self._bury,
            news=self._news,
        )

    @property
    def me(self) -> int:
        """This member's rank."""
        return self._me

    @property
    def world(self) -> int:
        """How many members the run began with."""
        return self._world

    @property
    def failed(self) -> str | None:
        """Why this member cannot go on, in words, or None: declared dead, the store lost, another version at a peer."""
        return self._control.failed or (None if (fault := self.fault) is None else str(fault))

    @property
    def fault(self) -> RuntimeError | None:
        """What went wrong at this member while the others still hear it, of which they must know."""
        if self._control.failed is not None:
            return None
        return self._fault or (None if (refused := self._links.refused) is None else RuntimeError(refused))

    @property
    def deaths(self) -> dict[int, str]:
        """Why each peer died that did; not those that left."""
        return self._control.roll.deaths

    def start(self) -> None:
        """Begin; again is nothing."""
        if self._state == "made":
            self._state = "started"
            self._control.start()

    def close(self, *, linger: float = 0.0) -> None:
        """Leave the run and hang up; again is nothing.

        Args:
            linger: Wait at most so long for the live peers to fold what was posted to them, and to be told what was
                folded here. Without it what is on the way is cut off, within milliseconds.
        """
        self._here.gathering.send()
        if self._state == "started" and linger > 0:
            self._linger(linger)
        before, self._state = self._state, "closed"
        if before == "started":
            self._control.stop()
        if self._service is not None:
            self._service.stop()
        self._links.close()

    def __enter__(self) -> ClusterCarrier:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # mail

    def post(self, peer: int, message: Message) -> bool:
        """See `Mail.post`."""
        check_message(self._me, self._world, peer, message, serves=self._service is not None)
        if peer == self._me:
            return self._loop.post(message)
        slots = self._slots[peer]
        slots.check(message)
        return self._reachable(peer) and slots.post(message)

    def free(self, peer: int, kind: int) -> bool:
        """See `Mail.free`."""
        check_peer(self._me, self._world, peer, serves=self._service is not None)
        check_kind(kind)
        if peer == self._me:
            return self._loop.free(kind)
        return self._reachable(peer) and self._slots[peer].free(kind)

    def take(self, kind: int) -> list[Letter]:
        """See `Mail.take`."""
        check_kind(kind)
        return self._inbox.take(kind)

    def folded(self, letter: Letter) -> None:
        """See `Mail.folded`."""
        (self._loop if letter.peer == self._me else self._slots[letter.peer]).folded(letter)

    def lost(self) -> list[Loss]:
        """See `Mail.lost`."""
        with self._changed:
            losses, self._losses = self._losses, []
            return losses

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """See `Mail.serve`."""
        kinds = list(kinds)
        for kind in kinds:
            check_kind(kind)
        if self._service is None:
            self._service = ServiceThread(
                self._me,
                post=self.post,
                folded=self.folded,
                gathering=self._here.gathering,
                gone=self._is_gone,
                failed=self._fail_service,
            )
        self._service.begin(service)
        self._inbox.hand_over(kinds, self._service.put)

    def at(self, step: int) -> None:
        """See `Mail.at`."""
        self._here.step = step

    def members(self) -> tuple[int, ...]:
        """See `Mail.members`."""
        return self._control.members()

    def live(self) -> tuple[int, ...]:
        """See `Mail.live`."""
        return self._control.live()

    def now(self) -> float:
        """See `Mail.now`."""
        return self._here.now()

    def wait(self, timeout: float) -> None:
        """See `Mail.wait`."""
        self._here.gathering.send()
        self._control.waiting(True)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._news_count != self._noticed, timeout)
                self._noticed = self._news_count
        finally:
            self._control.waiting(False)

    def gathered(self, when: When = "together") -> AbstractContextManager[None]:
        """A block of this thread whose short mail leaves then; see `gathering`."""
        return self._here.gathering.gathered(when)

    def send(self) -> None:
        """What was gathered to leave later leaves now."""
        self._here.gathering.send()

    def traffic(self) -> dict[int, dict[int, Count]]:
        """Counters by peer and kind; kind 0 counts headers."""
        tables = {peer: list(slots.traffic.items()) for peer, slots in self._slots.items()}
        return {peer: {kind: replace(count) for kind, count in table} for peer, table in tables.items()}

    # board

    def propose(self, key: str, value: bytes) -> None:
        """See `Board.propose`."""
        self._control.propose(key, value)

    def decided(self, key: str) -> bytes | None:
        """See `Board.decided`."""
        return self._control.decided(key)

    def forget(self, key: str, *, gone: bool = False) -> None:
        """See `Board.forget`."""
        self._control.forget(key, gone=gone)

    def draw(self, counter: str, amount: int) -> None:
        """See `Board.draw`."""
        self._control.draw(counter, amount)

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """See `Board.drawn`."""
        return self._control.drawn(counter)

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """See `Board.publish`."""
        self._control.publish(note, soon=soon)

    def notes(self) -> dict[int, bytes]:
        """See `Board.notes`."""
        return self._control.notes()

    # within

    def _news(self) -> None:
        with self._changed:
            self._news_count += 1
            self._changed.notify_all()
        if self._service is not None:
            self._service.nudge()

    def _deliver(self, peer: int, number: int, message: Message) -> None:
        self._inbox.put(peer, number, message, self._here.nanoseconds())

    def _is_gone(self, peer: int) -> bool:
        return peer not in self._control.members()

    def _fail_service(self, error: Exception) -> None:
        fault = RuntimeError(f"the service of member {self._me} failed: {type(error).__name__}: {error}")
        fault.__cause__ = error
        self._fault = fault
        self._news()

    def _linger(self, seconds: float) -> None:
        """Until all is said, or for so long; it also looks by itself, since the last word that leaves is no news."""
        end = self._here.now() + seconds
        with self._changed:
            while (left := end - self._here.now()) > 0:
                if self._changed.wait_for(self._is_idle, min(left, LOOK)):
                    return

    def _is_idle(self) -> bool:
        if self._service is not None and not self._service.idle:
            return False
        live, links = self._control.live(), list(self._links.by_peer.items())
        return all(self._slots[peer].idle() and not link.line.writing for peer, link in links if peer in live)

    def _reachable(self, peer: int) -> bool:
        if self._state == "started" and self._links.wish(peer):
            self._control.soon()
        return self._links.is_up(peer) and peer in self._control.live()

    def _bury(self, peer: int) -> None:
        """In the control thread: the peer is dead, and what it had not folded is lost."""
        self._links.drop(peer)
        served = self._service.kinds if self._service is not None else set()
        losses = [loss for loss in self._slots[peer].bury() if loss.message.kind not in served]
        with self._changed:
            self._losses += losses
