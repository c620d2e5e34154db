"""Whenever a write is cut short, what stands under a checkpoint's name is whole."""

from __future__ import annotations

import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_async.strategies.whole_files import WholeFiles
from tests.strategies.lit import Lit, loader, trainer

OLD, NEW = {"weights": torch.zeros(8)}, {"weights": torch.ones(4096)}


@contextmanager
def full_from(size: int) -> Iterator[None]:
    """No file of this process gets longer: the kernel says so in the middle of a write."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)["weights"].tolist()


def test_a_disk_that_fills_up_leaves_the_one_of_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    WholeFiles().save_checkpoint(OLD, path)
    with full_from(8192), pytest.raises(OSError, match="File too large"):
        WholeFiles().save_checkpoint(NEW, path)
    assert _loaded(path) == OLD["weights"].tolist()
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    WholeFiles().save_checkpoint(NEW, path)
    assert _loaded(path) == NEW["weights"].tolist()


def test_nothing_passes_by_the_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That may be another disk, from which a move is a copy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        TorchCheckpointIO().save_checkpoint(NEW, tmp_path / "lightnings.ckpt")
    WholeFiles().save_checkpoint(NEW, tmp_path / "ours.ckpt")
    assert _loaded(tmp_path / "ours.ckpt") == NEW["weights"].tolist()


class Theirs(TorchCheckpointIO):
    pass


@pytest.mark.parametrize(("plugins", "kind"), [([], WholeFiles), ([Theirs()], Theirs)])
def test_strategies_write_so_unless_the_user_chose_another_way(plugins: list[Any], kind: type[Any]) -> None:
    t = trainer(1, max_epochs=1, plugins=plugins)
    t.fit(Lit(), loader(), loader(10, shuffle=False))
    assert type(t.strategy.checkpoint_io) is kind
