"""What writes files later is one thread that keeps nobody: who ends waits for it with a bound, and is told for what.

    submit     ... job  job  job --->  one thread, a daemon
    shutdown   waits until all is done, `patience` at most; then says which file hangs, and what waited is left out

Lightning's own is a thread that Python waits for at its very end: a disk that hangs would keep the process, its node
and all ranks that wait for this one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
LOOK = 0.2
"""Seconds between two looks at how long is to be waited."""
TELL = 30.0
"""Seconds of waiting for a file behind which the log says so."""
WAITS = "%s is still being written after %.0f s: look at its disk. This run ends when it is there, in %.0f s at most"
GIVEN_UP = (
    "%s was not written within %.0f s: look at its disk. This run ends without it, and without what was to be written "
    "or removed behind it (%d more); the checkpoint before stays"
)


class _Job(NamedTuple):
    future: Future[Any]
    do: Callable[[], Any]
    path: str


class Writer:
    """An executor for `AsyncCheckpointIO`.

    Args:
        patience: For how many seconds who ends waits for what is still to be written; asked all the while.

    Attributes:
        path: The file that is being written, as far as that is known; "" between two.
    """

    def __init__(self, patience: Callable[[], float]) -> None:
        self.path = ""
        self._patience = patience
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        self._ended = False

    def submit(self, job: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Have this done behind all that was submitted before."""
        future: Future[T] = Future()
        whole = partial(job, *args, **kwargs)
        with self._changed:
            if self._ended:
                raise RuntimeError("nothing is written any more behind the end of a run")
            self._jobs.append(_Job(future, whole, path_in(whole)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return future

    def shutdown(self, wait: bool = True) -> None:
        """Take nothing more; wait for what was taken, with a bound."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if wait and self._thread is not None and not self._ends(self._thread):
            with self._changed:
                left, self._jobs = self._jobs, deque()
            for job in left:
                job.future.cancel()
            log.warning(GIVEN_UP, self.path or "a file", self._patience(), len(left))

    def _ends(self, thread: threading.Thread) -> bool:
        began, tell = time.monotonic(), TELL
        while thread.is_alive() and (waited := time.monotonic() - began) < (limit := self._patience()):
            if waited > tell:
                log.warning(WAITS, self.path or "a file", waited, limit - waited)
                tell *= 4
            thread.join(min(LOOK, limit - waited))
        return not thread.is_alive()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if job.future.set_running_or_notify_cancel():
                self.path = job.path
                try:
                    result = job.do()
                except BaseException as error:  # whoever asks for the result gets it
                    job.future.set_exception(error)
                else:
                    job.future.set_result(result)
                self.path = ""

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._jobs or self._ended
            )  # nobody waits for a daemon that has nothing to do
            return self._jobs.popleft() if self._jobs else None


def path_in(job: Callable[..., object]) -> str:
    """The path that a call is given, by whichever name; "" if there is none."""
    if not isinstance(job, partial):
        return ""
    return next(filter(None, map(_path, _given(job))), "")


def _given(job: partial[Any]) -> Iterable[Any]:
    return (*job.args, *job.keywords.values(), job.func)


def _path(given: Any) -> str:
    if isinstance(given, (str, os.PathLike)):
        return os.fspath(given)
    return path_in(given) if callable(given) else ""
