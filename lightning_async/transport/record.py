"""A log of what the carrier answered one member: events only, no weights and no gradients.

    algorithm --question--> RecordingCarrier --question--> carrier
              <--answer----       |          <--answer----
                                  v
                      [12, "take", 16, [[3, 7, 41, 0.25]]]     the 12th question, and its answer

Training is a function of its seeds, its samples and these answers; the bodies are the other members' posts, which their
own logs bring back (`replay`). A question whose answer can be guessed (nothing new since the last time) is counted but
not written: the polls of a member that waits cost no lines. `Guesses` says for both sides what can be guessed.

Beside the events there are notes, which are no part of the conversation: what a replay is compared with (a digest of
the weights, the loss of a batch) or must be told (a learning rate). A note has the number of the question before it.

A service is a function of the letters that reached it: their order is written, by numbers of its own.

    [7, "served", 1, 3, 18, 40, 0, 0.25]     its 7th letter: to the 1st service, from member 3, kind 18, number 40, ...
    [7, "counts", 3, 112, 0.5]               of which half counts, says a law of shrinking: from member 3, version 112
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex

import torch

from lightning_async.transport.mail import FIRST_FREE_KIND, Carrier, Letter, Loss, Mail, Message, Service, founders

SCHEMA = 4
ACTS = frozenset({"meet", "finish", "folded", "at", "propose", "draw", "publish", "serve"})
"""Events that have no answer."""
ALWAYS = frozenset({"post", "batch"})
"""Events that are written whatever the answer."""
NOTE = "note"
SERVED = "served"
"""A letter that reached the member's service. These lines stand between the events in no order: two threads write."""
COUNTS = "counts"
"""What a law of shrinking said to the service, for the letter before. Said to the member itself it is an event."""


class Sink(Protocol):
    """Where lines go: an open text file, or anything that can be written to."""

    def write(self, text: str, /) -> object:
        """Take a line."""


class Guesses:
    """What a reader of the log expects where nothing is written: nothing new, or the same as the last time."""

    def __init__(self, members: Iterable[int]) -> None:
        everybody = list(members)
        self._last: dict[tuple[Any, ...], Any] = {("members",): everybody, ("live",): everybody, ("notes",): {}}

    def of(self, question: tuple[Any, ...]) -> Any:
        """The guess for a question (its name and arguments)."""
        if question[0] in ("take", "lost", "drawn"):
            return []
        if question[0] == "factor":
            return 1.0
        return self._last.get(question, True if question[0] == "free" else None)

    def learn(self, question: tuple[Any, ...], answer: Any) -> None:
        """Remember an answer that was written."""
        if question[0] in ("members", "live", "notes", "decided", "free"):
            self._last[question] = answer

    def forget(self, question: tuple[Any, ...]) -> None:
        """It is asked no more."""
        self._last.pop(question, None)


