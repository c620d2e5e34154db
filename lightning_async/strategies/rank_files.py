"""Beside a checkpoint lies one file for each rank and save, and an index that names a save before its files are there.

    last.ckpt                        names the save whose files belong to it
    last.ckpt.ranks/index.ckpt       every save that was begun and not cleared away: nothing is left over after a crash
    last.ckpt.ranks/5f0c.rank0.ckpt
    last.ckpt.ranks/5f0c.rank1.ckpt

The files of an older save go when the main file that names the new one is there; the first rank clears them away. All
goes through the CheckpointIO that the user chose, so it works wherever that one writes, and nothing is ever listed.

Where files are written later (AsyncCheckpointIO) the older ones go behind that main file, which comes behind all that
the ranks had to write (`late_files`). After a crash there a file may be left that the index did not name yet.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.fabric.plugins import CheckpointIO

Saves = dict[str, list[int]]
"""The ranks of each save, by the save's name, oldest first."""


class RankFiles:
    """The side files of all checkpoints of a run, seen from one rank.

    Args:
        behind: Removes something now, or when what is to be written before is there.
    """

    def __init__(self, behind: Callable[[Callable[[], object]], object] = lambda remove: remove()) -> None:
        self._saves: dict[str, Saves] = {}
        self._behind = behind

    def begin(self, io: CheckpointIO, path: str, save: str, ranks: Sequence[int], options: Any) -> None:
        """Write down that `save` is under way, before any of its files is there."""
        saves = self._known(io, path)
        saves[save] = list(ranks)
        io.save_checkpoint({"saves": dict(saves)}, _index(path), storage_options=options)

    def finish(self, io: CheckpointIO, path: str, save: str) -> None:
        """The main file names `save`: clear the older ones away."""
        self._clear(io, path, keep={save})

    def give_up(self, io: CheckpointIO, path: str, save: str) -> None:
        """`save` failed: clear away what was written of it."""
        self._clear(io, path, keep=set(self._known(io, path)) - {save})

    def lie_at(self, io: CheckpointIO, path: str) -> bool:
        """Whether the index names a save."""
        return bool(self._known(io, path))

    def remove(self, io: CheckpointIO, path: str) -> None:
        """The checkpoint is gone: clear all of its saves away."""
        self._clear(io, path, keep=set())
        self._saves.pop(path, None)

    def _known(self, io: CheckpointIO, path: str) -> Saves:
        if path not in self._saves:
            try:
                index = io.load_checkpoint(_index(path), weights_only=True)
                self._saves[path] = dict(index["saves"])
            except Exception:  # each CheckpointIO has its own way to say that there is no such file
                self._saves[path] = {}
        return self._saves[path]

    def _clear(self, io: CheckpointIO, path: str, keep: set[str]) -> None:
        saves = self._known(io, path)
        gone = [save for save in saves if save not in keep]
        for save in gone:
            for rank in saves.pop(save):
                self._behind(partial(_quietly, io.remove_checkpoint, rank_file(path, save, rank)))
        if gone and not saves:
            self._behind(partial(_quietly, io.remove_checkpoint, _index(path)))
            self._behind(lambda: None if self._saves.get(path) else _quietly(os.rmdir, _folder(path)))  # in use again?


def rank_file(path: str, save: str, rank: int) -> str:
    """Where the state of `rank` lies that belongs to the checkpoint at `path`."""
    return f"{_folder(path)}/{save}.rank{rank}.ckpt"


def main_file(path: str) -> str:
    """The file that a link stands for (`save_last="link"`): the files of the ranks lie beside that one."""
    return os.path.realpath(path) if os.path.islink(path) else path


def _folder(path: str) -> str:
    return f"{path}.ranks"


def _index(path: str) -> str:
    return f"{_folder(path)}/index.ckpt"


def _quietly(remove: Callable[[str], object], path: str) -> None:
    """Remove what may not be there, which each CheckpointIO takes in its own way; a folder only if it is empty."""
    with contextlib.suppress(Exception):
        remove(path)
