"""A small cluster in one machine: every host is a network namespace, and links may be slow or cut.

    host 0 [eth0] ==== [p0] \\
    host 1 [eth0] ==== [p1] -- bridge, in a namespace of its own        198.18.0.<host + 1>/24
    host 2 [eth0] ==== [p2] /

Nothing is made in the machine's own network namespace, so deleting the namespaces removes everything, and two clusters
may use the same addresses side by side (198.18.0.0/15 is reserved for measurements, and routed nowhere). A cut is a
pulled cable: no FIN, no RST, peers see silence. The kernel shapes the links; a delay is `benchmarks.delay_line`'s.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO

from benchmarks import delay_line
from benchmarks.launch import Spawn

_numbers = itertools.count()
QUEUE = 0.05  # seconds of traffic that wait at a shaped link before frames are dropped
FAREWELL = 5.0
READY = 30.0  # seconds in which the cables with a delay must be there


def available() -> str | None:
    """Why this machine cannot do it, in a sentence; None where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "network namespaces need the commands `ip` and `tc` (iproute2)"
    try:
        with Hosts(1, mbit=1000):
            return None
    except RuntimeError as error:
        return f"this machine does not allow network namespaces: {error}"


class Hosts:
    """`n` hosts on one switch.

    Args:
        n: How many.
        mbit: What a link carries, each way; None: as fast as memory.
        delay: Seconds from one host to another, beside what bandwidth and queues cost.
    """

    def __init__(self, n: int, *, mbit: float | None = None, delay: float = 0.0) -> None:
        if not 1 <= n <= 250:
            raise ValueError(f"`n` must be from 1 to 250, got {n}")
        if mbit is not None and mbit <= 0:
            raise ValueError(f"`mbit` must be above 0, got {mbit}")
        if not 0 <= delay < 10:
            raise ValueError(f"`delay` must be seconds from 0 to below 10, got {delay}")
        self.n, self._mbit, self._delay = n, mbit, delay
        self._prefix = f"la{os.getpid()}x{next(_numbers)}"
        self._switch = f"{self._prefix}sw"
        self._made: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._make(self._switch)
            _ip(self._switch, "link add br0 type bridge")
            _ip(self._switch, "link set br0 up")
            if self._delay:
                self._make_cables()
            for i in range(self.n):
                self._make_host(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, i: int) -> str:
        """Where host `i` is reached."""
        return f"198.18.0.{self._checked(i) + 1}"

    def run(
        self, i: int, argv: Sequence[str], env: Mapping[str, str] | None = None, output: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program on host `i`, in a session of its own; standard output and error go to `output`."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._name(i), *argv],
            env=None if env is None else dict(env),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def spawn(
        self, rank: int, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a rank on the host of its number, for `Ranks(..., address=hosts.address(0), spawn=hosts.spawn)`."""
        return self.spawn_by(1)(rank, argv, env, output)

    def spawn_by(self, each: int) -> Spawn:
        """Start ranks so many to a host, in their order, for `Ranks(..., spawn=hosts.spawn_by(2))`."""

        def spawn(rank: int, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
            host, local = divmod(rank, each)
            node = {"GROUP_RANK": str(host), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(each)}
            return self.run(host, argv, {**env, **node, "GLOO_SOCKET_IFNAME": "eth0"}, output)

        return spawn

    def sent(self, i: int) -> int:
        """Bytes that left host `i`, with the headers of every frame, since it was made."""
        (link,) = json.loads(_command("ip", "-n", self._name(i), "-s", "-j", "link", "show", "eth0"))
        return int(link["stats64"]["tx"]["bytes"])

    def shape(self, mbit: float) -> None:
        """From now on the links carry so much, where they were as fast as memory."""
        if self._mbit is not None or mbit <= 0:
            raise ValueError(f"links of {self._mbit} Mbit/s cannot become links of {mbit}")
        self._mbit = mbit
        for i in range(self.n):
            self._shape(i)

    def cut(self, i: int) -> None:
        """Pull host `i`'s cable."""
        _ip(self._switch, f"link set p{self._checked(i)} down")

    def heal(self, i: int) -> None:
        """Plug it in again."""
        _ip(self._switch, f"link set p{self._checked(i)} up")

    def close(self) -> None:
        """End everything that runs on the hosts and remove them."""
        for process in self._processes:
            process.kill()  # also what has not reached its namespace yet
        hosts = [name for name in self._made if name != self._switch]
        end = time.monotonic() + FAREWELL
        while (pids := [pid for name in hosts for pid in _pids(name)]) and time.monotonic() < end:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._processes:
                process.poll()  # reaps the dead, which a namespace counts as its own
            time.sleep(0.01)  # between looks, up to the limit above
        for process in self._processes:
            process.wait(FAREWELL)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
        self._processes = []
        while self._made:
            _command("ip", "netns", "delete", self._made.pop())

    def _make(self, name: str) -> None:
        _command("ip", "netns", "add", name)
        self._made.append(name)
        _ip(name, "link set lo up")

    def _make_cables(self) -> None:
        argv = [sys.executable, delay_line.__file__, str(self.n), str(self._delay / 2)]  # two cables between two hosts
        cables = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._processes.append(cables)
        assert cables.stdout is not None
        assert cables.stderr is not None
        if not select.select([cables.stdout], [], [], READY)[0] or not cables.stdout.readline():
            cables.kill()
            reason = cables.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"no cables with a delay: {reason}")

    def _make_host(self, i: int) -> None:
        name = self._name(i)
        self._make(name)
        if self._delay:
            _ip(self._switch, f"link set h{i} netns {name} name eth0")
        else:
            _command("ip", *f"link add eth0 netns {name} type veth peer name p{i} netns {self._switch}".split())
        _ip(self._switch, f"link set p{i} master br0 up")
        _ip(name, f"address add {self.address(i)}/24 dev eth0")
        _ip(name, "link set eth0 up")
        if self._mbit is not None:
            self._shape(i)

    def _shape(self, i: int) -> None:
        assert self._mbit is not None  # asked for
        for namespace, device in ((self._name(i), "eth0"), (self._switch, f"p{i}")):
            _shape(namespace, device, self._mbit)

    def _name(self, i: int) -> str:
        return f"{self._prefix}h{self._checked(i)}"

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise ValueError(f"the hosts are 0 to {self.n - 1}, got {i}")
        return i


def _shape(namespace: str, device: str, mbit: float) -> None:
    rate = mbit * 1e6 / 8  # bytes a second
    burst, limit = max(int(rate / 250), 16 << 10), max(int(rate * QUEUE), 256 << 10)
    shaped = f"qdisc add dev {device} root tbf rate {int(mbit * 1e6)}bit burst {burst} limit {limit}"
    _command("tc", "-n", namespace, *shaped.split())


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _command("ip", "netns", "pids", namespace).split()]


def _ip(namespace: str, words: str) -> None:
    _command("ip", "-n", namespace, *words.split())


def _command(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
    return done.stdout
