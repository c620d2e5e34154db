"""The contract of every carrier: one-sided mail that never blocks, and a board on which the first value written wins.

    post -----> [ slot ] ~~~~ wire ~~~~> [ inbox ] -----> take ... folded
      ^                                                               |
      +----------------------- the slot is free again <---------------+

A link (one ordered pair of ranks) is lossless and in order. It has one slot for each kind of message, and the slot is
free again when the receiver has FOLDED the message, not when its bytes arrived: so a slow receiver costs its peers
skipped messages, never time, and never more than one unfolded message of each kind.

Nothing here waits. Code that must wait is a generator that yields the name of what it waits for (`Wait`); whoever
drives it (a training thread, a virtual clock) decides how to pass the time and when to give up, and can say what was
missing. Code that never yields never waits: that is how "nobody waits" is checked.

    post -----> [ slot ] ~~~~ wire ~~~~> service(letter) -> answers, on arrival      what a member serves for all others

A service is a function of the letters that reached it, in their order, and of nothing else: it owns its state, and runs
beside the training. Whoever speaks to it, its own member too, does so by mail.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Wait = Generator[str, None, T]
"""A computation that may have to wait: it yields words naming what is missing, and is resumed on any change."""

MARKER = 1
"""Reserved kind: no body; tells the receiver that all that was posted before it on this link has been delivered."""
CONTRIBUTION = 2
"""Reserved kind, with 4 for the second channel: a member's slice on its way to the slice's owner (rounds)."""
RESULT = 3
"""Reserved kind, with 5 for the second channel: an owner's finished slice on its way to everybody (rounds)."""
CUT = 6
"""Reserved kind: no body; what is before it on this link was posted before its sender recorded its state for the cut
`reference`, what is behind it after (cuts)."""
SUM = 7
"""Reserved kind: what a member's part of the cut `reference` brings into its consensus (cuts)."""
FIRST_FREE_KIND = 16  # 8 to 15 are for the ranks of one member (siblings)
"""Algorithms number their own kinds from here; a kind is below 64."""
KIND_NAMES = {0: "headers", MARKER: "marker", CUT: "cut", SUM: "cut sum"}
KIND_NAMES |= dict.fromkeys((CONTRIBUTION, RESULT, CONTRIBUTION + 2, RESULT + 2), "rounds")
"""What kinds are called where people read them; algorithms name their own."""


LONGEST = 4 << 30
"""Bytes of the longest body that a member of a real run takes."""


@dataclass(frozen=True, slots=True)
class Message:
    """What is posted: a fixed header of integers and at most one flat tensor.

    Attributes:
        kind: What it is; each kind has a slot of its own on every link.
        body: One flat, contiguous tensor, or None. The carrier copies it before `post` returns.
        step: The sender's own step at the launch.
        version: A version, an attempt, or whatever number the algorithm wants to travel.
        echo: The receiver's step this message refers to; -1 lets the carrier fill in the newest it has heard.
        samples: Samples the body stands for.
        weight: An integer mass.
        reference: The number of the message this one answers, a round's number, ...
    """

    kind: int
    body: Tensor | None = None
    step: int = 0
    version: int = 0
    echo: int = -1
    samples: int = 0
    weight: int = 0
    reference: int = 0


