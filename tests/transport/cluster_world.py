"""The contract's world over torch.distributed: carriers of one process, real links and real control threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from lightning_async.transport.cluster import ClusterCarrier
from tests.transport.worlds import BUSY


class ClusterWorld:
    """Members over one store in this process; their time is the real one."""

    def __init__(self, n: int, late: int | None = None, *, shared_memory: bool = True, silence: float = 2.0) -> None:
        store, self.late = HashStore(), late
        self.carriers = [
            ClusterCarrier(
                store=store,
                me=me,
                world=n,
                run="contract",
                peers=[peer for peer in range(n) if peer != me],
                tick=0.02,
                connect_timeout=5.0,  # a world may end while a link is in its rendezvous: so long its thread stays
                interface="lo",
                silence=silence,
                patience=max(30.0, silence),
                shared_memory=shared_memory,
            )
            for me in range(n)
        ]
        for carrier in self.carriers:
            if carrier.me != late:
                carrier.start()

    def until(self, condition: Callable[[], object], limit: float = BUSY) -> None:
        """Let time pass until `condition()` holds; fail after `limit` seconds."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"nothing came of it within {limit} seconds")
            self.carriers[0].wait(0.001)

    def join(self) -> None:
        """Let the member that is late come."""
        assert self.late is not None
        self.carriers[self.late].start()

    def close(self) -> None:
        """Take the world down."""
        for carrier in self.carriers:
            carrier.close()


class NetworkWorld(ClusterWorld):
    """The same, with nothing but the network between the members."""

    def __init__(self, n: int, late: int | None = None) -> None:
        super().__init__(n, late, shared_memory=False)
