"""The links of one member: each is made when somebody wants one, and made anew when it broke, in the control thread.

    beat of A   "generation 1 with B"     B has seen A's word, A has seen B's: both go to the rendezvous
    beat of B   "generation 1 with A"     so nobody blocks there for one who does not come

One pair's generation only grows: a link that broke is wanted again with the next one. It comes to nothing if the peer
is dead: then its silence is counted, it is declared dead, and what it never folded is reported as lost.

Two that both beat but cannot reach each other (a cut between their hosts, a firewall) are told by the headers: each
side sends one at least every half second. After `patience` without one the link is made anew, and after twice that the
higher of the two is declared dead: a pair that never heals must end somehow, and all must agree how. A link that has
just come up is given its time, and one that is wanted for the first time, however late in the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from lightning_async.transport.control import Control
from lightning_async.transport.gloo import Clients
from lightning_async.transport.heartbeat import Silence
from lightning_async.transport.link import Link
from lightning_async.transport.pieces import Pieces
from lightning_async.transport.slots import Here, Slots
from lightning_async.transport.traffic import HEADERS

EAGER = 1.0
"""Seconds in which something about a link is expected to happen soon."""


class Links:
    """All links of one member.

    Args:
        clients: Store clients for rendezvous.
        me: This member.
        slots: What it shares with each peer.
        here: This member as its headers describe it.
        run: The run's id.
        wished: The peers to which a link is wanted from the start.
        silence: See `heartbeat`.
        patience: See `heartbeat`.
        fragment_bytes: The longest piece in which a body travels.
        connect_timeout: See `Link`.
        interface: See `Link`.
        shared_memory: See `Link`.
        news: Called when a link's state changed.

    Attributes:
        by_peer: The links that there are.
        refused: Why no link can be made with a peer, in words: it is of another run, or speaks another protocol.
    """

    def __init__(
        self,
        clients: Clients,
        *,
        me: int,
        slots: Mapping[int, Slots],
        here: Here,
        run: str,
        wished: Iterable[int],
        silence: float,
        patience: float,
        fragment_bytes: int,
        connect_timeout: float,
        interface: str | None,
        shared_memory: bool,
        news: Callable[[], None],
    ) -> None:
        self.by_peer: dict[int, Link] = {}
        self.refused: str | None = None
        self._clients, self._me, self._slots, self._here, self._run = clients, me, slots, here, run
        self._timeout, self._interface, self._news = connect_timeout, interface, news
        self._pieces = {peer: Pieces(fragment_bytes) for peer in slots}
        self._patience, self._shared_memory = patience, shared_memory
        self._lines = Silence(slots, silence=silence, patience=patience, start=here.now())
        self._generations: dict[int, int] = {}
        self._errors: dict[int, str] = {}
        self._wished = set(wished)
        self._eager = 0.0
        self._closing = threading.Lock()
        self._closed = False

    # the training thread

    def is_up(self, peer: int) -> bool:
        """Whether there is a link to this peer that works."""
        link = self.by_peer.get(peer)
        return link is not None and link.state == "up"

    def wish(self, peer: int) -> bool:
        """Want a link to this peer; whether that is new."""
        if peer in self._wished or peer in self.by_peer:
            return False
        self._wished.add(peer)
        return True

    def close(self) -> None:
        """Hang up, for good: a control thread that the store holds up may look once more."""
        with self._closing:
            self._closed = True
        for link in list(self.by_peer.values()):
            link.close()
        self.by_peer.clear()

    # the control thread

    def look(self, control: Control) -> bool:
        """Replace broken links, open wanted ones. True: something will happen soon."""
        if self._closed:
            return False
        counts = {peer: slots.traffic[HEADERS].messages_in for peer, slots in self._slots.items()}
        self._lines.look(now=self._here.now(), counts=counts)
        for peer in control.members():
            if peer != self._me:
                if not control.has_begun(peer):
                    self._lines.reset(peer)
                self._tend(peer, control)
        return time.monotonic() < self._eager

    def drop(self, peer: int) -> None:
        """The peer is dead."""
        link = self.by_peer.pop(peer, None)
        if link is not None:
            link.close()

    def _tend(self, peer: int, control: Control) -> None:
        """One pair's generation only grows: to what the peer wants, or past a link that broke."""
        link = self.by_peer.get(peer)
        generation = before = self._generations.get(peer, 0)
        if link is None and generation == 0 and peer in self._wished:
            generation = 1
        if link is not None and link.state == "dead":
            if link.refused:
                self._refuse(link)
                return
            generation = max(generation, link.generation + 1)
        quiet = self._quiet(peer, link)
        if link is not None and link.state == "up" and quiet >= self._patience:
            generation = max(generation, link.generation + 1)  # a cut that nobody told us of
        if before and quiet >= 2 * self._patience and self._me < peer:
            why = f"it beats, but no connection with member {self._me} could be made or kept"
            control.roll.condemn(peer, f"{why}: {self._errors[peer]}" if peer in self._errors else why)
        generation = max(generation, control.wanted(peer))
        if link is not None and link.state == "up":
            control.roll.broken(peer, False)
        if generation > before:
            self._renew(peer, generation, control)
        if generation and peer not in self.by_peer and control.wanted(peer) == generation:
            self._open(peer, generation)

    def _quiet(self, peer: int, link: Link | None) -> float:
        """Seconds without a sign of the peer's life on the line; a greeting is one."""
        quiet = self._lines.quiet(peer)
        return min(quiet, self._here.now() - link.since) if link is not None and link.state == "up" else quiet

    def _renew(self, peer: int, generation: int, control: Control) -> None:
        link = self.by_peer.pop(peer, None)
        if link is not None:
            if link.error is not None:
                self._errors[peer] = link.error
            if link.since:  # else nothing was closed: there was no connection yet
                control.roll.broken(peer, link.state == "dead")
            link.close()
        if generation == 1:
            self._lines.reset(peer)
        self._generations[peer] = generation
        control.want(peer, generation)
        self._eager = time.monotonic() + EAGER

    def _open(self, peer: int, generation: int) -> None:
        self._eager = time.monotonic() + EAGER
        with self._closing:
            if self._closed:
                return
            self.by_peer[peer] = Link(
                self._clients,
                me=self._me,
                slots=self._slots[peer],
                here=self._here,
                run=self._run,
                generation=generation,
                pieces=self._pieces[peer],
                connect_timeout=self._timeout,
                interface=self._interface,
                shared_memory=self._shared_memory,
                news=self._news,
            )

    def _refuse(self, link: Link) -> None:
        if self.refused is None:
            self.refused = link.error
            self._news()
