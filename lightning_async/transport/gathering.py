"""Short mail of one step leaves together: each wake-up of a link's thread takes the interpreter from the training.

    with gathered():           post, folded, post, folded  --->  |  one notice to each link that has something to send
    with gathered("later"):    post, folded, post, folded        |  ...  send(): as the next batch begins, whose compute
                                                                    leaves the interpreter to the links' threads
    with gathered("at once"):  folded  --->  in the header of the next post, which its thread writes by itself
    with answering():          post, folded  --->  a service's thread: one header, which it writes by itself, behind the
                               block; long answers too
    clerk                      short mail to several links is written by one thread, which has nothing else to do: the
                               service's, if there is one. One wake-up in place of one for each
    long mail, and mail of other threads  ---->  at once: its time on the wire counts, or somebody waits for it

Before the training thread waits, what it has gathered is sent. What it forgets a link tells by itself, with its next
sign of life.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

When = Literal["at once", "together", "later"]
"""At once: each post. Together: at the end of the block. Later: with the next `send`; nobody waits for it."""
SHORT: Final = 1 << 18
"""Bytes that are on the wire sooner than a step's other mail is written."""


_Told = tuple[threading.Condition, Callable[[], None] | None]


def nobody(writes: list[Callable[[], None]]) -> bool:
    """Who writes where nobody has time."""
    return False


class Gathering:
    """Which links are to be told of mail that is kept back.

    Attributes:
        clerk: Asked to call these, each of which writes what one link has to send; False: it has no time.
    """

    def __init__(self) -> None:
        self._owner: int | None = None
        self._when: When = "together"
        self.clerk: Callable[[list[Callable[[], None]]], bool] = nobody
        self._stirred: dict[int, _Told] = {}
        self._later: dict[int, _Told] = {}
        self._answering: dict[int, dict[int, Callable[[], None]]] = {}

    @property
    def hurries(self) -> bool:
        """Whether this thread writes what it posts by itself: somebody may have nothing else to do than to wait."""
        return self._when == "at once" and self._owner == threading.get_ident()

    def stir(self, changed: threading.Condition, nbytes: int = 0, write: Callable[[], None] | None = None) -> None:
        """There is something to send, of so many bytes; called with the condition held.

        With `write` another thread than the link's can send it.
        """
        me = threading.get_ident()
        if nbytes <= SHORT and self._owner == me:
            self._stirred[id(changed)] = changed, write
        elif write is not None and me in self._answering:
            self._answering[me][id(changed)] = write
        else:
            changed.notify_all()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What this thread posts or folds inside leaves at the end, in one header a link that it writes itself."""
        me = threading.get_ident()
        stirred = self._answering[me] = {}
        try:
            yield
        finally:
            del self._answering[me]
            for write in stirred.values():
                write()

    def sent(self, changed: threading.Condition) -> None:
        """All that was to be sent on this link has left; called with the condition held."""
        self._stirred.pop(id(changed), None)
        self._later.pop(id(changed), None)

    def send(self) -> None:
        """Tell the links now; for the thread that gathers."""
        if self._owner in (None, threading.get_ident()):
            self._stirred |= self._later
            self._tell()

    def _tell(self) -> None:
        stirred, self._stirred = self._stirred, {}
        links = list(stirred.values())  # another thread may be taking one out that has left (`sent`)
        for changed, _ in links:
            self._later.pop(id(changed), None)
        writes = [write for _, write in links if write is not None]
        written = len(writes) > 1 and self.clerk(writes)
        for changed, write in links:
            if not written or write is None:
                with changed:
                    changed.notify_all()

    @contextmanager
    def gathered(self, when: When = "together") -> Iterator[None]:
        """Short mail that this thread posts or folds inside is sent then, or when it waits.

        "at once": what it posts; what it folds, with that, or when it waits, or behind the block.
        """
        before, self._owner, self._when = (self._owner, self._when), threading.get_ident(), when
        try:
            yield
        finally:
            if when == "together":
                self._tell()
            else:
                self._later |= self._stirred
                self._stirred = {}
            self._owner, self._when = before
