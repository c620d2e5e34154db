"""A hall: members of one process tell each other what no log holds (numbers and words of meetings), at once.

    seat 0   propose, post ---> [ board, mail ] ---> decided, take   seat 1        nothing is lost, nothing takes time

Each seat is a carrier. Whoever can do nothing `rest`s on the stage until another seat did something.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lightning_async.transport.mail import Letter, Loss, Message, Service
from lightning_async.transport.stage import Stage

Slot = tuple[int, int, int]
"""Sender, receiver and kind."""


@dataclass
class Hall:
    """What all seats share.

    Attributes:
        stage: Where the members run.
        here: The members that did not leave.
        board: What was decided.
        tickets: How many tickets of each counter were drawn.
        notes: Each member's newest note.
        mail: What was posted and not folded.
    """

    stage: Stage
    here: set[int]
    board: dict[str, bytes] = field(default_factory=dict)
    tickets: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    notes: dict[int, bytes] = field(default_factory=dict)
    mail: dict[Slot, Letter] = field(default_factory=dict)


class Seat:
    """One member's end."""

    def __init__(self, hall: Hall, me: int, world: int) -> None:
        self._hall = hall
        self._me, self._world = me, world
        self._numbers: dict[int, int] = defaultdict(int)
        self._taken: set[Slot] = set()
        self._drawn: dict[str, list[tuple[int, int]]] = defaultdict(list)

    @property
    def me(self) -> int:
        """This member's rank."""
        return self._me

    @property
    def world(self) -> int:
        """How many members the run began with."""
        return self._world

    def leave(self) -> None:
        """This member says nothing more."""
        self._hall.here.discard(self._me)
        self._hall.stage.moved()

    def post(self, peer: int, message: Message) -> bool:
        """Put `message` into the peer's slot, if it is free."""
        if not self.free(peer, message.kind):
            return False
        self._numbers[peer] += 1
        body = None if message.body is None else message.body.detach().clone()
        letter = Letter(self._me, self._numbers[peer], replace(message, body=body, echo=max(0, message.echo)), 0.0)
        self._hall.mail[self._me, peer, message.kind] = letter
        self._hall.stage.moved()
        return True

    def free(self, peer: int, kind: int) -> bool:
        """Whether the slot is empty and its peer here."""
        return peer in self._hall.here and (self._me, peer, kind) not in self._hall.mail

    def take(self, kind: int) -> list[Letter]:
        """What lies in this member's slots of this kind and was not taken yet."""
        mine = [s for s in sorted(self._hall.mail) if s[1:] == (self._me, kind) and s not in self._taken]
        self._taken.update(mine)
        return [self._hall.mail[slot] for slot in mine]

    def folded(self, letter: Letter) -> None:
        """Empty the slot."""
        slot = (letter.peer, self._me, letter.message.kind)
        self._taken.discard(slot)
        del self._hall.mail[slot]
        self._hall.stage.moved()

    def lost(self) -> list[Loss]:
        """Nothing ever is."""
        return []

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """Nobody does: what services did is in the logs."""
        raise NotImplementedError("a hall has no services")

    def at(self, step: int) -> None:
        """Nobody asks."""

    def members(self) -> tuple[int, ...]:
        """Who did not leave."""
        return tuple(sorted(self._hall.here))

    def live(self) -> tuple[int, ...]:
        """Who did not leave."""
        return self.members()

    def now(self) -> float:
        """Seconds on this process's clock."""
        return time.monotonic()

    def wait(self, timeout: float) -> None:
        """Let the others do something."""
        self._hall.stage.rest("a change")

    def propose(self, key: str, value: bytes) -> None:
        """Write `value` unless the key has one already."""
        self._hall.board.setdefault(key, value)
        self._hall.stage.moved()

    def decided(self, key: str) -> bytes | None:
        """The value of `key`."""
        return self._hall.board.get(key)

    def forget(self, key: str, *, gone: bool = False) -> None:
        """Take it off the board if nobody asks for it."""
        if gone:
            self._hall.board.pop(key, None)

    def draw(self, counter: str, amount: int) -> None:
        """Take the next tickets."""
        self._drawn[counter].append((self._hall.tickets[counter], amount))
        self._hall.tickets[counter] += amount

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The draws since the last call."""
        return self._drawn.pop(counter, [])

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """Replace this member's note."""
        self._hall.notes[self._me] = note
        self._hall.stage.moved()

    def notes(self) -> dict[int, bytes]:
        """Everybody's newest note."""
        return dict(self._hall.notes)
