"""One member's end in a virtual cluster: the whole contract of `mail`, in virtual time.

Each member's clock has an offset of its own, drawn from the seed: code that compares the clocks of two members fails
here first. Until the first acknowledgement a link counts from the start of the run: step 0, the receiver's clock then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_async.transport import checks
from lightning_async.transport.mail import Letter, Loss, Message, Service
from lightning_async.transport.virtual_board import VirtualBoard
from lightning_async.transport.virtual_clock import VirtualClock
from lightning_async.transport.virtual_health import Health
from lightning_async.transport.virtual_service import VirtualService
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
        self._service: VirtualService | None = None

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
        checks.check_message(self._me, len(self._offsets), peer, message, serves=self._service is not None)
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
        if peer == self._me:
            self._clock.at(link.follow(self._clock.time), self.receive, packet)
        else:
            self._wire.send(link, packet)
        return True

    def free(self, peer: int, kind: int) -> bool:
        """Whether `post` would accept a message now."""
        checks.check_peer(self._me, len(self._offsets), peer, serves=self._service is not None)
        checks.check_kind(kind)
        link = self._links.get(peer)
        return self._reaches(peer) and (link is None or kind not in link.out)

    def take(self, kind: int) -> list[Letter]:
        """All letters of this kind that arrived and were not taken yet."""
        checks.check_kind(kind)
        packets = self._inbox.pop(kind, None)
        if packets is None:
            return []
        return [self.lend(packet) for packet in packets]

    def folded(self, letter: Letter) -> None:
        """Say that a taken letter has been used."""
        packet = self._lent.pop((letter.peer, letter.number), None)
        if packet is None:
            raise ValueError(
                f"letter {letter.number} of member {letter.peer} is not in the hands of member {self._me}: "
                "it was never taken, or was folded before"
            )
        if packet.sender == self._me:
            self._clock.at(self._clock.time, self.acknowledged, packet, self._step, self.now())
        else:
            self._wire.acknowledge(packet, self._step, self.now())

    def lost(self) -> list[Loss]:
        """The losses that became known since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """Give letters of these kinds to `service` from now on."""
        kinds = list(kinds)
        for kind in kinds:
            checks.check_kind(kind)
        self._service = self._service or VirtualService(self)
        early = [packet for kind in kinds for packet in self._inbox.pop(kind, [])]
        self._service.begin(kinds, service, sorted(early, key=lambda packet: packet.number))

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

    def forget(self, key: str, *, gone: bool = False) -> None:
        """Take it off the board if nobody asks for it."""
        if gone:
            self._board.drop(key)

    def draw(self, counter: str, amount: int) -> None:
        """Ask for the next `amount` tickets."""
        checks.check_amount(amount)
        self._board.up(self._me, self._board.count, counter, amount, self._answer)

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The draws that were answered since the last call."""
        return self._drawn.pop(counter, [])

    def publish(self, note: bytes, *, soon: bool = False) -> None:
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
        if packet.sender in self._dead or self._health.is_stopped(self._me):
            return
        if self._service is not None and packet.message.kind in self._service.kinds:
            self._service.put(packet)
            return
        self._inbox.setdefault(packet.message.kind, []).append(packet)
        self._stir(self._me)

    def look(self) -> None:
        """Something changed that a service may have waited for: this member's thaw, a slot, who is heard."""
        if self._service is not None and self.can_serve:
            self._service.go_on()

    @property
    def can_serve(self) -> bool:
        """Whether this member's time goes on."""
        return not self._health.is_frozen(self._me) and not self._health.is_stopped(self._me)

    def lend(self, packet: Packet) -> Letter:
        """A packet as a letter, which is in this member's hands from now on."""
        self._lent[packet.sender, packet.number] = packet
        return Letter(packet.sender, packet.number, packet.message, self.now() - packet.clock)

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
        self.look()

    def learn_death(self, member: int) -> None:
        """A member was declared dead: what it has not folded is lost."""
        self._dead.add(member)
        self._members = tuple(p for p in self._members if p != member)
        self._live = (-1, self._members)
        link = self._links.get(member)
        if link is not None:
            unfolded = sorted(link.out.values(), key=lambda packet: packet.number)
            served = self._service.posted if self._service is not None else set()
            lost = [packet for packet in unfolded if packet.message.kind not in served]
            self._losses += [Loss(member, packet.number, packet.message) for packet in lost]
            link.out = {}
        self._stir(self._me)

    def _told_tickets(self, counter: str, first: int, amount: int) -> None:
        self._drawn.setdefault(counter, []).append((first, amount))
        self._stir(self._me)

    def _answer(self, counter: str, first: int, amount: int) -> None:
        self._board.down(self._me, self._told_tickets, counter, first, amount)

    def _reaches(self, peer: int) -> bool:
        me, health = self._me, self._health
        return peer not in self._dead and (peer == me or health.hears(me, peer)) and not health.is_stopped(me)

    def _link(self, peer: int) -> Link:
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(self._offsets[peer])
        return link
