"""The network by which others are reached; one by which they cannot be is refused before anybody waits for an answer.

interface named                       it must be one of this host's, and have an address
GLOO_SOCKET_IFNAME                    gloo refuses a wrong one itself, at start-up
neither, and there are other nodes    this host's name must not lead to itself, as /etc/hosts often has it
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator

from lightning_async.transport.gloo import has_address

LOOPBACK = "lo"
NAMED = "GLOO_SOCKET_IFNAME"


@contextlib.contextmanager
def by(interface: str | None) -> Iterator[None]:
    """What torch connects meanwhile goes by this interface too, as links do; None: as the environment says."""
    before = os.environ.get(NAMED)
    if interface is not None:
        os.environ[NAMED] = interface
    try:
        yield
    finally:
        if before is not None:
            os.environ[NAMED] = before
        elif interface is not None:
            os.environ.pop(NAMED, None)


def check_network(interface: str | None, *, nodes: int) -> None:
    """Raise `ValueError` for an interface, or a name of this host, by which no link would ever be up."""
    if interface is not None:
        check_interface(interface, nodes=nodes)
    elif nodes > 1 and NAMED not in os.environ:
        refuse_loopback(_own_address(socket.gethostname()), nodes=nodes)


def check_interface(name: str, *, nodes: int) -> None:
    """Raise `ValueError` for a network interface that is not there, or leads nowhere."""
    there = [known for _, known in socket.if_nameindex()]
    if name not in there or not has_address(name):
        raise ValueError(
            f"`interface` must name a network interface of this host that has an address, got {name!r}; there are "
            f"{', '.join(there)}"
        )
    if nodes > 1 and name == LOOPBACK:
        others = ", ".join(known for known in there if known != name)
        raise ValueError(
            f"`interface={name!r}` leads nowhere but to this host, and there are {nodes} nodes; others are {others}"
        )


def refuse_loopback(address: str, *, nodes: int) -> None:
    """Raise `ValueError` for a host whose name leads to itself: it cannot be reached from another one."""
    if nodes > 1 and ipaddress.ip_address(address).is_loopback:
        raise ValueError(
            f"this host's name resolves to {address}, where the other {nodes - 1} nodes cannot reach it: name the "
            "network interface by GLOO_SOCKET_IFNAME (or `interface`), or correct /etc/hosts"
        )


def _own_address(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except socket.gaierror as error:
        raise ValueError(
            f"this host's name, {name!r}, leads to no address ({error}): name the network interface by "
            "GLOO_SOCKET_IFNAME (or `interface`), or correct /etc/hosts"
        ) from None
