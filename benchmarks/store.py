"""Where ranks find each other: a store that the launcher hosts (no rank's death takes it along), or a port for one."""

from __future__ import annotations

import socket

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
