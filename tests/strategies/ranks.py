"""Ranks as forked processes, as torchrun would start them: each runs one function, its result comes back, none stays.

Forking takes milliseconds where importing torch takes seconds. It is safe as long as torch computes on one thread
(conftest sees to that).
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.store import Held, Store

STACKS = signal.SIGUSR2
FORK = multiprocessing.get_context("fork")


@dataclass
class Result:
    """What a rank's function returned, or the exception that ended it."""

    value: Any = None
    kind: str | None = None
    error: str = ""
    trace: str = ""


class Forked:
    """`n` processes that run `function(*arguments)`, each with the environment of its rank.

    `store`: whether the launcher hosts the store, or one that somebody else hosts.
    """

    def __init__(self, n: int, function: Callable[..., Any], *arguments: Any, store: bool | Store = False) -> None:
        gc.collect()  # a store server that a child would collect hangs the child: its threads were not forked
        self._own_place = not isinstance(store, Store)
        self._meeting_place = store if isinstance(store, Store) else Store() if store else Held()
        self._pipes, self.processes = [], []
        for rank in range(n):
            mine, theirs = FORK.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n),
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._meeting_place.port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": str(bool(store)),
            }
            process = FORK.Process(target=_life, args=(theirs, environment, function, arguments))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._own_place:
            self._meeting_place.close()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def result(self, rank: int, timeout: float = 60.0) -> Result:
        """One rank's result, whatever the others do."""
        pipe = self._pipes[rank]
        return pipe.recv() if pipe.poll(timeout) else self._silent(rank, timeout)

    def results(self, timeout: float = 60.0) -> list[Result]:
        """Each rank's result; a rank that said nothing in time has kind "silent"."""
        end = time.monotonic() + timeout
        results = []
        for rank, (pipe, process) in enumerate(zip(self._pipes, self.processes, strict=True)):
            said = pipe.poll(max(0.0, end - time.monotonic()))
            try:
                results.append(pipe.recv() if said else self._silent(rank, timeout))
            except EOFError:
                process.join()
                results.append(Result(kind="gone", error=f"exit code {process.exitcode}"))
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        return results

    def _silent(self, rank: int, timeout: float) -> Result:
        """A hang shows where it is: all threads of the rank go to standard error."""
        self.signal(rank, STACKS)
        self.processes[rank].join(1.0)
        return Result(kind="silent", error=f"nothing within {timeout} s")

    def values(self, timeout: float = 60.0) -> list[Any]:
        """What all ranks returned."""
        results = self.results(timeout)
        failed = [f"rank {r}: {x.kind}: {x.error}\n{x.trace}" for r, x in enumerate(results) if x.kind is not None]
        assert not failed, "\n".join(failed)
        return [result.value for result in results]


def run(n: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """What `function(*arguments)` returns on each of `n` ranks."""
    with Forked(n, function, *arguments) as forked:
        return forked.values(timeout)


def _life(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    gc.unfreeze()  # conftest's: a strategy sets aside what there is itself
    faulthandler.register(STACKS, file=2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    os.environ.update(environment)
    try:
        result = Result(function(*arguments))
    except BaseException as exception:
        result = Result(None, type(exception).__name__, str(exception), traceback.format_exc())
    pipe.send(result)
    pipe.close()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)
