"""Ranks as separate processes, started one by one as torchrun does, that can be frozen and killed one by one.

    launcher --- store (optional) ---+----------+----------+
        |                            |          |          |
        +-- start, freeze, kill --> rank 0     rank 1     rank 2
        <------- words, result -----  |          |          |

Lightning's own launcher kills all siblings of a process that dies; here a death stays one. With `store=True` no
rank hosts the store: the launcher does, as torchrun's agent does, or a host beside those of the ranks. So killing
rank 0 does not take everybody's store along.
A rank whose launcher is gone ends itself, and leaving the `with` block ends all of them: nothing outlives it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from benchmarks.rank import FOLDER
from benchmarks.store import Held, Placed, Store

ROOT = Path(__file__).resolve().parents[1]
MIDWAY = "midway"
ENDED = {signal.SIGSTOP: "TZ", signal.SIGKILL: "Z"}
TAIL = 2000  # characters of a failed rank's output that go into the error


class Spawn(Protocol):
    """Starts the process of one rank in a session of its own; `Hosts.spawn` does it on another host."""

    def __call__(
        self, rank: int, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start it, with an open pipe as its standard input."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: what its function returned, or why it did not."""

    rank: int
    value: Any = None
    error: str = ""


class Ranks:
    """Runs `function(**arguments)` on `n` ranks. It must be importable, and return what JSON can hold.

    Args:
        function: A function at the top level of a module.
        n: How many ranks.
        arguments: Keyword arguments, the same for all ranks, of what JSON can hold.
        env: More environment variables.
        store: Host the store apart from the ranks instead of on rank 0: here, or with `spawn` where that puts rank `n`.
        address: Where the store is, as the ranks see it.
        spawn: How to start a rank; None: here.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        n: int,
        *,
        arguments: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        store: bool = False,
        address: str = "127.0.0.1",
        spawn: Spawn | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}")
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(f"{function.__qualname__} cannot be imported by another process: put it into a module")
        self._what = [f"{function.__module__}:{function.__qualname__}", json.dumps(dict(arguments or {}))]
        self._n, self._extra, self._host_store, self._address = n, dict(env or {}), store, address
        self._spawn: Spawn = spawn or _spawn_here
        self._elsewhere = spawn is not None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._meeting_place: Store | Placed | Held | None = None

    def __enter__(self) -> Ranks:
        self._temporary = tempfile.TemporaryDirectory(prefix="ranks-")
        self._folder = Path(self._temporary.name)
        try:
            self._meeting_place = self._meet()
            env = self._environment(self._meeting_place.port)
            for rank in range(self._n):
                self._start(rank, env)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs and remove what was written."""
        for process in self._processes:
            _signal_group(process, signal.SIGKILL)
            process.wait()
            if process.stdin:
                process.stdin.close()
        self._processes = []
        if self._meeting_place is not None:
            self._meeting_place.close()
            self._meeting_place = None
        self._temporary.cleanup()

    # -- what happens to one rank ----------------------------------------------------------------------------------

    def stop(self, rank: int) -> None:
        """Freeze a rank with all its threads and children."""
        _signal_group(self._processes[rank], signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """Let a frozen rank go on."""
        _signal_group(self._processes[rank], signal.SIGCONT)

    def kill(self, rank: int) -> None:
        """End a rank without a word."""
        _signal_group(self._processes[rank], signal.SIGKILL)

    def strike(self, rank: int, number: signal.Signals, *, timeout: float) -> None:
        """Freeze or kill a rank in the middle of a message that it sends (see `benchmarks.midway`), and wait for it."""
        order = self._folder / f"{rank}.order"
        order.write_text(str(int(number)), encoding="ascii")
        order.rename(self._folder / f"{rank}.{MIDWAY}")
        end = time.monotonic() + timeout
        while _state(self._processes[rank]) not in ENDED[number]:
            if time.monotonic() > end:
                raise TimeoutError(f"rank {rank} sent no long message within {timeout} s:\n{self.output(rank)}")
            time.sleep(0.0005)  # between looks at the child, up to the limit
        if MIDWAY not in self.heard(rank):
            raise RuntimeError(f"rank {rank} ended before it sent a long message:\n{self.output(rank)}")

    def terminate(self, rank: int) -> None:
        """Send SIGTERM to a rank's main process, as a scheduler does."""
        self._processes[rank].send_signal(signal.SIGTERM)

    # -- what a rank says ------------------------------------------------------------------------------------------

    def heard(self, rank: int) -> list[str]:
        """The words that a rank has said (`benchmarks.rank.say`)."""
        file = self._folder / f"{rank}.words"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def wait_for(self, rank: int, word: str, *, timeout: float) -> None:
        """Wait until a rank has said `word`."""
        end = time.monotonic() + timeout
        while word not in self.heard(rank):
            if self._processes[rank].poll() is not None and word not in self.heard(rank):
                raise RuntimeError(f"rank {rank} ended before it said {word!r}:\n{self.output(rank)}")
            if time.monotonic() > end:
                raise TimeoutError(f"rank {rank} did not say {word!r} within {timeout} s:\n{self.output(rank)}")
            time.sleep(0.01)  # between looks at the children, up to the limit

    def output(self, rank: int) -> str:
        """The end of what a rank printed."""
        file = self._folder / f"{rank}.log"
        return file.read_text(encoding="utf-8", errors="replace")[-TAIL:] if file.exists() else ""

    def outcomes(self, *, timeout: float) -> list[Outcome]:
        """Wait for all ranks; those that are still running then are killed and say so in their outcome."""
        end = time.monotonic() + timeout
        return [self._outcome(rank, process, end) for rank, process in enumerate(self._processes)]

    def values(self, *, timeout: float) -> list[Any]:
        """What all ranks returned; RuntimeError with the reasons where one did not."""
        outcomes = self.outcomes(timeout=timeout)
        if errors := [f"rank {o.rank}: {o.error}\n{self.output(o.rank)}" for o in outcomes if o.error]:
            raise RuntimeError("\n".join(errors))
        return [outcome.value for outcome in outcomes]

    def _outcome(self, rank: int, process: subprocess.Popen[bytes], end: float) -> Outcome:
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
            return Outcome(rank, error="still running at the time limit, killed")
        file = self._folder / f"{rank}.json"
        if file.exists():
            return Outcome(rank, **json.loads(file.read_text(encoding="utf-8")))
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return Outcome(rank, error=f"{ended}, without a result")

    def _meet(self) -> Store | Placed | Held:
        if not self._host_store:
            return Held()
        return Placed(self._start_store) if self._elsewhere else Store()

    def _start_store(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._folder / "store.log").open("wb") as log:
            return self._spawn(self._n, argv, self._with_paths(), log)

    def _start(self, rank: int, env: Mapping[str, str]) -> None:
        argv = [sys.executable, "-u", "-m", "benchmarks.rank", *self._what]
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (self._folder / f"{rank}.log").open("wb") as log:
            self._processes.append(self._spawn(rank, argv, own, log))

    def _environment(self, port: int) -> dict[str, str]:
        launched = {
            "WORLD_SIZE": str(self._n),
            "LOCAL_WORLD_SIZE": str(self._n),
            "GROUP_RANK": "0",
            "MASTER_ADDR": self._address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": secrets.token_hex(4),
            "TORCHELASTIC_USE_AGENT_STORE": str(self._host_store),
        }
        return {**self._with_paths(), FOLDER: str(self._folder), **launched, **self._extra}

    @staticmethod
    def _with_paths() -> dict[str, str]:
        path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
        return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


def _spawn_here(rank: int, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv, env=env, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _state(process: subprocess.Popen[bytes]) -> str:
    """The kernel's letter for it: T is frozen, Z dead."""
    return Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a rank with its own children (data workers); it leads a session of its own."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
