"""A rank that was forked where threads had computed computes on one thread: with more it would wait for those for ever.

OpenMP keeps its threads between two computations. A fork copies the list of them and not the threads, so the first
matrix product in the child waits for nobody, without end: in a notebook, after any computation before `fit`. Nothing
tells from outside whether it is so. A child of one's own, which computes a little, tells it: it ends, or it does not.
"""

from __future__ import annotations

import os
import select
import signal
from multiprocessing import current_process, get_all_start_methods, get_context

import torch
from lightning.pytorch.utilities import rank_zero_warn

ENOUGH = 5.0  # seconds for a few products; more only on a machine that is very busy, and one thread is right then too
NUMBERS = 1 << 18  # more than torch gives to one thread, and as many in a matrix product


def spare_the_threads() -> None:
    """Compute on one thread, if more could not end."""
    if not _is_forked() or torch.get_num_threads() == 1 or _ends():
        return
    torch.set_num_threads(1)
    rank_zero_warn(
        "each rank computes on one thread: they were forked from a process in which torch had computed on several, and "
        "would hang with more. For all threads, compute nothing before `fit`, or start the ranks as new processes"
    )


def _is_forked() -> bool:
    return "fork" in get_all_start_methods() and isinstance(current_process(), get_context("fork").Process)


def _ends() -> bool:
    """Whether a child that computes comes to its end."""
    mine, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.ones(NUMBERS).add_(1.0)
            torch.ones(NUMBERS).view(NUMBERS // 512, 512) @ torch.ones(512, 512)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        return bool(select.select([mine], [], [], ENOUGH)[0])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(mine)
