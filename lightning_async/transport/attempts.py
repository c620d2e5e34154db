"""Each attempt of a run that torchrun starts anew has a place in the store where nobody has written yet.

The store outlives the ranks that fail, with the addresses at which these were to be found; whoever connects to one of
them fails as well, or waits (pytorch/pytorch#135712). How often a node has restarted is no common name for an attempt:
each counts for itself. So all ranks agree on one before they say anything else:

    rank r    hello/r = a number it drew just now
    rank 0    welcome = its own number, and all hellos that it found        again, while one of them changes
    rank r    thanks/0's number/r, if its hello is among them; else hello   again, while the welcome changes
    rank 0    begun/0's number, when all have thanked                       the name of this attempt
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, not exported by name

from lightning_async.transport.gloo import CONNECTED, reached

ROOT = "lightning_async/attempt"
LOOK = 0.02  # seconds between two looks


def join(
    address: str, port: int, me: int, world: int, *, device: torch.device, backend: str | None, timeout: timedelta
) -> None:
    """Make the default group of this attempt, where torchrun's own store is used and nobody has made one."""
    if dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world == 1:
        return
    timeout = min(timeout, CONNECTED)  # torch counts milliseconds, of which `timedelta.max` has too many
    backend = backend or dist.Backend.default_device_backend_map.get(device.type, "gloo")
    store = reached(
        lambda: TCPStore(address, port, is_master=False, timeout=timeout),
        f"{address}:{port}",
        seconds=2 * timeout.total_seconds(),
    )
    dist.init_process_group(
        backend,
        store=fresh(store, me, world, timeout),
        rank=me,
        world_size=world,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    if backend == "nccl":
        atexit.register(_end)  # torch warns of one that is left


def fresh(store: Store, me: int, world: int, timeout: timedelta) -> Store:
    """A part of this store for all ranks of this attempt, and for no others. All ranks call it."""
    mine = secrets.token_hex(8)
    store = PrefixStore(ROOT, store)
    store.set(f"hello/{me}", mine)
    looks = _looks(me, world, timeout)
    name = _welcomes(store, mine, world, looks) if me == 0 else _thanks(store, mine, me, looks)
    return PrefixStore(name, store)


def _welcomes(store: Store, mine: str, world: int, looks: Iterator[None]) -> str:
    said: list[str] = []
    hellos, thanks = ([f"{word}/{rank}" for rank in range(1, world)] for word in ("hello", f"thanks/{mine}"))
    for _ in looks:
        if not store.check(hellos):
            continue
        found = [store.get(hello).decode() for hello in hellos]
        if found != said:
            said = found
            store.set("welcome", json.dumps([mine, *said]))
        elif store.check(thanks):
            store.set(f"begun/{mine}", "")
            break
    return mine


def _thanks(store: Store, mine: str, me: int, looks: Iterator[None]) -> str:
    thanked = ""
    for _ in looks:
        if thanked and store.check([f"begun/{thanked}"]):
            break
        if store.check(["welcome"]):
            name, *hellos = json.loads(store.get("welcome"))
            if hellos[me - 1 : me] != [mine]:
                store.set(f"hello/{me}", mine)  # somebody of an earlier attempt, still there, may have said another
            elif name != thanked:
                thanked = name
                store.set(f"thanks/{name}/{me}", "")
    return thanked


def _looks(me: int, world: int, timeout: timedelta) -> Iterator[None]:
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        yield
        time.sleep(LOOK)
    raise TimeoutError(
        f"rank {me} waited {timeout.total_seconds():.0f} s for all {world} ranks to begin: look for one that did not "
        "start, or raise `timeout`"
    )


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
