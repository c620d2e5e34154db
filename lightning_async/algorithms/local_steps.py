"""How many steps a member takes between two pushes: fixed, none but at meetings, or so that all push equally often.

    "speed"    steps = pace * (a step of the fastest) / (a step of mine), at least 1

With equal periods nobody is late by more than a round, whatever the speeds: a slow member pushes smaller corrections,
not older ones, and one sample counts the same everywhere.
"""

from __future__ import annotations

from typing import Literal

from lightning_async.transport.mail import Mail

LocalSteps = int | Literal["epoch", "speed"]
MICRO = 1_000_000


class Period:
    """One member's steps between two pushes.

    Attributes:
        micros: Microseconds of an own step, smoothed; 0: not known.
        fastest: The same of the fastest member.
    """

    def __init__(self, local_steps: LocalSteps, pace: int) -> None:
        self._local_steps, self._pace = local_steps, pace
        self.micros = self.fastest = 0
        self._began: tuple[float, int] | None = None

    @property
    def steps(self) -> int | None:
        """So many; None: at meetings only."""
        if self._local_steps == "epoch":
            return None
        if self._local_steps != "speed":
            return self._local_steps
        if not self.micros or not self.fastest:
            return 1  # the first answer tells
        return max(1, min(self._pace, round(self._pace * self.fastest / self.micros)))

    def stepped(self, mail: Mail, step: int) -> None:
        """Measure, over some steps; the clock is read for this alone."""
        if self._local_steps != "speed":
            return
        if self._began is None:
            self._began = mail.now(), step
        elif step - self._began[1] >= (self.steps or 1):
            now = mail.now()
            lately = (now - self._began[0]) / (step - self._began[1]) * MICRO
            self.micros = max(1, round(0.5 * (self.micros + lately) if self.micros else lately))
            self._began = now, step

    def pause(self) -> None:
        """A meeting is no step."""
        self._began = None


def check_local_steps(local_steps: object, pace: object) -> None:
    """Raise `ValueError` for what is no number of steps."""
    counts = isinstance(local_steps, int) and not isinstance(local_steps, bool) and local_steps >= 1
    if not counts and local_steps not in ("epoch", "speed"):
        raise ValueError(f"`local_steps` must be an integer of at least 1, 'speed' or 'epoch', got {local_steps!r}")
    if not isinstance(pace, int) or isinstance(pace, bool) or pace < 1:
        raise ValueError(f"`pace` must be an integer of at least 1, got {pace!r}")
