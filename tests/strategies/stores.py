"""Who saves; CheckpointIOs that go wrong, that write later, and one that writes nowhere near the path it is given."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_async.strategies.whole_files import WholeFiles


class Recorded(TorchCheckpointIO):
    """Remembers what was asked of it, by the names of the files."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.calls.append(("save", os.path.basename(path)))
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", os.path.basename(path)))
        super().remove_checkpoint(path)


class SavesTwice(Callback):
    """Two saves at one path; before the second one `arm` is called."""

    def __init__(self, path: str, arm: Callable[[], None]) -> None:
        self.path, self.arm = path, arm

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            if trainer.current_epoch == 1:
                self.arm()
            trainer.save_checkpoint(self.path)


class AtTheEnd(Callback):
    """Saves in the hook of an epoch's end, as a ModelCheckpoint by epochs does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.path)


class Dies(Recorded):
    """The process is killed before the write or removal of this number, counted from when `armed` is set."""

    def __init__(self, *, at: int) -> None:
        super().__init__()
        self.at = at
        self.armed = False
        self.count = 0

    def _tick(self) -> None:
        if self.armed:
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self._tick()
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        self._tick()
        super().remove_checkpoint(path)


class DiesWriting(WholeFiles):
    """The process is killed in the middle of the write of this number, counted from when `armed` is set."""

    def __init__(self, *, at: int) -> None:
        self.at = at
        self.armed = False
        self.count = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.armed:
            if self.count == self.at:
                self._aim()
            self.count += 1
        super().save_checkpoint(checkpoint, path, storage_options)

    def _aim(self) -> None:
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)


class Full(Recorded):
    """Once `full` is set, a write of a file whose name contains `what` fails as on a full disk."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.full = False

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.full and self.what in os.path.basename(path):
            raise OSError(28, "No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def bucket(root: Path) -> None:
    """Let fsspec know `bucket://`, a store that all processes of this host reach; what is on its way there lies beside
    it."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(LocalFileSystem):  # type: ignore[misc]
        protocol = ("bucket",)

        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            return super()._strip_protocol(str(path).replace("bucket://", f"{root}/", 1))

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    (root / "on its way").mkdir(exist_ok=True)
    tempfile.tempdir = str(root / "on its way")


def _half_of_it(then: Callable[[], None]) -> Any:
    """Half of what is written to the bucket next gets there, and then ..."""
    from fsspec.implementations.local import LocalFileOpener

    def write(file: Any, data: bytes) -> None:
        file.f.write(data[: len(data) // 2])
        file.f.flush()
        then()

    return patch.object(LocalFileOpener, "write", write)


class DiesInTheStore(DiesWriting):
    """The same, of a write to the bucket."""

    def _aim(self) -> None:
        _half_of_it(lambda: os.kill(os.getpid(), signal.SIGKILL)).start()


class FullStore(Full):
    """The same in the middle of a write to the bucket."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with _half_of_it(_no_space) if self.full and self.what in os.path.basename(path) else nullcontext():
            Recorded.save_checkpoint(self, checkpoint, path, storage_options)


def _no_space() -> None:
    raise OSError(28, "No space left on device")


class Elsewhere(CheckpointIO):
    """Keeps everything in one flat folder under hashed names, as an object store does, and is strict."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _place(self, path: Any) -> Path:
        return self.folder / hashlib.sha1(str(path).encode()).hexdigest()

    def names(self) -> list[str]:
        return sorted(json.loads(file.read_text()) for file in self.folder.glob("*.name"))

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, self._place(path))
        self._place(path).with_suffix(".name").write_text(json.dumps(str(path)))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if not self._place(path).exists():
            raise KeyError(f"no object {path}")
        return torch.load(self._place(path), map_location="cpu", weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        if not self._place(path).exists():
            raise KeyError(f"no object {path}")
        self._place(path).unlink()
        self._place(path).with_suffix(".name").unlink()
