"""A process is of one world for as long as it lives: a run of another number of ranks needs processes of its own.

    Trainer(devices=1).fit      torch's default group has one rank, and Lightning never leaves it
    Trainer(devices=2).fit      finds a group that is there and takes it for its own: it would wait without end

The same in ranks forked from such a process: the group they inherit has none of its threads, and no one to talk to.
"""

from __future__ import annotations

import os

import torch.distributed as dist

_inherited: object = None


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
