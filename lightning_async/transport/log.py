"""One member's log, read back: a header and numbered events; everything between two events was as guessed.

[3, "post", 1, 16, 1000, true]      question 3: what was asked, with what, and the answer
[9, "take", 16, [[1, 2, 5, 0.1]]]   questions 4 to 8 had answers that `Guesses` knows
[9, "note", "weights", "5f0c..."]   a note behind question 9: who replays may look at it, or not
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from lightning_async.transport.record import ACTS, ALWAYS, COUNTS, NOTE, SCHEMA, SERVED, Guesses


class Divergence(RuntimeError):  # noqa: N818
    """A replayed program did something else than the recorded one.

    Attributes:
        member: Whose program it was; None where all wait for each other.
        step: The last step that it took.
    """

    def __init__(self, sentence: str, *, member: int | None = None, step: int = 0) -> None:
        super().__init__(sentence)
        self.member, self.step = member, step


@dataclass(frozen=True, slots=True)
class Served:
    """A letter that reached a member's service, as it was written down.

    Attributes:
        service: Which of its services, from 1.
        peer: Who had sent it; `kind`, `number`, `echo` and `seconds` are the letter's.
        kind: See `peer`.
        number: See `peer`.
        echo: See `peer`.
        seconds: See `peer`.
    """

    service: int
    peer: int
    kind: int
    number: int
    echo: int
    seconds: float


class Log:
    """Reads the events of one member in order, and says at which one a program strays from it.

    Attributes:
        header: What the recording carrier wrote first.
        served: What reached its service, in this order.
        counts: By the number of what was served, what a law said of it: from whom, launched when, what part counts.
        finished: Whether the member ended on its own.
        step: The last step that was replayed.
        count: How many questions were replayed.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        parsed = _parse(lines)
        if not parsed or not isinstance(parsed[0], dict):
            raise ValueError("this is not a log of a RecordingCarrier: its first line is no header")
        self.header: dict[str, Any] = parsed[0]
        if self.header.get("schema") != SCHEMA:
            raise ValueError(f"this log has schema {self.header.get('schema')}, this version reads schema {SCHEMA}")
        self.me = int(self.header["me"])
        self.world = int(self.header["world"])
        self._lines: list[list[Any]] = [line for line in parsed[1:] if line[1] not in (SERVED, COUNTS)]
        self.served = [Served(*line[2:]) for line in parsed[1:] if line[1] == SERVED]
        self.counts: dict[int, list[list[Any]]] = {}
        for number, _, *said in (line for line in parsed[1:] if line[1] == COUNTS):
            self.counts.setdefault(number, []).append(said)
        self._events: list[list[Any]] = []
        self._epochs: list[int] = []  # how many had begun by each event
        begun = 0
        for line in self._lines:
            begun += line[1:3] == [NOTE, "epoch"]
            if line[1] != NOTE:
                self._events.append(line)
                self._epochs.append(begun)
        self._notes = _by_place(line for line in self._lines if line[1] == NOTE)
        self.finished = bool(self._events) and self._events[-1][1] == "finish"
        self.step = self.count = 0
        self._next = self._begun = 0
        self._guesses = Guesses(self.speakers)

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each member, the first of which speaks for it."""
        alone = [[rank] for rank in range(self.world)]
        return tuple(tuple(ranks) for ranks in self.header.get("ranks_of_members", alone))

    @property
    def speakers(self) -> tuple[int, ...]:
        """Who speaks for each member."""
        return tuple(ranks[0] for ranks in self.members)

    @property
    def ranks(self) -> int:
        """How many ranks the run began with, each with a log."""
        return sum(map(len, self.members))

    @property
    def name(self) -> str:
        """Whose log this is, for people."""
        return f"{self.kind} {self.me}"

    @property
    def kind(self) -> str:
        """What has a log, for people."""
        return "rank" if self.ranks > self.world else "member"

    @property
    def cut(self) -> bool:
        """Whether all of it was replayed, and it does not end with the program."""
        return self.over and not self.finished

    @property
    def over(self) -> bool:
        """Whether all events were replayed."""
        return self._next >= len(self._events)

    def epochs(self) -> list[list[list[Any]]]:
        """The samples of each batch that was fetched, by epochs; one epoch where none was noted."""
        parts: list[list[list[Any]]] = []
        for line in self._lines:
            if line[1:3] == [NOTE, "epoch"]:
                parts.append([])
            elif line[1:3] == [NOTE, "fetched"]:
                parts = parts or [[]]
                parts[-1].append(line[3])
        return parts

    def last_batches(self) -> list[int]:
        """After how many batches an epoch ended, of those that were seen to end."""
        counts, ends = 0, []
        for line in self._lines:
            counts += line[1] == "batch"
            if line[1:3] == [NOTE, "epoch"] or line[1] == "finish":
                ends.append(counts)
        return ends

    def batches(self) -> int:
        """How many batches were trained on."""
        return sum(event[1] == "batch" for event in self._events)

    def lines(self) -> list[list[Any]]:
        """All events and notes, in order, each behind its number."""
        return self._lines

    def first(self, name: str) -> Any:
        """The first note of this name; None without one."""
        return next((line[3] for line in self._lines if line[1:3] == [NOTE, name]), None)

    def notes_of(self, name: str) -> list[Any]:
        """All notes of this name, in order."""
        return [line[3] for line in self._lines if line[1:3] == [NOTE, name]]

    def number_of_epochs(self) -> int:
        """How many epochs were begun."""
        return len({line[3]["epoch"] for line in self._lines if line[1:3] == [NOTE, "epoch"]})

    def meets(self) -> bool:
        """Whether the members meet before the next batch, in this epoch, which may have none; on its way to a meeting a
        member may have words to say."""
        ahead = ((self._events[i][1], self._epochs[i]) for i in range(self._next, len(self._events)))
        name, epoch = next((one for one in ahead if one[0] in ("meet", "batch", "finish")), ("finish", 0))
        return name == "meet" and epoch <= self._begun

    def note(self, name: str) -> Any:
        """What was noted here under this name, each note once and in their order; None: nothing, or nothing more."""
        self._begun += name == "epoch"
        noted = self._notes.get((self.count, name))
        return noted.popleft() if noted else None

    def end(self) -> None:
        """The program ended: nothing more may be written."""
        if not self.over:
            self.diverge(_say(self._events[self._next][1:]), "the end of the program")

    def act(self, *words: Any) -> None:
        """The program does something by itself: exactly that must be written here."""
        self.count += 1
        self._match(words)
        if words[0] == "at":
            self.step = words[1]

    def answer(self, *question: Any) -> Any:
        """The recorded answer to a question: the one written here, or the one that could be guessed."""
        self.count += 1
        if question[0] not in ALWAYS and (self.over or self._events[self._next][0] > self.count):
            return self._guesses.of(question)
        answer = self._match(question)
        self._guesses.learn(question, answer)
        return answer

    def forget(self, *question: Any) -> None:
        """The program asks this no more."""
        self._guesses.forget(question)

    def _match(self, words: tuple[Any, ...]) -> Any:
        """Compare with the next event, without its answer; its last value."""
        if self.over:
            self.diverge("nothing more (the log ends)", _say(words))
        number, *expected = self._events[self._next]
        asked = expected if expected[0] in ACTS else expected[:-1]
        if number != self.count or asked != list(words):
            early = f" as question {number}" if number != self.count else ""
            self.diverge(_say(asked) + early, _say(words) + (f" as question {self.count}" if early else ""))
        self._next += 1
        return expected[-1]

    def diverge(self, expected: str, got: str) -> NoReturn:
        """Stop here."""
        sentence = f"{self.name} strays at event {self._next}: the log has {expected}, the replay {got}"
        raise Divergence(sentence, member=self.me, step=self.step)


def _by_place(notes: Iterable[list[Any]]) -> dict[tuple[int, str], deque[Any]]:
    """The notes by the question before them and their name, in their order.

    Of the random generators a note has the states of those that had moved since the one before. Here each gets the
    states of all: a replay may pass a note over, as it need not fetch when the run fetched.
    """
    found: dict[tuple[int, str], deque[Any]] = {}
    states: dict[str, str] = {}
    for count, _, name, noted in notes:
        if isinstance(noted, dict) and "chance" in noted:
            states = states | noted["chance"]
            noted["chance"] = states
        found.setdefault((count, name), deque()).append(noted)
    return found


def _parse(lines: Iterable[str]) -> list[Any]:
    """The lines' contents. The last one of a killed member may be cut in the middle."""
    written = [line for line in lines if line.strip()]
    parsed = []
    for number, line in enumerate(written, start=1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(written) or number == 1:
                raise ValueError(f"this is not a log of a RecordingCarrier: its line {number} is no JSON") from None
    return parsed


def _say(words: Iterable[Any]) -> str:
    name, *arguments = words
    return f"{name}({', '.join(map(repr, arguments))})"
