"""Whoever has a message to send gets the interpreter soon: in a pipeline a neighbour may have nothing else to do.

    training thread   posts a gradient, goes on with its step, its hooks, its loop     (pure Python, for milliseconds)
    link's thread     wakes up, and may send when it gets the interpreter              asks again after `INTERVAL`

Python's own interval, 5 ms, is a quarter of a stage of 20 ms: messages left when the training thread next waited.
"""

from __future__ import annotations

import sys

INTERVAL = 0.0002
"""Seconds; a switch costs a few microseconds."""


class Promptness:
    """For the time of a fit."""

    def __init__(self) -> None:
        self._before: float | None = None

    def begin(self) -> None:
        """Threads ask for the interpreter sooner. Idempotent."""
        if self._before is None and sys.getswitchinterval() > INTERVAL:
            self._before = sys.getswitchinterval()
            sys.setswitchinterval(INTERVAL)

    def put_back(self) -> None:
        """As it was. Idempotent."""
        if self._before is not None:
            sys.setswitchinterval(self._before)
            self._before = None
