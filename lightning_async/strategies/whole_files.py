"""What stands under a checkpoint's name is whole: it is written beside it, and then takes the name in one move.

    last.ckpt.part   <- bytes ... disk full, killed, no power: last.ckpt is the one of before
                     <- on the disk, and not only on its way there
    last.ckpt        <- renamed; the folder too is on the disk before anything that this replaces goes

Lightning writes into the folder for temporary files. Where that is another disk, its last move is a copy, and a disk
that fills up in the middle of it leaves half a file in the place of the checkpoint before.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


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
        part = f"{name}.part"
        try:
            with open(part, "wb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(part)
            raise
        _settle(os.path.dirname(name) or ".")

    def remove_checkpoint(self, path: Any) -> None:
        """And what a killed write left beside it."""
        super().remove_checkpoint(path)
        if "://" not in (name := os.fspath(path)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{name}.part")


def _settle(folder: str) -> None:
    """Bring the names in a folder to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
