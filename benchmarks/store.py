"""Where ranks find each other: a store that no rank's death takes along, or a port for one.

    Store     in the launcher's process
    Placed    in a process of its own, on a host beside those of the ranks
    Held      on rank 0: only a port that is kept for it

As a program (`python -m benchmarks.store PORT`) this is the process of `Placed`. Its standard input is its lifeline.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist


class Store:
    """A store of this process, on a port of its own."""

    def __init__(self) -> None:
        self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.port: int = self._server.port

    def close(self) -> None:
        """Take it down."""
        del self._server


class Held:
    """A port that is kept for the store of rank 0, which is going to listen on it.

    One that was merely free a moment ago may be somebody else's by then. This one is bound, so that nobody who asks for
    any port is given it; and it does not listen, so that a store may: both say SO_REUSEADDR.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give it up."""
        self._socket.close()


class Placed:
    """A store in a process that `start` puts somewhere else.

    Ranks that look for it before it is there try again. Its port is kept here too, so it is free wherever that is.
    """

    def __init__(self, start: Callable[[Sequence[str]], subprocess.Popen[bytes]]) -> None:
        self._held = Held()
        self.port = self._held.port
        self._process = start([sys.executable, "-u", "-m", "benchmarks.store", str(self.port)])

    def close(self) -> None:
        """Take it down."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._held.close()


def main(port: int) -> None:
    """Host a store as long as somebody holds the other end of standard input."""
    server = dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    while os.read(0, 1):
        pass
    del server


if __name__ == "__main__":
    main(int(sys.argv[1]))
