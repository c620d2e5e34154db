"""A link is closed while a long message is on its way to a frozen peer: how long that takes.

    rank 0   FRAGMENT |-FRAGMENT |-FRAGMENT |- ... stuck       close() -> both threads gone, the body kept as lost
    peer     read     |-read     |-======== stopped ========                in so many milliseconds

    limit    0: nothing has to be waited for; the wake-up of two threads and gloo's own end of a connection remain
    other    the same link between two messages

Each link has a peer of its own. Without a cancel there would be no end: gloo tells nobody of a peer that is frozen.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks.launch import Ranks
from benchmarks.rank import say
from benchmarks.table import Claim, Role, Row, Table
from lightning_async.transport.gloo import Clients, keys_of
from lightning_async.transport.link import Link
from lightning_async.transport.mail import Message
from lightning_async.transport.pieces import Pieces
from lightning_async.transport.slots import Here, Inbox, Slots

PEERS = 8
MIB = 1 << 20
BODY = 64 * MIB
STRIKE = 5  # the piece behind which the peer stands still
STUCK = 0.2  # seconds until nothing moves any more
KIND = 20
GOAL = 0.1
LIMIT = 60.0
GONE = 600.0


def run(quick: bool) -> Table:
    """With bodies through the network and through memory, in the middle of one and between two."""
    rows = [Row("nothing to wait for", Role.LIMIT, {"median ms": 0.0, "most ms": 0.0})]
    worst = 0.0
    for way, memory in {"network": False, "memory": True}.items():
        peers = 3 if quick else PEERS
        for when, midway in {"in mid-transfer": True, "idle": False}.items():
            with Ranks(fit, 1 + peers, arguments={"memory": memory, "midway": midway}, store=True) as ranks:
                ranks.wait_for(0, "closed", timeout=LIMIT + 10 * peers)
                times = [float(word.split()[1]) for word in ranks.heard(0) if word.startswith("took ")]
            row = {"median ms": 1000 * median(times), "most ms": 1000 * max(times), "links": len(times)}
            rows.append(Row(f"{way}, {when}", Role.RESULT if midway else Role.OTHER, row))
            worst = max(worst, max(times)) if midway else worst
    claim = Claim(
        f"a link is closed in mid-transfer within {1000 * GOAL:.0f} ms: {1000 * worst:.1f} ms at most", worst <= GOAL
    )
    return Table(
        f"A link to a frozen peer is closed, {BODY // MIB} MiB on the way", rows, [claim], no_control="no step"
    )


def fit(memory: bool, midway: bool) -> None:
    """Rank 0 opens a link to each of the others and closes it; they stand still, or just stay."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]
    if rank:
        store.set(f"pid/{rank}", str(os.getpid()))
        _opened(store, rank, 0, memory)
        time.sleep(GONE)  # the launcher ends it
        return
    for peer in range(1, world):
        slots, link = _opened(store, 0, peer, memory)
        pid = int(store.get(f"pid/{peer}"))
        if midway:
            _stick(slots, link, pid)
        begin = time.monotonic()
        closed = link.close()
        say(f"took {time.monotonic() - begin}")
        if not closed or len(slots.bury()) != midway:
            raise RuntimeError("the link is not closed, or its message is not lost")
    say("closed")


def _opened(store: Any, me: int, peer: int, memory: bool) -> tuple[Slots, Link]:
    here = Here()
    slots = Slots(peer, inbox=Inbox(here=here), here=here, max_bytes=BODY)
    clients, pieces = Clients(keys_of(store, f"{min(me, peer)}-{max(me, peer)}")), Pieces(MIB)
    knobs: dict[str, Any] = {"run": "cancel", "connect_timeout": LIMIT, "shared_memory": memory}
    link = Link(clients, me=me, slots=slots, here=here, pieces=pieces, **knobs)
    end = time.monotonic() + LIMIT
    while link.state != "up":
        if link.state == "dead" or time.monotonic() > end:
            raise RuntimeError(f"no link: {link.error or 'it did not come up'}")
        time.sleep(0.001)  # between looks, up to the limit
    return slots, link


def _stick(slots: Slots, link: Link, pid: int) -> None:
    """Begin to send, stop the peer behind some pieces, and wait until nothing moves any more."""
    send: Callable[[Any], None] = link.sender.send_fragment

    def strike(outgoing: Any) -> None:
        if outgoing.sent == STRIKE:
            os.kill(pid, signal.SIGSTOP)
        send(outgoing)

    with patch.object(link.sender, "send_fragment", strike):
        if not slots.post(Message(KIND, torch.ones(BODY // 4))):
            raise RuntimeError("the slot of a new link is taken")
        time.sleep(STUCK)  # it is about a link that is stuck
