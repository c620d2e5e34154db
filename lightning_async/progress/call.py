"""Members that take every step together can only stop together: a meeting that one calls holds if all can keep it.

    one wishes to stop    proposes "after step 40"
    all                   hear of it, after a step or while they wait inside of one: "yes", or "no, I am past it"
    at step 40            each waits for all answers; all yes: MEETING; a no: on, and whoever wishes it calls again

Without the answers, one that heard too late would wait in step 41 for one that waits at the meeting, both for ever. No
wait can block another one here: who waits for answers has taken its step, who answers does so from inside its waits.
"""

from __future__ import annotations

from lightning_async.data.crew import Desk
from lightning_async.progress.appointment import Appointment
from lightning_async.transport.mail import Wait

YES, NO, DEAD = b"+", b"-", b"."


class Call:
    """The calls for one meeting, as one member knows them.

    Args:
        desk: The board and who is there.
        key: What the meeting is called there.

    Attributes:
        tries: How many calls came to nothing.
    """

    def __init__(self, desk: Desk, key: str) -> None:
        self.tries = 0
        self._desk = desk
        self._key = key
        self._made: Appointment | None = None
        self._answered = self._proposed = False

    def propose(self, made: Appointment) -> None:
        """Call all to this appointment, unless there is another call."""
        if not self._proposed and self._made is None:
            self._proposed = True
            self._desk.propose(self._name, made.pack())

    def heed(self, first: int) -> None:
        """Hear of a call and answer it; `first`: the first count after which this member can still stop."""
        if self._made is None and (value := self._desk.decided(self._name)) is not None:
            self._made = Appointment.unpack(value)
        if self._made is None or self._answered:
            return
        self._answered = True
        can = self._part >= first
        self._desk.propose(f"{self._name}/{self._desk.me}", YES if can else NO)
        if not can:
            self._give_up()

    def reached(self, count: int) -> bool:
        """Whether this member has come to where it was called."""
        return self._made is not None and count >= self._part

    def holds(self) -> Wait[bool]:
        """Whether all can keep it; the same answer for all that ask."""
        answers = set()
        for rank in self._desk.members():
            name = f"{self._name}/{rank}"
            while (answer := self._desk.decided(name)) is None:
                if rank not in self._desk.members():
                    self._desk.propose(name, DEAD)
                yield f"rank {rank}'s word on whether it can stop after step {self._part}"
            answers.add(answer)
        if NO in answers:
            self._give_up()
        return NO not in answers

    @property
    def _name(self) -> str:
        return f"{self._key}/{self.tries}"

    @property
    def _part(self) -> int:
        return 0 if self._made is None else self._made.parts.get(self._desk.me, 0)

    def _give_up(self) -> None:
        self.tries += 1
        self._made, self._answered, self._proposed = None, False, False
