"""Where files are written later, a main file waits in its writer's queue until every rank says that its own is there.

    rank 0's writer    index   own   [ has everybody said so? ]   main file   what it replaces goes
    rank 1's writer    own   says so on the board

Training goes on meanwhile, and the first rank's log says for whom it waits, if that takes longer than a disk should.
Who died has no file to wait for. Where a rank could not write, or said nothing for as long as a meeting may take, no
main file is replaced and nothing is removed any more: what is there stays, and all ranks stop with that error at their
next save, or at the end.

What waits to be written is in memory, all of it. So no more than four saves wait: the next one waits for the first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from lightning_async.strategies import compat
from lightning_async.strategies.waiting import GLANCE
from lightning_async.transport.mail import Carrier, Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

log = logging.getLogger(__name__)
WRITTEN, DIED = b"+", b"-"
LOOK = 0.05
"""Seconds between two looks at what the others said."""
TELL = 30.0
"""Seconds of waiting for another rank's file behind which the log says so."""
LEAVE_FAILED = 2.0
"""Seconds that a run which failed, or did not come to its end within its grace, waits for what is still to be written,
and then for the writer to end."""
MOST = 4
"""Saves that may wait in memory: the files of two callbacks at two meetings."""
FULL = (
    "%d checkpoints wait in memory to be written: look at the disks. This save waits, and training with it, until one "
    "of them is there, for %.0f s at most"
)
LATE = (
    "rank %d has not written its part of a checkpoint for %.0f s: look at its disk. Training goes on; what is saved "
    "meanwhile waits in memory, and the checkpoint before stays until it is there, for %.0f s at most"
)
SLOW = "rank %d waits for %s to be written, for %.0f s by now and %.0f s at most: look at its disk"


