"""Tasks and what must come before them, put on threads: whoever is farthest from the end goes first.

    tasks     0 --> 1 --> 3        upward[k] = own cost + the dearest way from there to the end
              0 --> 2 --> 3        ready tasks are taken by it, highest first (critical path, HEFT)

However the costs lie, a list schedule on p threads takes at most work / p + (1 - 1/p) times the critical path (Graham
1969): less than twice the shortest there is. Pure arithmetic; `threads.py` does the same with real threads.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Slot(NamedTuple):
    """Where and when a task runs."""

    thread: int
    start: float
    end: float


class Tasks:
    """A graph of tasks, numbered so that each comes after those it needs.

    Args:
        costs: What each task takes.
        needs: The tasks that must be done before each; all have smaller numbers.
    """

    def __init__(self, costs: Sequence[float], needs: Sequence[Sequence[int]]) -> None:
        for task, before in enumerate(needs):
            if any(not 0 <= other < task for other in before):
                raise ValueError(f"a task needs tasks of smaller numbers only, and {task} needs {list(before)}")
        self.costs = list(costs)
        self.needs = [sorted(set(before)) for before in needs]
        self.then: list[list[int]] = [[] for _ in self.costs]
        for task, before in enumerate(self.needs):
            for other in before:
                self.then[other].append(task)

    def __len__(self) -> int:
        return len(self.costs)

    def upward(self) -> list[float]:
        """The dearest way from each task to the end, itself included."""
        found = [0.0] * len(self)
        for task in reversed(range(len(self))):
            found[task] = self.costs[task] + max((found[other] for other in self.then[task]), default=0.0)
        return found

    def critical_path(self) -> float:
        """What no number of threads can be faster than."""
        return max(self.upward(), default=0.0)

    def bound(self, threads: int) -> float:
        """What no list schedule is slower than."""
        return sum(self.costs) / threads + (1 - 1 / threads) * self.critical_path()

    def schedule(self, threads: int) -> list[Slot]:
        """A list schedule: whenever a thread is free, the ready task that is farthest from the end."""
        upward, left = self.upward(), [len(before) for before in self.needs]
        ready = [(-upward[task], task) for task in range(len(self)) if not left[task]]
        heapq.heapify(ready)
        free, busy, now = list(range(threads)), list[tuple[float, int, int]](), 0.0
        slots = [Slot(0, 0.0, 0.0)] * len(self)
        while ready or busy:
            while ready and free:
                _, task = heapq.heappop(ready)
                thread = heapq.heappop(free)
                slots[task] = Slot(thread, now, now + self.costs[task])
                heapq.heappush(busy, (slots[task].end, task, thread))
            now, task, thread = heapq.heappop(busy)
            heapq.heappush(free, thread)
            for other in self.then[task]:
                left[other] -= 1
                if not left[other]:
                    heapq.heappush(ready, (-upward[other], other))
        return slots
