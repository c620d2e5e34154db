"""A store in a process of its own, which a test may freeze or kill."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

from torch.distributed import TCPStore

FORK = multiprocessing.get_context("fork")


def _host(out: Connection) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out.send(server.port)
    signal.pause()


@contextmanager
def far_store() -> Iterator[tuple[int, int]]:
    """Its process and its port."""
    with ExitStack() as stack:
        gc.collect()  # a store's server that is garbage in the child makes it wait for a thread that was not forked
        mine, theirs = (stack.enter_context(end) for end in FORK.Pipe())
        process = FORK.Process(target=_host, args=(theirs,))
        process.start()
        stack.callback(process.close)
        stack.callback(process.join)
        stack.callback(process.kill)
        assert process.pid is not None
        yield process.pid, mine.recv()