class LateFiles:
    """What one rank has still to write, seen from its training thread and from its writer's.

    Args:
        strategy: Whose.
        io: What writes, asked each time; None: the strategy's.
    """

    def __init__(self, strategy: AsyncStrategy, io: Callable[[], Any] | None = None) -> None:
        self._strategy = strategy
        self._given = io
        self.begin()

    def begin(self) -> None:
        """A run begins, with nothing in the queue."""
        self._leaving = False  # not an Event: a strategy is pickled before it runs
        self._stuck: Exception | None = None
        self._shut = False
        self._queued: list[Event] = []

    def _io(self) -> Any:
        return self._strategy.checkpoint_io if self._given is None else self._given()

    @property
    def idle(self) -> bool:
        """Whether all that was asked for is written, or given up."""
        self._queued = [written for written in self._queued if not written.is_set()]
        return not self._queued

    def trouble(self) -> BaseException | None:
        """Why something that this rank was to write is not there."""
        return self._stuck or compat.late_error(self._io())

    def room(self) -> Wait[None]:
        """Wait until another save may wait in memory, or it is known that none will be written."""
        if self._is_full():
            log.warning(FULL, MOST, self._strategy.office.limit)
        while self._is_full() and self.trouble() is None:
            yield f"one of the {MOST} checkpoints that wait in memory to be written"

    def queued(self) -> None:
        """A save has asked for all that it writes on this rank."""
        if compat.writes_later(self._io()):
            self._queued.append(self._mark())

    def _is_full(self) -> bool:
        return not self.idle and len(self._queued) >= MOST

    def tell(self, save: str) -> None:
        """Let the others know when this rank's part of `save` is there, or why not. Called right behind its write."""
        if not compat.writes_later(self._io()):
            return
        carrier = self._strategy.office.carrier

        def say() -> None:
            error = self.trouble()
            word = WRITTEN if error is None else f"{type(error).__name__}: {error}".encode()[:2000]
            carrier.propose(_key(save, carrier.me), word)

        compat.behind_writes(self._io(), say)

    def write_main(self, save: str, ranks: Sequence[int], write: Callable[[], object]) -> None:
        """Write the file that names `save`: now, or once all that it names is there."""
        io = self._io()
        if compat.writes_later(io):
            compat.write_when(io, partial(self._all_there, self._strategy.office.carrier, save, ranks), write)
        else:
            write()

    def behind(self, remove: Callable[[], object]) -> None:
        """Remove something when all that was to be written before is there; never, if that went wrong."""
        compat.behind_writes(self._io(), lambda: self._failed or remove())

    def say(self, key: str) -> None:
        """Let all know, behind what was to be written before, that it is there; else nothing is removed for it."""
        carrier, limit = self._strategy.office.carrier, self._strategy.office.limit

        def said() -> None:
            if self._failed:
                return
            carrier.propose(key, WRITTEN)
            end = time.monotonic() + limit
            while (word := carrier.decided(key)) is None and not self._leaving and time.monotonic() < end:
                time.sleep(LOOK)  # as above
            self._shut |= word != WRITTEN

        compat.behind_writes(self._io(), said)

    def finish(self) -> Wait[BaseException | None]:
        """Wait until this rank has written all that it was to write; why it could not."""
        written, slow = self._mark(), self._slow()
        while not written.is_set():
            next(slow)
            yield "this rank's checkpoints to be written"
        return self.trouble()

    def leave(self) -> None:
        """The run is over, the board is still there: let what is under way be written, but not for ever."""
        office = self._strategy.office
        if not office.is_open or not compat.writes_later(self._io()):
            return
        written, slow, end = self._mark(), self._slow(), time.monotonic() + office.limit
        while time.monotonic() < end and not written.wait(GLANCE):
            if office.fails:
                written.wait(LEAVE_FAILED)
                break
            next(slow)
        self._leaving = True

    def patience(self) -> float:
        """Seconds that who ends waits for the writer: behind `leave` there is nothing left, or it hangs."""
        office = self._strategy.office
        return office.limit if office.is_open and not office.fails and not self._leaving else LEAVE_FAILED

    def _slow(self) -> Iterator[None]:
        """Asked again and again while this rank waits for its disk: the log says so now and then."""
        began, tell = time.monotonic(), TELL
        while True:
            if (waited := time.monotonic() - began) > tell:
                office, path = self._strategy.office, compat.being_written(self._io()) or "a checkpoint"
                log.warning(SLOW, office.carrier.me, path, waited, office.limit)
                tell *= 4
            yield

    # -- in the writer's thread ---------------------------------------------------------------------------------------

    @property
    def _failed(self) -> bool:
        return self._shut or self.trouble() is not None

    def _all_there(self, board: Carrier, save: str, ranks: Sequence[int]) -> bool:
        """Wait until all have told; whether the main file may be written."""
        limit = self._strategy.office.limit
        began, tell = time.monotonic(), TELL
        ranks = [rank for rank in ranks if rank != board.me]  # this rank's part was before this in the queue
        words = [self._word(board, save, rank) for rank in ranks]
        while None in words and not self._failed:
            silent, waited = ranks[words.index(None)], time.monotonic() - began
            if waited > limit:
                self._stuck = TimeoutError(f"rank {silent} did not say that its part of the checkpoint is written")
            elif waited > tell:
                log.warning(LATE, silent, tell, limit)
                tell *= 4
            self._shut |= self._leaving
            time.sleep(LOOK)  # between looks, in the writer's thread, up to the end above
            words = [self._word(board, save, rank) for rank in ranks]
        self._shut |= any(word not in (WRITTEN, DIED) for word in words)
        if self._failed:
            log.warning("a checkpoint is left out, and the one before it stays: %s", _why(ranks, words))
        return not self._failed

    def _word(self, board: Carrier, save: str, rank: int) -> bytes | None:
        """What a rank said of its part; the board decides whether it died before it could."""
        word = board.decided(_key(save, rank))
        if word is None and rank not in board.members():
            board.propose(_key(save, rank), DIED)
        return word

    def _mark(self) -> Event:
        """Set when the queue is written as far as it is long now."""
        written = Event()
        compat.behind_writes(self._io(), written.set)
        return written


def _key(save: str, rank: int) -> str:
    return f"written/{save}/{rank}"


def _why(ranks: Sequence[int], words: Sequence[bytes | None]) -> str:
    failed = {rank: word for rank, word in zip(ranks, words, strict=True) if word not in (WRITTEN, DIED)}
    if not failed:
        return "this rank could not write its own part"
    rank, word = next(iter(failed.items()))
    said = "has not said that its part is written" if word is None else f"said {word.decode(errors='replace')}"
    return f"rank {rank} {said}"
