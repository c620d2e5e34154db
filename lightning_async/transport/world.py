"""A process is of one world for as long as it lives: a run of another number of ranks needs processes of its own.

    Trainer(devices=1).fit      torch's default group has one rank, and Lightning never leaves it
    Trainer(devices=2).fit      finds a group that is there and takes it for its own: it would wait without end

The same in ranks forked from such a process: the group they inherit has none of its threads, and no one to talk to.

A replay has no group. Whoever makes or draws data there sees the rank and the world of the run all the same
(`seen_as`): `torch.distributed` answers, and so does the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

_inherited: object = None
_NAMES = ("RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class View:
    """What this process says of its world: torch's default group, and two variables of the environment."""

    group: object
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class _Place:
    """Of a group, what is asked for without talking to anybody."""

    me: int
    world: int

    def rank(self) -> int:
        return self.me

    def size(self) -> int:
        return self.world


def seen() -> View:
    """What it says now."""
    return View(dist.group.WORLD, tuple(map(os.environ.get, _NAMES)))


def see(view: View) -> None:
    """From now on it says this."""
    dist.group.WORLD = view.group  # type: ignore[assignment]  # a place is asked for its rank and its size only
    for name, value in zip(_NAMES, view.names, strict=True):
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def seen_as(rank: int, world: int) -> Iterator[None]:
    """For a while this process is this rank among so many, for who asks and talks to nobody."""
    before = seen()
    see(View(_Place(rank, world), (str(rank), str(world))))
    try:
        yield
    finally:
        see(before)


def check_world(ranks: int) -> None:
    """Raise if this process is of another world than one of so many ranks."""
    if not dist.is_initialized():
        return
    world = dist.get_world_size()
    if dist.group.WORLD is _inherited:
        raise RuntimeError(
            f"this rank was forked from a process that an earlier Trainer had made one of {world} ranks, and cannot "
            "leave that group: give each of the two Trainers a script of its own"
        )
    if world != ranks:
        raise RuntimeError(
            f"an earlier Trainer made this process one of {world} ranks, and this one asks for {ranks}: give each of "
            "the two a script of its own, or the same number of ranks"
        )


def _forked() -> None:
    global _inherited
    _inherited = dist.group.WORLD


os.register_at_fork(after_in_child=_forked)
