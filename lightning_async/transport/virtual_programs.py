"""The programs of a virtual cluster: who computes, who waits, and when each is resumed.

    yield 0.1 --> compute --+                 join: the program begins
        ^                   v                 freeze: the rest of the computing is done after the thaw
        +---- resume <------+                 kill, or declared dead: the program is closed, it has no result
        ^                   ^
    yield "..." --> wait ---+

Who waits is resumed when something changed for it, and at growing intervals anyway, so that it can notice a time-out of
its own. An event that would resume a program carries the program's ticket; whatever reschedules the program changes the
ticket, so that the old event falls flat.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from lightning_async.transport.virtual_clock import VirtualClock
from lightning_async.transport.virtual_health import Health

Program = Generator[float | str, None, Any]
FIRST_POLL, LONGEST_POLL = 0.01, 1.0


class Deadlock(RuntimeError):  # noqa: N818
    """Everybody waits and nothing is under way."""


class Life:
    """A program on its way."""

    __slots__ = ("interval", "member", "program", "since", "ticket", "wake", "words")

    def __init__(self, member: int, program: Program) -> None:
        self.member = member
        self.program = program
        self.ticket = 0
        self.wake = 0.0  # when the computing ends; while frozen: what is left of it
        self.words: str | None = None  # what it waits for
        self.since = 0.0
        self.interval = FIRST_POLL


class Programs:
    """The programs of one run, and the speeds of all members.

    Args:
        clock: The cluster's clock.
        health: Who is frozen.
        n: How many members.
        limit: Seconds that a program may wait for one thing.
        grace: Seconds that waiting programs may spend on noticing time-outs when nothing else is under way.
    """

    def __init__(self, clock: VirtualClock, health: Health, n: int, *, limit: float, grace: float) -> None:
        self._clock = clock
        self._health = health
        self._limit = limit
        self._grace = grace
        self._factors = [1.0] * n
        self._lives: dict[int, Life] = {}
        self._results: dict[int, Any] = {}

    @property
    def running(self) -> bool:
        """Whether a run is on."""
        return bool(self._lives)

    def run(self, programs: Mapping[int, Program]) -> dict[int, Any]:
        """Let time pass until all programs ended; what those returned that were not killed."""
        self._results = {}
        self._lives = {member: Life(member, program) for member, program in sorted(programs.items())}
        try:
            for life in list(self._lives.values()):
                self._start(life)
            while self._lives:
                self._check_deadlock()
                self._clock.step()
        finally:
            lives, self._lives = self._lives, {}
            for life in lives.values():
                life.ticket += 1
                life.program.close()
        return self._results

    # -- what happens to a member ---------------------------------------------------------------------------------

    def stir(self, member: int) -> None:
        """Something changed for it: if it waits, it looks."""
        life = self._lives.get(member)
        if life is not None and life.words is not None and not self._health.is_frozen(member):
            life.interval = FIRST_POLL
            self._go_on(life, 0.0)

    def slow(self, member: int, factor: float) -> None:
        """Computing takes `factor` times what the program says, also what is left of it now."""
        before, self._factors[member] = self._factors[member], factor
        life = self._lives.get(member)
        if life is None or life.words is not None:
            return
        if self._health.is_frozen(member):
            life.wake *= factor / before
        elif life.wake > self._clock.time:
            self._go_on(life, (life.wake - self._clock.time) * factor / before)

    def joined(self, member: int) -> None:
        """Begin."""
        life = self._lives.get(member)
        if life is not None:
            self._start(life)

    def froze(self, member: int) -> None:
        """Keep what is left of the computing for the thaw."""
        life = self._lives.get(member)
        if life is not None:
            life.ticket += 1
            life.wake = max(0.0, life.wake - self._clock.time)

    def thawed(self, member: int) -> None:
        """Go on with the computing, or look what changed."""
        life = self._lives.get(member)
        if life is not None and not self._health.is_awaited(member):
            self._go_on(life, life.wake if life.words is None else 0.0)

    def stopped(self, member: int) -> None:
        """End the program of a member that is no more."""
        life = self._lives.pop(member, None)
        if life is not None:
            life.ticket += 1
            life.program.close()

    # -- a program's turn -------------------------------------------------------------------------------------------

    def _start(self, life: Life) -> None:
        if self._health.is_stopped(life.member):
            self.stopped(life.member)
        elif not self._health.is_frozen(life.member) and not self._health.is_awaited(life.member):
            self._go_on(life, 0.0)

    def _go_on(self, life: Life, seconds: float) -> None:
        life.ticket += 1
        life.wake = self._clock.time + seconds
        self._clock.at(life.wake, self._resume, life, life.ticket)

    def _resume(self, life: Life, ticket: int) -> None:
        if ticket != life.ticket:
            return
        life.ticket += 1
        try:
            wish = next(life.program)
        except StopIteration as end:
            self._results[life.member] = end.value
            del self._lives[life.member]
        except Exception as error:  # whatever it is: it is raised on, with the member's name
            _say_whose(error, life.member)
            raise
        else:
            if isinstance(wish, str):
                self._wait(life, wish)
            else:
                life.words = None
                self._go_on(life, wish * self._factors[life.member])

    def _wait(self, life: Life, words: str) -> None:
        now = self._clock.time
        if words != life.words:
            life.words, life.since, life.interval = words, now, FIRST_POLL
        elif now - life.since > self._limit:
            raise TimeoutError(f"member {life.member} waited {now - life.since:.1f} s for {words}")
        life.wake = now
        self._clock.poll(now + life.interval, self._look, life, life.ticket)

    def _look(self, life: Life, ticket: int) -> None:
        if ticket == life.ticket:
            life.interval = min(2 * life.interval, LONGEST_POLL)
            self._resume(life, ticket)

    def _check_deadlock(self) -> None:
        clock = self._clock
        if clock.next() is None or (clock.pending == 0 and clock.time - clock.stirred > self._grace):
            waits = "; ".join(f"member {life.member} waits for {life.words}" for life in self._lives.values())
            raise Deadlock(f"nothing is under way any more and nobody can go on: {waits}")


def _say_whose(error: Exception, member: int) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"in the program of member {member} of the virtual cluster")
