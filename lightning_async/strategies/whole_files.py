"""What stands under a checkpoint's name is whole: it is written beside it, and then takes the name in one move.

    last.ckpt.5f0c77a1.part   <- bytes ... disk full, killed, no power: last.ckpt is the one of before
                              <- on the disk, and not only on its way there
    last.ckpt                 <- renamed; the folder too is on the disk before anything that this replaces goes

Lightning writes into the folder for temporary files. Where that is another disk, its last move is a copy, and a disk
that fills up in the middle of it leaves half a file in the place of the checkpoint before.

A disk that hung may go on when a run has given its write up, and the next run of this process has written to the same
place, or removed what was there. So each write has a part of its own, and the name is for the one that was begun last.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import secrets
from threading import Lock
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

log = logging.getLogger(__name__)
_NEWEST: dict[str, str] = {}
"""By place, the write under way that is to take the name."""
_LOOK = Lock()
"""Held where a look and a change of these are one; never while a disk is asked, which may hang."""


class WholeFiles(TorchCheckpointIO):
    """Lightning's own CheckpointIO, with whole local files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, then rename."""
        name = os.fspath(path)
        if "://" in name or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        data = io.BytesIO()
        torch.save(checkpoint, data)  # into memory: a full disk is said by the system then, in plain words
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        place, token = os.path.abspath(name), secrets.token_hex(4)
        with _LOOK:
            _NEWEST[place] = token
        _clear(name)
        part, taken = f"{name}.{token}.part", False
        try:
            with open(part, "wb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if _NEWEST.get(place) == token:
                os.replace(part, name)
                taken = True
        except OSError:
            if _NEWEST.get(place) == token:
                raise
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)
            with _LOOK:
                if _NEWEST.get(place) == token:
                    del _NEWEST[place]
        if taken:
            _settle(os.path.dirname(name) or ".")
        else:
            log.warning("a write to %s comes to its end too late: what was done there since stays", name)

    def remove_checkpoint(self, path: Any) -> None:
        """And what a killed write left beside it."""
        if "://" not in (name := os.fspath(path)):
            with _LOOK:
                _NEWEST.pop(os.path.abspath(name), None)
            _clear(name)
        super().remove_checkpoint(path)


def _clear(name: str) -> None:
    """Remove the parts of writes to `name` that did not come to their end."""
    folder, name = os.path.dirname(name) or ".", os.path.basename(name)
    part = re.compile(re.escape(name) + r"(\.[0-9a-f]{8})?\.part")
    with contextlib.suppress(FileNotFoundError):
        for file in filter(part.fullmatch, os.listdir(folder)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, file))


def _settle(folder: str) -> None:
    """Bring the names in a folder to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
