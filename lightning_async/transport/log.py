"""One member's log, read back: a header and numbered events; everything between two events was as guessed.

[3, "post", 1, 16, 1000, true]      question 3: what was asked, with what, and the answer
[9, "take", 16, [[1, 2, 5, 0.1]]]   questions 4 to 8 had answers that `Guesses` knows
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lightning_async.transport.record import ACTS, SCHEMA, Guesses


class Divergence(RuntimeError):  # noqa: N818
    """A replayed program did something else than the recorded one."""


class Log:
    """Reads the events of one member in order, and says at which one a program strays from it.

    Attributes:
        header: What the recording carrier wrote first.
        finished: Whether the member ended on its own.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        parsed = [json.loads(line) for line in lines if line.strip()]
        if not parsed or not isinstance(parsed[0], dict):
            raise ValueError("this is not a log of a RecordingCarrier: its first line is no header")
        self.header: dict[str, Any] = parsed[0]
        if self.header.get("schema") != SCHEMA:
            raise ValueError(f"this log has schema {self.header.get('schema')}, this version reads schema {SCHEMA}")
        self.me = int(self.header["me"])
        self.world = int(self.header["world"])
        self._events: list[list[Any]] = parsed[1:]
        self.finished = bool(self._events) and self._events[-1][1] == "finish"
        self._next = 0
        self._count = 0
        self._guesses = Guesses(self.world)

    @property
    def over(self) -> bool:
        """Whether all events were replayed."""
        return self._next >= len(self._events)

    def samples(self) -> dict[int, list[int]]:
        """The sample ids of each recorded step."""
        return {event[2]: event[3] for event in self._events if event[1] == "step"}

    def epochs(self) -> list[list[int]]:
        """The recorded steps, parted by the meetings."""
        parts: list[list[int]] = [[]]
        for event in self._events:
            if event[1] == "step":
                parts[-1].append(event[2])
            elif event[1] == "meet":
                parts.append([])
        return [part for part in parts if part]

    def end(self) -> None:
        """The program ended: nothing more may be written."""
        if not self.over:
            self.diverge(_say(self._events[self._next][1:]), "the end of the program")

    def act(self, *words: Any) -> None:
        """The program does something by itself: exactly that must be written here."""
        self._count += 1
        self._match(words)

    def answer(self, *question: Any) -> Any:
        """The recorded answer to a question: the one written here, or the one that could be guessed."""
        self._count += 1
        if question[0] != "post" and (self.over or self._events[self._next][0] > self._count):
            return self._guesses.of(question)
        answer = self._match(question)
        self._guesses.learn(question, answer)
        return answer

    def _match(self, words: tuple[Any, ...]) -> Any:
        """Compare with the next event, without its answer; its last value."""
        if self.over:
            self.diverge("nothing more (the log ends)", _say(words))
        number, *expected = self._events[self._next]
        asked = expected if expected[0] in ACTS else expected[:-1]
        if number != self._count or asked != list(words):
            early = f" as question {number}" if number != self._count else ""
            self.diverge(_say(asked) + early, _say(words) + (f" as question {self._count}" if early else ""))
        self._next += 1
        return expected[-1]

    def diverge(self, expected: str, got: str) -> None:
        """Stop here."""
        raise Divergence(f"member {self.me} strays at event {self._next}: the log has {expected}, the replay {got}")


def _say(words: Iterable[Any]) -> str:
    name, *arguments = words
    return f"{name}({', '.join(map(repr, arguments))})"
