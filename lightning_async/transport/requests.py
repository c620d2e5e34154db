"""Requests are what the training thread wants of the store: it leaves them here, and reads later what was found.

    training thread            control thread                      store
    propose, draw, decided --> answer: in order, kind by kind -->  compare_set say, add said; add draw; check + get
    decided, drawn         <-- the first value stays; each ticket goes to one member

Who proposes counts it under `said`, behind the value: while that count stands still, nothing that was looked for once
can have come, and a tick looks for no key. Who died between the two is heard at the next beat, which looks for all.

A key is looked for until it is asked for again, as far as that can be foreseen from the keys of its kind (`call/3`,
`call/4`): who asks behind each batch finds there what was said in the middle of it, however long batches are.

What is forgotten is gone here at once, and from the store at the next beat if no member needs it.

Neither thread waits for the other one: there is a lock for appending, and none is held while the store is asked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from lightning_async.transport.gloo import Keys

WATCH_SECONDS, PAUSES, FIRST_PAUSE = 10.0, 8.0, 600.0
"""A key is looked for until this long after `decided` last asked for it, and for so many pauses between two such asks;
the first one may be so long."""
FLAGS = frozenset({"abort", "stop"})
"""Asked for before every batch, however long that is, and in every wait: looked for as long as the run lasts, and no
wait hurries for them alone."""
SAID = "said"
"""The counter of what was proposed."""


class Requests:
    """One member's decisions and tickets.

    Attributes:
        changed: Notified when there is something to do for the control thread.
        asked: Whether there is.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.asked = False
        self._proposals: deque[tuple[str, bytes]] = deque()
        self._draws: deque[tuple[str, int]] = deque()
        self._drawn: dict[str, list[tuple[int, int]]] = {}
        self._watched: dict[str, float] = {}
        # of a kind of keys: when one was asked for last, and the pause before
        self._rhythm: dict[str, tuple[float, float]] = {}
        self._decided: dict[str, bytes] = {}
        self._looked: set[str] = set()  # the watched keys that were looked for before
        self._gone: deque[str] = deque()  # decisions that nobody asks for any more, and the store still has
        self._said = 0

    # the training thread

    def propose(self, key: str, value: bytes) -> None:
        """See `Board.propose`."""
        self._leave(lambda: self._proposals.append((key, value)))

    def decided(self, key: str) -> bytes | None:
        """See `Board.decided`."""
        value = self._decided.get(key)
        if value is None:
            new = key not in self._watched
            self._watched[key] = self._until(key.partition("/")[0])
            if new:
                self.hurry()
        return value

    def forget(self, key: str, *, gone: bool) -> None:
        """See `Board.forget`."""
        self._watched.pop(key, None)
        self._decided.pop(key, None)
        if gone:
            self._gone.append(key)

    def draw(self, counter: str, amount: int) -> None:
        """See `Board.draw`."""
        self._leave(lambda: self._draws.append((counter, amount)))

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """See `Board.drawn`."""
        with self.changed:
            return self._drawn.pop(counter, [])

    def hurry(self) -> None:
        """Wake the control thread up."""
        self._leave(lambda: None)

    @property
    def open(self) -> bool:
        """Whether something is not answered yet."""
        return bool(self._proposals) or self.watched

    @property
    def watched(self) -> bool:
        """Whether a decision is looked for that somebody may wait for."""
        return any(key not in FLAGS for key in list(self._watched))

    def _until(self, kind: str) -> float:
        """The last pause counts, or half of the one before it: several asks behind one batch are like one."""
        now = time.monotonic()
        last, before = self._rhythm.get(kind, (now - FIRST_PAUSE, 0.0))
        pause = max(now - last, before / 2)
        self._rhythm[kind] = now, pause
        return now + max(WATCH_SECONDS, PAUSES * pause)

    def _leave(self, note: Callable[[], None]) -> None:
        with self.changed:
            note()
            self.asked = True
            self.changed.notify_all()

    # the control thread

    def answer(self, store: Keys, *, said: int, anew: bool) -> bool:
        """Requests in the order in which they were made, kind by kind; whether anything was found.

        Args:
            store: The control thread's client.
            said: What `said` counted just now.
            anew: Whether to look for all that is watched even if that count stood still.
        """
        anew |= said != self._said
        self._said = said
        found = bool(self._proposals or self._draws)
        while self._proposals:
            self._propose(store, *self._proposals[0])
            self._proposals.popleft()
        while self._draws:
            counter, amount = self._draws.popleft()
            first = store.add(f"draw/{counter}", amount) - amount
            with self.changed:
                self._drawn.setdefault(counter, []).append((first, amount))
        for key, until in list(self._watched.items()):
            if key not in self._watched:  # forgotten meanwhile
                self._looked.discard(key)
                continue
            if key not in self._decided and (anew or key not in self._looked):
                found |= self._look_for(store, key)
            if key in self._decided or (key not in FLAGS and time.monotonic() > until):
                self._watched.pop(key, None)
                self._looked.discard(key)
        return found

    def sweep(self, store: Keys) -> None:
        """Take from the store what nobody asks for any more."""
        while self._gone:
            store.delete_key(f"say/{self._gone.popleft()}")

    def _propose(self, store: Keys, key: str, value: bytes) -> None:
        # The mark in front keeps an empty value from looking like a missing one, which would be overwritten.
        self._decided[key] = store.compare_set(f"say/{key}", b"", b"=" + value)[1:]
        if (said := store.add(SAID, 1)) == self._said + 1:  # nobody else said anything meanwhile
            self._said = said

    def _look_for(self, store: Keys, key: str) -> bool:
        self._looked.add(key)
        if there := store.check([f"say/{key}"]):
            self._decided[key] = store.get(f"say/{key}")[1:]
        return there
