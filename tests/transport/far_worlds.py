"""Worlds with a member that can be killed and frozen: members 0 and 1 are the test's, member 2 lives on its own.

Member 2 posts 1, 2, 3, ... to each of the others, whenever a slot is free, and folds all that comes. What it took it
says at once, so that its word outlives it.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Protocol

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import Store

from lightning_async.transport.cluster import ClusterCarrier
from lightning_async.transport.mail import Carrier, Message
from lightning_async.transport.virtual import VirtualCluster
from tests.transport.worlds import BUSY, KIND

FORK = multiprocessing.get_context("fork")
FAR = 2
LENGTH = 300_000  # numbers of a body: more than a piece
SILENCE, PATIENCE = 0.5, 20.0
Taken = tuple[int, int, float]
"""From whom, its number on the link, the one value that its body has: nan for a torn one."""


def full(value: float) -> torch.Tensor:
    return torch.full((LENGTH,), float(value))


def value_of(body: torch.Tensor | None) -> float:
    """The value that a body is full of."""
    assert body is not None
    return float(body[0]) if len(body) == LENGTH and bool((body == body[0]).all()) else math.nan


@dataclass
class Life:
    """What member 2 does."""

    carrier: Carrier
    tell: Callable[[Taken], object]
    posted: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})

    def step(self) -> None:
        for letter in self.carrier.take(KIND):
            self.tell((letter.peer, letter.number, value_of(letter.message.body)))
            self.carrier.folded(letter)
        for peer, count in self.posted.items():
            self.posted[peer] += self.carrier.post(peer, Message(KIND, full(count + 1)))


class FarWorld(Protocol):
    """Members 0 and 1, their time, and what can befall member 2.

    Attributes:
        taken: What member 2 took, as it said.
    """

    carriers: list[Carrier]
    taken: list[Taken]

    def until(self, condition: Callable[[], object]) -> None:
        """Let time pass until `condition()` holds."""

    def kill(self) -> None:
        """Member 2 ends."""

    def freeze(self) -> None:
        """The time of member 2 stands still until `thaw`."""

    def thaw(self) -> None:
        """It goes on."""

    def close(self) -> None:
        """Take the world down."""


class VirtualFar:
    """On the virtual carrier."""

    FROZEN = 5.0

    def __init__(self) -> None:
        self.cluster = VirtualCluster(3, bandwidth=1e8, silence=SILENCE, patience=PATIENCE)
        self.carriers: list[Carrier] = list(self.cluster.carriers[:FAR])
        self.taken: list[Taken] = []
        self._life, self._killed, self._frozen = Life(self.cluster.carriers[FAR], self.taken.append), False, 0.0

    def until(self, condition: Callable[[], object], limit: float = 40.0) -> None:
        end = self.cluster.time + limit
        while not condition():
            assert self.cluster.time < end, "it never happened"
            self.cluster.advance(0.001)
            if not self._killed and self.cluster.time > self._frozen:
                self._life.step()

    def kill(self) -> None:
        self._killed = True
        self.cluster.kill(FAR)

    def freeze(self) -> None:
        self._frozen = self.cluster.time + self.FROZEN
        self.cluster.freeze(FAR, self.FROZEN)

    def thaw(self) -> None:
        self.until(lambda: self.cluster.time > self._frozen)

    def close(self) -> None:
        pass


class ClusterFar:
    """On the real carrier; member 2 is a process."""

    shared_memory = True

    def __init__(self) -> None:
        self._stack = ExitStack()
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        gc.collect()  # a store's server that is garbage in the child makes it wait for a thread that was not forked
        self._said, theirs = (self._stack.enter_context(end) for end in FORK.Pipe())
        self._process = FORK.Process(target=_far, args=(server.port, self.shared_memory, theirs))
        self._process.start()
        for end in (self._process.close, self._process.join, self._process.kill):
            self._stack.callback(end)
        self.taken: list[Taken] = []
        self.carriers: list[Carrier] = []
        for me in range(FAR):
            carrier = _member(server, me, shared_memory=self.shared_memory)
            self._stack.callback(carrier.close)
            carrier.start()
            self.carriers.append(carrier)

    def until(self, condition: Callable[[], object], limit: float = BUSY) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, "it never happened"
            self._listen()
            self.carriers[0].wait(0.001)
        self._listen()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join(BUSY)
        self._listen()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self._stack.close()

    def _listen(self) -> None:
        while self._said.poll():
            self.taken.append(self._said.recv())

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


class NetworkFar(ClusterFar):
    """The same, with nothing but the network between the members."""

    shared_memory = False


def _member(store: Store, me: int, *, shared_memory: bool) -> ClusterCarrier:
    return ClusterCarrier(
        store=store,
        me=me,
        world=3,
        run="far",
        peers=[peer for peer in range(3) if peer != me],
        tick=0.02,
        connect_timeout=5.0,
        fragment_bytes=1 << 18,
        interface="lo",
        silence=SILENCE,
        patience=PATIENCE,
        shared_memory=shared_memory,
    )


def _far(port: int, shared_memory: bool, out: Connection) -> None:
    with _member(TCPStore("127.0.0.1", port, is_master=False), FAR, shared_memory=shared_memory) as carrier:
        life = Life(carrier, out.send)
        while True:
            life.step()
            carrier.wait(0.01)


@pytest.fixture(params=[VirtualFar, ClusterFar, NetworkFar])
def far_world(request: pytest.FixtureRequest) -> Iterator[FarWorld]:
    """Each of them."""
    world: FarWorld = request.param()
    yield world
    world.close()
