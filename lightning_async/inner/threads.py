"""A few threads that do tasks, each as soon as all it needs is done, the one farthest from the end first.

    caller:   run(graph) ........................ waits ........................ done, or the first error
    threads:      [ task ][ task      ][ task ]   each computes on one core; what torch does inside is not split again

A graph that failed is given up: its tasks that have not begun are dropped. A task that runs a graph of its own does its
tasks one after the other, in the thread that it has: waiting there for the others might be waiting for itself.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_async.inner.tasks import Tasks

LOOK = 1.0
"""Seconds between two looks whether the threads still live; a forked process has none of its parent's."""


class Job:
    """One graph on its way."""

    def __init__(self, works: Sequence[Callable[[], None]], tasks: Tasks) -> None:
        self.works = works
        self.tasks = tasks
        self.upward = tasks.upward()
        self.left = [len(before) for before in tasks.needs]
        self.undone = len(works)
        self.error: BaseException | None = None
        self.grad = torch.is_grad_enabled()

    @property
    def over(self) -> bool:
        """Whether nothing of it will be done any more."""
        return not self.undone or self.error is not None


class Threads:
    """So many threads, which start with the first graph and end with `close`.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`inner_threads` must be an integer of at least 1, got {count!r}")
        self.count = count
        self._forget()

    def run(self, works: Sequence[Callable[[], None]], tasks: Tasks | None = None) -> None:
        """Do all works, in the order that `tasks` says; raise what the first of them that failed raised."""
        tasks = tasks or Tasks([1.0] * len(works), [()] * len(works))
        if threading.current_thread() in self._threads:
            for work in works:
                work()
        else:
            self.wait(self.start(works, tasks))

    def start(self, works: Sequence[Callable[[], None]], tasks: Tasks) -> Job:
        """Let the threads begin; `wait` for it later."""
        self._live()
        job = Job(works, tasks)
        with self._changed:
            for task in range(len(works)):
                self._push(job, task)
            self._changed.notify_all()
        return job

    def wait(self, job: Job) -> None:
        """Until all of it is done."""
        with self._changed:
            while not job.over:
                self._changed.wait(LOOK)
                if not job.over and not all(thread.is_alive() for thread in self._threads):
                    raise RuntimeError("a thread of the inner layer is gone")
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """End the threads, each after the task that it has. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Threads:
        """A copied module uses the same threads."""
        return self

    def __reduce__(self) -> tuple[type[Threads], tuple[int]]:
        return Threads, (self.count,)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._ready: list[tuple[float, int, int, Job]] = []
        self._threads: list[threading.Thread] = []
        self._closing, self._pushed = False, 0

    def _live(self) -> None:
        """Start the threads, unless they are there."""
        if self._process != os.getpid():
            self._forget()
        if self._threads:
            return
        names = [f"inner {number}" for number in range(self.count)]
        self._threads = [threading.Thread(target=self._life, name=name, daemon=True) for name in names]
        cores, begun = torch.get_num_threads(), threading.Barrier(self.count + 1)
        self._begun = begun
        for thread in self._threads:
            thread.start()
        begun.wait(60.0)
        torch.set_num_threads(cores)  # what they set for themselves is also what a later thread would begin with

    def _life(self) -> None:
        torch.set_num_threads(1)
        self._begun.wait(60.0)
        while True:
            with self._changed:
                while not self._ready and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                *_, task, job = heapq.heappop(self._ready)
            error = None if job.over else _done(job, task)
            with self._changed:
                self._finished(job, task, error)

    def _finished(self, job: Job, task: int, error: BaseException | None) -> None:
        job.error = job.error or error
        job.undone -= 1
        for other in job.tasks.then[task]:
            job.left[other] -= 1
            self._push(job, other)
        self._changed.notify_all()

    def _push(self, job: Job, task: int) -> None:
        if not job.left[task]:
            self._pushed += 1
            heapq.heappush(self._ready, (-job.upward[task], self._pushed, task, job))


def _done(job: Job, task: int) -> BaseException | None:
    """Do one task; what it raised."""
    try:
        with torch.set_grad_enabled(job.grad):
            job.works[task]()
    except BaseException as error:  # it is raised in the thread that waits
        return error
    return None
