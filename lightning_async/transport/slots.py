"""What two members owe each other, whatever connection they have at the moment.

    post --copy--> slot[kind] --queue--> (link) --> box[kind] --> inbox --take--> letter --folded--> acks --> (link)
                      ^                                                                                 |
                      +----------------------------------- released -----------------------------------+

A connection may break and be made again; numbers, slots and boxes outlive it. At every greeting each end says the last
number it has received whole and which of those it has not folded yet. From this the other end knows the fate of each
message it has posted: folded (the slot is free), waiting there (the slot stays taken), or never arrived (sent again,
under the same number). So a message is delivered exactly once however often the connection breaks.

Whoever changes something here notifies `changed`, the training thread once a step (`gathering`), or it sends by itself;
the link's sender thread waits on nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_async.transport.checks import KINDS
from lightning_async.transport.gathering import Gathering
from lightning_async.transport.header import DATA, AnotherProtocolError, Header, dtype_code, dtype_of
from lightning_async.transport.mail import Letter, Loss, Message
from lightning_async.transport.traffic import HEADERS, Count, numbers_in


def nothing() -> None:
    """What is called where nobody wants to know."""


def _own(m: Message, body: Tensor | None, echo: int) -> Message:
    """The message with the sender's own copy of its body; `replace` would take thrice as long, at every step."""
    return Message(m.kind, body, m.step, m.version, echo, m.samples, m.weight, m.reference)


def never() -> bool:
    """How a message is sent in the thread that posts it, while there is no link."""
    return False


def nobody(letter: Callable[[], Letter]) -> None:
    """What takes letters where nobody serves."""


@dataclass(slots=True)
class Here:
    """This member as its headers describe it, and what of its mail is gathered."""

    step: int = 0
    gathering: Gathering = field(default_factory=Gathering)

    def now(self) -> float:
        """Seconds on this member's clock."""
        return time.monotonic()

    def nanoseconds(self) -> int:
        """The same clock, as it travels."""
        return int(self.now() * 1e9)


@dataclass(slots=True)
class Slot:
    """One posted message: the sender's own copy, its header, and since when; without a header it is free."""

    buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    header: Header | None = None
    message: Message | None = None
    since: float = 0.0

    def view(self, nbytes: int) -> Tensor:
        """The first `nbytes` of the kept buffer, which grows when it must."""
        if self.buffer.numel() < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self.buffer if self.buffer.numel() == nbytes else self.buffer[:nbytes]


@dataclass(frozen=True, slots=True)
class _Arrived:
    peer: int
    message: Message
    number: int
    clock: int


class Inbox:
    """Letters of all peers, by kind, in the order of their arrival."""

    def __init__(self, *, here: Here, news: Callable[[], None] = nothing) -> None:
        self._here = here
        self._news = news
        self._kinds: dict[int, deque[_Arrived]] = {kind: deque() for kind in range(KINDS)}
        self._gate = threading.Lock()
        self._served: frozenset[int] = frozenset()
        self._door: Callable[[Callable[[], Letter]], None] = nobody

    def put(self, peer: int, number: int, message: Message, clock: int) -> None:
        """Called by receiver threads; a deque's append is atomic, and the lock is for the moment of `hand_over`."""
        arrived = _Arrived(peer, message, number, clock)
        with self._gate:
            if message.kind in self._served:
                self._door(partial(self._letter, arrived))
                return
            self._kinds[message.kind].append(arrived)
        self._news()

    def hand_over(self, kinds: Iterable[int], door: Callable[[Callable[[], Letter]], None]) -> None:
        """From now on letters of these kinds go through `door`, those that are here before all others."""
        with self._gate:
            self._served, self._door = frozenset(kinds), door
            early = [one for kind in self._served for one in self._kinds[kind]]
            for kind in self._served:
                self._kinds[kind].clear()
            for arrived in sorted(early, key=lambda one: one.number):  # on each link, as they were posted
                door(partial(self._letter, arrived))

    def take(self, kind: int) -> list[Letter]:
        """All letters of this kind; their age is counted from the last sign of ours that the sender had then."""
        waiting = self._kinds[kind]
        if not waiting:
            return []
        return [self._letter(waiting.popleft()) for _ in range(len(waiting))]

    def _letter(self, arrived: _Arrived) -> Letter:
        seconds = max(0.0, self._here.now() - arrived.clock * 1e-9)
        return Letter(arrived.peer, arrived.number, arrived.message, seconds)


