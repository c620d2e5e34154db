"""Beside a checkpoint lies one file for each rank and save, and an index that names a save before its files are there.

    last.ckpt                        names the save whose files belong to it
    last.ckpt.ranks/index.ckpt       every save that was begun and not cleared away: nothing is left over after a crash
    last.ckpt.ranks/5f0c.rank0.ckpt
    last.ckpt.ranks/5f0c.rank1.ckpt

The files of an older save go when the main file that names the new one is there; the first rank clears them away. All
goes through the CheckpointIO that the user chose, so it works wherever that one writes, and nothing is ever listed.

Where files are written later (AsyncCheckpointIO) a file is removed behind what its rank has still to write. Another
rank's may come after that: so the last save but one stays until the run ends, and then, when all ranks have written
all, what was cleared away is cleared away once more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from lightning_async.strategies.compat import behind_writes, writes_later

Saves = dict[str, list[int]]
"""The ranks of each save, by the save's name, oldest first."""


class RankFiles:
    """The side files of all checkpoints of a run, seen from one rank."""

    def __init__(self) -> None:
        self._saves: dict[str, Saves] = {}
        self._named: dict[str, str] = {}
        self._finished: set[str] = set()
        self._late: list[str] = []

    def begin(self, io: CheckpointIO, path: str, save: str, ranks: Sequence[int], options: Any) -> None:
        """Write down that `save` is under way, before any of its files is there."""
        saves = self._known(io, path)
        saves[save] = list(ranks)
        io.save_checkpoint({"saves": dict(saves)}, _index(path), storage_options=options)

    def finish(self, io: CheckpointIO, path: str, save: str) -> None:
        """The main file names `save`: clear the older ones away.

        Where files are written later, the main file on the disk may still name the save before: that one stays.
        """
        before, self._named[path] = self._named.get(path), save
        self._finished.add(path)
        if not writes_later(io):
            self._clear(io, path, keep={save})
        elif before is not None:
            self._clear(io, path, keep={save, before})

    def give_up(self, io: CheckpointIO, path: str, save: str) -> None:
        """`save` failed: clear away what was written of it."""
        self._clear(io, path, keep=set(self._known(io, path)) - {save})

    def remove(self, io: CheckpointIO, path: str) -> None:
        """The checkpoint is gone: clear all of its saves away."""
        self._clear(io, path, keep=set())
        self._saves.pop(path, None)
        self._named.pop(path, None)
        self._finished.discard(path)

    def settle(self, io: CheckpointIO) -> None:
        """All ranks have written all: only what the main files name stays.

        Those that were only read stay as they are: they may have been written since, by another spelling of the path.
        """
        for path in self._finished:
            self._clear(io, path, keep={self._named[path]})
        for file in self._late:
            _discard(io, file)
        for folder in {os.path.dirname(file) for file in self._late}:
            _discard_folder(io, folder)
        self._late.clear()

    def names(self, path: str, save: str) -> None:
        """The main file at `path` was read, and names `save`."""
        self._named[path] = save

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
                _discard(io, file := rank_file(path, save, rank))
                if writes_later(io):
                    self._late.append(file)
        if gone and not saves:
            _discard(io, _index(path))
            if not writes_later(io):  # else another rank may be about to write into it: it goes at the end
                _discard_folder(io, _folder(path))


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


def _discard(io: CheckpointIO, path: str) -> None:
    """Remove a file that may not be there, which each CheckpointIO takes in its own way."""
    behind_writes(io, partial(_quietly, io.remove_checkpoint, path))


def _discard_folder(io: CheckpointIO, path: str) -> None:
    """Remove a folder if it is empty, where there are folders."""
    behind_writes(io, partial(_quietly, os.rmdir, path))


def _quietly(remove: Callable[[str], object], path: str) -> None:
    with contextlib.suppress(Exception):
        remove(path)
