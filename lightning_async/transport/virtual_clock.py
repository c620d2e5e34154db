"""Virtual time: a heap of events; time jumps from one to the next, and ties are broken by the seed.

    at(when, action, *arguments) --> [ heap ] --> step(): time = when; action(*arguments)

An event is *idle* if it only lets somebody look again (a poll). While no other event is left, nothing can change any
more: that is how a deadlock is told from a long wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

Action = Callable[..., None]
Event = tuple[float, float, int, Action, tuple[Any, ...]]


class VirtualClock:
    """The event heap of a virtual cluster.

    Attributes:
        time: Virtual seconds since the start.
        random: The one source of chance.
        pending: Events in the heap that are not idle.
        stirred: When the last event that was not idle happened.
        trace: If a list, the (time, name of the action, its integers) of each event is appended to it.
    """

    __slots__ = ("_heap", "_sequence", "pending", "random", "stirred", "time", "trace")

    def __init__(self, seed: int) -> None:
        self.time = 0.0
        self.random = Random(seed)
        self.pending = 0
        self.stirred = 0.0
        self.trace: list[tuple[Any, ...]] | None = None
        self._heap: list[Event] = []
        self._sequence = 0

    def at(self, when: float, action: Action, *arguments: Any) -> None:
        """Call `action(*arguments)` at virtual time `when`."""
        self.pending += 1
        self._sequence += 1
        heapq.heappush(self._heap, (when, self.random.random(), self._sequence, action, arguments))

    def poll(self, when: float, action: Action, *arguments: Any) -> None:
        """The same for an idle event; its number is negative, that is how `step` knows it."""
        self._sequence += 1
        heapq.heappush(self._heap, (when, self.random.random(), -self._sequence, action, arguments))

    def next(self) -> float | None:
        """When the next event is due; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """Let the next event happen. An event of the past happens now."""
        when, _, number, action, arguments = heapq.heappop(self._heap)
        if when > self.time:
            self.time = when
        if number > 0:
            self.pending -= 1
            self.stirred = self.time
        if self.trace is not None:
            self.trace.append((self.time, action.__name__, *(a for a in arguments if isinstance(a, int))))
        action(*arguments)
