"""One member's end in a virtual cluster: the whole contract of `mail`, in virtual time.

Each member's clock has an offset of its own, drawn from the seed: code that compares the clocks of two members fails
here first. Until the first acknowledgement a link counts from the start of the run: step 0, the receiver's clock then.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_async.transport import checks
from lightning_async.transport.mail import Letter, Loss, Message
from lightning_async.transport.virtual_board import VirtualBoard
from lightning_async.transport.virtual_clock import VirtualClock
from lightning_async.transport.virtual_health import Health
from lightning_async.transport.virtual_wire import Link, Packet, Wire


class VirtualCarrier:
    """Mail and board of one member; `stir` is called when something changed for it, `rest` passes time for `wait`."""

    def __init__(
        self,
        me: int,
        offsets: list[float],
        *,
        clock: VirtualClock,
        health: Health,
        wire: Wire,
        board: VirtualBoard,
        stir: Callable[[int], None],
        rest: Callable[[int, float], None],
    ) -> None:
        self._me = me
        self._offsets = offsets
        self._clock = clock
        self._health = health
        self._wire = wire
        self._board = board
        self._stir = stir
        self._rest = rest
        self._step = 0
        self._links: dict[int, Link] = {}
        self._inbox: dict[int, list[Packet]] = {}
        self._lent: dict[tuple[int, int], Packet] = {}
        self._losses: list[Loss] = []
        self._members = tuple(range(len(offsets)))
        self._dead: set[int] = set()
        self._live = (-1, self._members)
        self._drawn: dict[str, list[tuple[int, int]]] = {}
        self._notes: dict[int, bytes] = {}
        self._note: bytes | None = None

    # -- mail -------------------------------------------------------------------------------------------------------

    @property
    def me(self) -> int:
        """This member's rank."""
        return self._me

    @property
    def world(self) -> int:
        """How many members the run began with."""
        return len(self._offsets)

    def post(self, peer: int, message: Message) -> bool:
        """Send `message` to `peer` if the slot is free."""
        checks.check_message(self._me, len(self._offsets), peer, message)
        if not self._reaches(peer):
            return False
        link = self._link(peer)
        m = message
        if m.kind in link.out:
            return False
        body = None if m.body is None else self._wire.pool.copy(m.body)
        echo = link.step if m.echo < 0 else m.echo
        sealed = Message(m.kind, body, m.step, m.version, echo, m.samples, m.weight, m.reference)
        link.number += 1
        link.out[m.kind] = packet = Packet(self._me, peer, link.number, sealed, link.clock)
        self._wire.send(link, packet)
        return True

    def free(self, peer: int, kind: int) -> bool:
        """Whether `post` would accept a message now."""
        checks.check_peer(self._me, len(self._offsets), peer)
        checks.check_kind(kind)
        link = self._links.get(peer)
        return self._reaches(peer) and (link is None or kind not in link.out)

    def take(self, kind: int) -> list[Letter]:
        """All letters of this kind that arrived and were not taken yet."""
        checks.check_kind(kind)
        packets = self._inbox.pop(kind, None)
        if packets is None:
            return []
        now = self.now()
        letters = []
        for p in packets:
            self._lent[p.sender, p.number] = p
            letters.append(Letter(p.sender, p.number, p.message, now - p.clock))
        return letters

    def folded(self, letter: Letter) -> None:
        """Say that a taken letter has been used."""
        packet = self._lent.pop((letter.peer, letter.number), None)
        if packet is None:
            raise ValueError(
                f"letter {letter.number} of member {letter.peer} is not in the hands of member {self._me}: "
                "it was never taken, or was folded before"
            )
        self._wire.acknowledge(packet, self._step, self.now())

    def lost(self) -> list[Loss]:
        """The losses that became known since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def at(self, step: int) -> None:
        """Tell the carrier this member's own step."""
        self._step = step

    def members(self) -> tuple[int, ...]:
        """The ranks not declared dead, in order."""
        return self._members

    def live(self) -> tuple[int, ...]:
        """The members heard of lately, in order."""
        version = self._health.version
        if self._live[0] != version:
            me, hears = self._me, self._health.hears
            self._live = version, tuple(p for p in self._members if p == me or hears(me, p))
        return self._live[1]

    def now(self) -> float:
        """Seconds on this member's clock."""
        return self._clock.time + self._offsets[self._me]

    def wait(self, timeout: float) -> None:
        """Let virtual time pass until something changed here, or for `timeout` seconds."""
        self._rest(self._me, timeout)

    # -- board ------------------------------------------------------------------------------------------------------

    def propose(self, key: str, value: bytes) -> None:
        """Write `value` unless the key has one already."""
        self._board.up(self._me, self._board.write, key, bytes(value))

    def decided(self, key: str) -> bytes | None:
        """The value of `key`, if it is known here."""
        return self._board.read(self._me, key)

    def draw(self, counter: str, amount: int) -> None:
        """Ask for the next `amount` tickets."""
        checks.check_amount(amount)
        self._board.up(self._me, self._board.count, counter, amount, self._answer)

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The draws that were answered since the last call."""
        return self._drawn.pop(counter, [])

    def publish(self, note: bytes) -> None:
        """Replace this member's note."""
        checks.check_note(note)
        self._note = bytes(note)
        self._board.up(self._me, self._board.pin, self._me, self._note)

    def notes(self) -> dict[int, bytes]:
        """The newest known note of every member; one that is cut off knows what it knew."""
        if not self._health.is_cut_off(self._me):
            self._notes = dict(self._board.notes)
        own = {} if self._note is None else {self._me: self._note}
        return {**self._notes, **own}

    # -- what the wire, the board and the cluster tell this end -------------------------------------------------------

    def receive(self, packet: Packet) -> None:
        """A message arrived."""
        if packet.sender not in self._dead and not self._health.is_stopped(self._me):
            self._inbox.setdefault(packet.message.kind, []).append(packet)
            self._stir(self._me)

    def acknowledged(self, packet: Packet, step: int, clock: float) -> None:
        """A message of this member was folded."""
        if packet.receiver in self._dead:
            return
        link = self._links[packet.receiver]
        del link.out[packet.message.kind]
        if clock >= link.clock:
            link.step, link.clock = step, clock
        if packet.message.body is not None:
            self._wire.pool.give(packet.message.body)
        self._stir(self._me)

    def learn_death(self, member: int) -> None:
        """A member was declared dead: what it has not folded is lost."""
        self._dead.add(member)
        self._members = tuple(p for p in self._members if p != member)
        self._live = (-1, self._members)
        link = self._links.get(member)
        if link is not None:
            unfolded = sorted(link.out.values(), key=lambda packet: packet.number)
            self._losses += [Loss(member, packet.number, packet.message) for packet in unfolded]
            link.out = {}
        self._stir(self._me)

    def _told_tickets(self, counter: str, first: int, amount: int) -> None:
        self._drawn.setdefault(counter, []).append((first, amount))
        self._stir(self._me)

    def _answer(self, counter: str, first: int, amount: int) -> None:
        self._board.down(self._me, self._told_tickets, counter, first, amount)

    def _reaches(self, peer: int) -> bool:
        me, health = self._me, self._health
        return peer not in self._dead and health.hears(me, peer) and not health.is_stopped(me)

    def _link(self, peer: int) -> Link:
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(self._offsets[peer])
        return link
