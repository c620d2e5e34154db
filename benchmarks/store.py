"""The store where ranks find each other, hosted by the launcher, so that no rank's death takes it along."""

from __future__ import annotations

import socket

import torch.distributed as dist


class Store:
    """A store of this process, on a port of its own."""

    def __init__(self) -> None:
        self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.port: int = self._server.port


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