class RecordingCarrier:
    """A carrier that does what `carrier` does, and writes to `sink` what it answered.

    Args:
        carrier: Who is asked.
        sink: Where the lines go.
        seed: The seed of the run; None: it has none.
        about: What else is to be known of the run, for the header.
    """

    def __init__(
        self, carrier: Carrier, sink: Sink, *, seed: int | None = 0, about: Mapping[str, Any] | None = None
    ) -> None:
        self._carrier = carrier
        self._mail: Mail = carrier
        self._sink = sink
        self._count = 0
        self._guesses = Guesses(founders(carrier))
        self._noted: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._services = self._served = 0
        self._serving = -1  # the thread that serves a letter
        self._looked: int | None = None  # the count at which a look began that has found nothing yet
        header = {"schema": SCHEMA, "me": carrier.me, "world": carrier.world, "seed": seed}
        versions = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        self._line({**header, **versions, **(about or {})})

    @property
    def me(self) -> int:
        """This member's rank."""
        return self._carrier.me

    @property
    def world(self) -> int:
        """How many members the run began with."""
        return self._carrier.world

    @property
    def speakers(self) -> Sequence[int]:
        """Who speaks for each of these."""
        return founders(self._carrier)

    def through(self, mail: Mail) -> None:
        """From here on the mail of algorithms goes through this, which stands before the carrier: it is what they are
        told that counts. Rounds keep to the carrier."""
        self._mail = mail

    def _of(self, kind: int) -> Mail:
        return self._mail if kind >= FIRST_FREE_KIND else self._carrier

    # -- the program's own acts, written so that a replay that strays is caught where it strays -----------------------

    def note_fetched(self, sample_ids: Iterable[Any]) -> None:
        """Record which samples were fetched, to be trained on in this order."""
        self.note("fetched", plain(sample_ids))

    def note_batch(self, loss: float | None = None) -> float | None:
        """Record that the next batch was trained on, and with what loss; returns the recorded loss."""
        self._write("batch", loss)
        return loss

    def note_meeting(self) -> None:
        """Record that the members meet here."""
        self._write("meet")

    def note_factor(self, peer: int, base: int, law: Callable[[], float]) -> float:
        """Record what a law says that a contribution counts; returns that."""
        factor = float(law())
        if threading.get_ident() == self._serving:
            self._line([self._served, COUNTS, peer, base, factor])
        else:
            self._answer(("factor", peer, base), factor)
        return factor

    def note(self, name: str, value: Any, *, news: bool = False) -> Any:
        """Record what a replay is to be compared with, or told; returns the recorded value.

        With `news` it is written only if it is another than the last of its name.
        """
        if not news or self._noted.get(name) != value:
            self._line([self._count, NOTE, name, value])
            self._noted[name] = value
        return value

    def attends(self) -> Iterator[None]:
        """A look at the mail by who waits for the others; one that found nothing new is not recorded, nor counted."""
        before = self._looked = self._count
        yield
        if self._looked is not None:
            self._count, self._looked = before, None

    def finish(self) -> None:
        """Record that the program ended, after it did; a log without it is replayed as that of a killed member."""
        self._write("finish")

    def folded(self, letter: Letter) -> None:
        """Say that a taken letter has been used."""
        self._of(letter.message.kind).folded(letter)
        self._write("folded", letter.peer, letter.number)

    def at(self, step: int) -> None:
        """Tell the carrier this member's own step."""
        self._carrier.at(step)
        self._write("at", step)

    def propose(self, key: str, value: bytes) -> None:
        """Write `value` unless the key has one already."""
        self._carrier.propose(key, value)
        self._write("propose", key, value.hex())

    def draw(self, counter: str, amount: int) -> None:
        """Ask for the next tickets."""
        self._carrier.draw(counter, amount)
        self._write("draw", counter, amount)

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """Replace this member's note."""
        self._carrier.publish(note, soon=soon)
        self._write("publish", len(note))

    def wait(self, timeout: float) -> None:
        """Wait; not an answer, and not recorded."""
        self._carrier.wait(timeout)

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """Give letters of these kinds to `service`; each is written down before anything comes of it."""
        kinds = sorted(kinds)
        self._write("serve", kinds)
        self._services += 1
        number = self._services

        def recorded(letter: Letter) -> Iterable[tuple[int, Message]]:
            self._served += 1
            m = letter.message
            self._line([self._served, SERVED, number, letter.peer, m.kind, letter.number, m.echo, letter.seconds])
            self._serving = threading.get_ident()
            try:
                yield from service(letter)
            finally:
                self._serving = -1

        self._mail.serve(kinds, recorded)

    # -- the carrier's answers ----------------------------------------------------------------------------------------

    def post(self, peer: int, message: Message) -> bool:
        """Send `message` to `peer` if the slot is free."""
        accepted = self._of(message.kind).post(peer, message)
        self._write("post", peer, message.kind, length(message), accepted)
        return accepted

    def free(self, peer: int, kind: int) -> bool:
        """Whether `post` would accept a message now."""
        free = self._of(kind).free(peer, kind)
        self._answer(("free", peer, kind), free)
        return free

    def take(self, kind: int) -> list[Letter]:
        """All letters of this kind that were not taken yet."""
        letters = self._of(kind).take(kind)
        self._answer(("take", kind), [[x.peer, x.number, x.message.echo, x.seconds] for x in letters])
        return letters

    def lost(self) -> list[Loss]:
        """The losses that became known since the last call."""
        losses = self._mail.lost()
        self._answer(("lost",), [[x.peer, x.message.kind, x.number, x.message.echo] for x in losses])
        return losses

    def members(self) -> tuple[int, ...]:
        """The ranks not declared dead."""
        members = self._carrier.members()
        self._answer(("members",), list(members))
        return members

    def live(self) -> tuple[int, ...]:
        """The members heard of lately."""
        live = self._carrier.live()
        self._answer(("live",), list(live))
        return live

    def now(self) -> float:
        """Seconds on this member's clock."""
        now = self._carrier.now()
        self._answer(("now",), now)
        return now

    def decided(self, key: str) -> bytes | None:
        """The value of `key`."""
        value = self._carrier.decided(key)
        self._answer(("decided", key), None if value is None else value.hex())
        return value

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The draws that were answered since the last call."""
        tickets = self._carrier.drawn(counter)
        self._answer(("drawn", counter), [list(pair) for pair in tickets])
        return tickets

    def notes(self) -> dict[int, bytes]:
        """The newest known notes."""
        notes = self._carrier.notes()
        self._answer(("notes",), {str(rank): note.hex() for rank, note in sorted(notes.items())})
        return notes

    def forget(self, key: str, *, gone: bool = False) -> None:
        """This member asks for this decision no more; no answer, and not recorded."""
        self._carrier.forget(key, gone=gone)
        self._guesses.forget(("decided", key))

    def _answer(self, question: tuple[Any, ...], answer: Any) -> None:
        if answer == self._guesses.of(question):
            self._count += 1
            return
        self._guesses.learn(question, answer)
        self._write(*question, answer)

    def _write(self, *words: Any) -> None:
        if self._looked is not None:
            look, self._looked = self._looked, None
            self._line([look, NOTE, "attend", True])
        self._count += 1
        self._line([self._count, *words])

    def _line(self, content: Any) -> None:
        line = json.dumps(content, separators=(",", ":"), default=repr) + "\n"
        with self._lock:
            self._sink.write(line)


def plain(sample_ids: Iterable[Any]) -> list[Any]:
    """Sample ids as a log can hold them: numbers and text as they are, anything else as its description."""
    return [i if type(i) in (int, str) else int(i) if isinstance(i, SupportsIndex) else repr(i) for i in sample_ids]


def length(message: Message) -> int:
    """Elements of a message's body; -1 without one."""
    return -1 if message.body is None else message.body.numel()