@dataclass(frozen=True, slots=True)
class Letter:
    """A message as the receiver gets it.

    Attributes:
        peer: Who sent it.
        number: Its number on this link (1, 2, 3, ... over all kinds).
        message: The message, with `echo` filled in. The body is lent: it is valid until `folded` is called.
        seconds: An upper bound on its age, by the receiver's clock.
    """

    peer: int
    number: int
    message: Message
    seconds: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A message that was posted and is now known never to be folded: its peer was declared dead.

    The body is the sender's own copy, so that what was lost can be entered in a ledger.
    """

    peer: int
    number: int
    message: Message


Service = Callable[[Letter], Iterable[tuple[int, Message]]]
"""What a member does on the arrival of a letter: it returns what is to be posted, and to whom."""


class Mail(Protocol):
    """One member's end of all its links. All calls come from one thread and none of them blocks, except `wait`."""

    @property
    def me(self) -> int:
        """This member's rank."""

    @property
    def world(self) -> int:
        """How many members the run began with."""

    def post(self, peer: int, message: Message) -> bool:
        """Send `message` to `peer` if the slot is free.

        True: it will be delivered to exactly one `take` of the peer, or reported once by `lost`; the sender never
        takes it back. False: nothing was sent (slot taken, peer not live, or the link is not up yet); what the message
        would have carried stays at home.
        """

    def free(self, peer: int, kind: int) -> bool:
        """Whether `post` would accept a message now; lets the caller save the work of making one."""

    def take(self, kind: int) -> list[Letter]:
        """All letters of this kind that arrived and were not taken yet, in the order of their arrival."""

    def folded(self, letter: Letter) -> None:
        """Say that a taken letter has been used: its body goes back to the carrier and the sender's slot is freed.

        Every taken letter must be given back exactly once, also a refused one.
        """

    def lost(self) -> list[Loss]:
        """The losses that became known since the last call."""

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """Give letters of these kinds to `service` from now on, in place of `take`; earlier ones that wait, first.

        It is called on arrival, by a thread of the carrier's own, for one letter after the other. It must be a function
        of the letters alone, in their order: then a recorded run can be replayed. The letter is folded when it returns.
        What it returns is posted: what finds its slot taken or its peer silent waits until it can go, and ends with a
        peer that dies; it is not among those `lost`. No kind may be posted by services and by members as well.

        A member that serves may post to itself: such letters reach its own service, and the answers come by `take`.
        Another call replaces the service. If a service raises, its member has failed.
        """

    def at(self, step: int) -> None:
        """Tell the carrier this member's own step; acknowledgements echo it to the peers, who date their mail by it."""

    def members(self) -> tuple[int, ...]:
        """The ranks not declared dead, in order, this one included, and also those that are still to come.

        A rank never comes back into it.
        """

    def live(self) -> tuple[int, ...]:
        """The members heard of lately, in order, this one included.

        One that is frozen or cut off, or still to come, is missing from it.
        """

    def now(self) -> float:
        """Seconds on this member's clock."""

    def wait(self, timeout: float) -> None:
        """Return when something new may be there, or after `timeout` seconds. For those who drive a `Wait` only."""


class Board(Protocol):
    """A few small values that all members agree on: decisions, counters and notes. Nothing here blocks.

    The first value written to a key stays. A counter's tickets go to exactly one member each. A note is the newest word
    of its member, and outlives it.
    """

    def propose(self, key: str, value: bytes) -> None:
        """Write `value` unless the key has one already."""

    def decided(self, key: str) -> bytes | None:
        """The value of `key`, the same for everybody until it is gone; None while none is known here."""

    def forget(self, key: str, *, gone: bool = False) -> None:
        """This member asks for this decision no more. `gone`: nor does any other, so nobody needs to keep it."""

    def draw(self, counter: str, amount: int) -> None:
        """Ask for the next `amount` tickets of a counter that begins at 0."""

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The (first ticket, amount) of each of this member's draws that was answered since the last call, in order."""

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """Replace this member's note (at most 1 kB); it travels with the next heartbeat.

        `soon`: this is of use for a moment only. Heartbeats come at once then, and the notes of others as fast.
        """

    def notes(self) -> dict[int, bytes]:
        """The newest known note of every member that ever published one, also of the dead."""


class Carrier(Mail, Board, Protocol):
    """What a transport gives each member: mail and board."""


def founders(mail: Mail) -> Sequence[int]:
    """The members that the run began with: all ranks, or of members of several ranks those that speak (`layers`)."""
    found: Sequence[int] = getattr(mail, "speakers", range(mail.world))
    return found
