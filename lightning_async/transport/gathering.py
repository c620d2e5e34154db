"""Short mail of one step leaves together: each wake-up of a link's thread takes the interpreter from the training.

    with gathered():  post, folded, post, folded  --->  |  one notice to each link that has something to send
    long mail, and mail of other threads          --->  at once: its time on the wire counts, or somebody waits for it

Before the training thread waits, what it has gathered is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SHORT: Final = 1 << 18
"""Bytes that are on the wire sooner than a step's other mail is written."""


class Gathering:
    """Which links are to be told at the end of a block."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._stirred: dict[int, threading.Condition] = {}

    def stir(self, changed: threading.Condition, nbytes: int = 0) -> None:
        """There is something to send, of so many bytes; called with the condition held."""
        if nbytes <= SHORT and self._owner == threading.get_ident():
            self._stirred[id(changed)] = changed
        else:
            changed.notify_all()

    def send(self) -> None:
        """Tell the links now; for the thread that gathers."""
        if not self._stirred or self._owner != threading.get_ident():
            return
        stirred, self._stirred = self._stirred, {}
        for changed in stirred.values():
            with changed:
                changed.notify_all()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Short mail that this thread posts or folds inside is sent at the end, or when it waits."""
        before, self._owner = self._owner, threading.get_ident()
        try:
            yield
        finally:
            self.send()
            self._owner = before
