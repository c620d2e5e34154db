"""A service in a virtual cluster: what it does is an event, at the moment of the arrival, and takes no virtual time.

A frozen member serves when it thaws. What is owed waits for the slot, for the peer to be heard, or for its death.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from lightning_async.transport.mail import Letter, Message, Service
from lightning_async.transport.service import Owed
from lightning_async.transport.virtual_wire import Packet


class Member(Protocol):
    """What a service needs of its member."""

    @property
    def can_serve(self) -> bool:
        """Whether its time goes on."""

    def members(self) -> tuple[int, ...]:
        """The ranks not declared dead."""

    def lend(self, packet: Packet) -> Letter:
        """A packet as a letter."""

    def post(self, peer: int, message: Message) -> bool:
        """Send a message if the slot is free."""

    def folded(self, letter: Letter) -> None:
        """A letter was used."""


class VirtualService:
    """Letters that wait for a frozen member, and answers that wait for a slot."""

    def __init__(self, member: Member) -> None:
        self.kinds: frozenset[int] = frozenset()
        self.posted: set[int] = set()
        self._member = member
        self._service: Service | None = None
        self._packets: deque[Packet] = deque()
        self._owed = Owed(member.post, lambda peer: peer not in member.members())
        self._busy = False

    def begin(self, kinds: Iterable[int], service: Service, early: Iterable[Packet]) -> None:
        """From now on it is this service; those that are here come first."""
        self.kinds, self._service = frozenset(kinds), service
        self._packets.extend(early)
        self.go_on()

    def put(self, packet: Packet) -> None:
        """A letter has come."""
        self._packets.append(packet)
        if self._member.can_serve:
            self.go_on()

    def go_on(self) -> None:
        """Serve what waits, and post what is owed, as far as it goes. To fold is to come here again: not twice."""
        if self._busy:
            return
        self._busy = True
        try:
            self._owed.pay()
            while self._packets:
                self._serve(self._packets.popleft())
                self._owed.pay()
        finally:
            self._busy = False

    def _serve(self, packet: Packet) -> None:
        service = self._service
        assert service is not None  # letters come behind `begin`
        letter = self._member.lend(packet)
        for peer, message in service(letter):
            self.posted.add(message.kind)
            self._owed.post(peer, message)
        self._member.folded(letter)