class Slots:
    """Both directions between this member and one peer."""

    def __init__(
        self, peer: int, *, inbox: Inbox, here: Here, max_bytes: int, news: Callable[[], None] = nothing
    ) -> None:
        self.peer = peer
        self.changed = threading.Condition()
        self.queue: deque[Slot] = deque()
        self.acks: deque[int] = deque()
        self.write: Callable[[], bool] = never
        self.traffic: dict[int, Count] = {HEADERS: Count()}
        self.max_bytes = max_bytes
        self._limit = max_bytes
        self._inbox = inbox
        self._here = here
        self._news = news
        self._slots: dict[int, Slot] = {}
        self._taken, self._since = 0, 0.0
        self._posted = 0
        self._boxes: dict[int, Slot] = {}
        self._received = 0
        self._unfolded: dict[int, int] = {}
        self._heard_step = 0
        self._heard_clock = 0
        self._over = False

    # the training thread

    def check(self, message: Message) -> int:
        """The body's length in bytes; a ValueError if one of the ends does not take so much, be the link up or not."""
        body = message.body
        nbytes = 0 if body is None else body.numel() * body.element_size()
        if nbytes > self._limit:
            raise ValueError(
                f"a message of {nbytes} bytes is longer than member {self.peer} or this one takes ({self._limit} "
                "bytes): send it in parts, or raise `max_bytes` on all members"
            )
        return nbytes

    def free(self, kind: int) -> bool:
        """Whether the slot of this kind is free."""
        slot = self._slots.get(kind)
        return not self._over and (slot is None or slot.header is None)

    def post(self, message: Message) -> bool:
        """Copy the message into its slot and queue it, if the slot is free."""
        nbytes = self.check(message)
        if not self.free(message.kind):
            return False
        slot = self._slots.get(message.kind) or self._new_slot(message.kind)
        body = None if message.body is None else slot.view(nbytes).view(message.body.dtype)
        header = self._header(message, nbytes)
        if body is not None and message.body is not None:
            body.copy_(message.body)  # outside the lock: the slot is free, so it is nobody else's
        with self.changed:
            if self._over:
                return False
            self._posted += 1
            header.number = self._posted
            slot.header, slot.message = header, _own(message, body, header.echo)
            slot.since = self._here.now()
            self._since = self._since if self._taken else slot.since
            self._taken += 1
            self.count(message.kind).numbers_out += numbers_in(body)
            self.queue.append(slot)
            hurries = self._here.gathering.hurries
            if not hurries:
                self._here.gathering.stir(self.changed, nbytes, self.hurry)
        if hurries:
            self.hurry()
        return True

    def hurry(self) -> None:
        """Send it in this thread, which has the interpreter; if that cannot be, wake the link's own."""
        written = self.write()
        with self.changed:
            if not self.acks and not self.queue:
                self._here.gathering.sent(self.changed)
            elif not written:
                self.changed.notify_all()

    def _new_slot(self, kind: int) -> Slot:
        with self.changed:  # the link's thread looks through them after a reconnection
            return self._slots.setdefault(kind, Slot())

    def _header(self, message: Message, nbytes: int) -> Header:
        return Header(
            DATA,
            kind=message.kind,
            step=message.step,
            version=message.version,
            echo=self._heard_step if message.echo == -1 else message.echo,
            echo_clock=self._heard_clock,
            samples=message.samples,
            weight=message.weight,
            reference=message.reference,
            dtype=dtype_code(None if message.body is None else message.body.dtype),
            nbytes=nbytes,
        )

    def folded(self, letter: Letter) -> None:
        """The letter was used: its box is free, and the sender will be told."""
        kind = letter.message.kind
        with self.changed:
            if self._unfolded.get(kind) != letter.number:
                raise ValueError(f"letter {letter.number} of member {self.peer} was given back already")
            del self._unfolded[kind]
            self.acks.append(letter.number)
            self._here.gathering.stir(self.changed, 0, self.hurry)

    def idle(self) -> bool:
        """Whether everything posted was folded, and every fold was told."""
        with self.changed:
            return not self.acks and all(slot.header is None for slot in self._slots.values())

    # the link's threads

    def heard(self, header: Header) -> None:
        """Note the peer's step and clock, which every header carries."""
        self._heard_step, self._heard_clock = header.own_step, header.own_clock

    def hello(self) -> tuple[int, list[int]]:
        """What to say at a greeting: (last number received, those not folded); it replaces all older answers."""
        with self.changed:
            self.acks.clear()
            return self._received, sorted(self._unfolded.values())

    def resume(self, *, received: int, unfolded: set[int], limit: int) -> None:
        """The peer's greeting: free what it folded, queue again what it never got, in the old order."""
        with self.changed:
            self._limit = min(self.max_bytes, limit)
            again = []
            for slot in self._slots.values():
                if slot.header is not None and slot.header.number > received:
                    again.append((slot.header.number, slot))
                elif slot.header is not None and slot.header.number not in unfolded:
                    self._free(slot)
            self.queue = deque(slot for _, slot in sorted(again, key=lambda one: one[0]))
            self.changed.notify_all()

    def told(self, most: int) -> tuple[int, ...]:
        """The oldest folds not told to the peer yet, for the next header; called with the lock held."""
        return tuple(self.acks.popleft() for _ in range(min(most, len(self.acks))))

    def released(self, numbers: tuple[int, ...]) -> None:
        """The peer folded these messages: their slots are free."""
        with self.changed:
            for number in numbers:
                self._free(self._holder(number))
        self._news()

    def _holder(self, number: int) -> Slot:
        for slot in self._slots.values():
            if slot.header is not None and slot.header.number == number:
                return slot
        raise AnotherProtocolError(f"member {self.peer} folded message {number}, which it does not hold")

    def box(self, header: Header) -> Tensor:
        """Where the body of an announced message goes; the protocol says that it is free."""
        if not 0 < header.kind < KINDS or not 0 <= header.nbytes <= self.max_bytes:
            raise AnotherProtocolError(f"member {self.peer} announced kind {header.kind} with {header.nbytes} bytes")
        if header.kind in self._unfolded or header.number != self._received + 1:
            raise AnotherProtocolError(f"member {self.peer} sent message {header.number} out of turn")
        box = self._boxes.get(header.kind)
        if box is None:
            box = self._boxes[header.kind] = Slot()
        return box.view(header.nbytes)

    def deliver(self, header: Header, body: Tensor) -> None:
        """A message is here, whole."""
        dtype = dtype_of(header.dtype)
        message = Message(
            kind=header.kind,
            body=None if dtype is None else body.view(dtype),
            step=header.step,
            version=header.version,
            echo=header.echo,
            samples=header.samples,
            weight=header.weight,
            reference=header.reference,
        )
        with self.changed:
            self._received = header.number
            self._unfolded[header.kind] = header.number
            count = self.count(header.kind)
            count.messages_in += 1
            count.bytes_in += header.nbytes
        self._inbox.put(self.peer, header.number, message, header.echo_clock)

    def _free(self, slot: Slot) -> None:
        assert slot.header is not None  # a free slot is not freed again
        now = self._here.now()
        self.count(slot.header.kind).seconds_out += now - slot.since
        slot.header = slot.message = None
        self._taken -= 1
        if not self._taken:
            self.traffic[HEADERS].seconds_out += now - self._since

    def count(self, kind: int) -> Count:
        """The traffic of one kind."""
        return self.traffic.setdefault(kind, Count())

    # whoever learns that the peer is dead

    def bury(self) -> list[Loss]:
        """Nothing more will be sent: all that was posted and not folded, with the sender's own copies."""
        with self.changed:
            self._over = True
            self.queue.clear()
            self.acks.clear()
            held = [slot for slot in self._slots.values() if slot.header is not None]
            lost = [Loss(self.peer, s.header.number, s.message) for s in held if s.header and s.message]
            return sorted(lost, key=lambda loss: loss.number)
