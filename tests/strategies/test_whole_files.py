"""Whenever a write is cut short, what stands under a checkpoint's name is whole."""

from __future__ import annotations

import os
import re
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from lightning_async.strategies import whole_files
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


def test_what_replaces_another_is_on_the_disk_before_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that loses its power has one of the two."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def settles(file: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def renames(part: str, name: str) -> None:
        done.append("renamed")
        replace(part, name)

    monkeypatch.setattr(os, "fsync", settles)
    monkeypatch.setattr(os, "replace", renames)
    WholeFiles().save_checkpoint(NEW, tmp_path / "last.ckpt")
    assert re.sub(r"[0-9a-f]{8}", "5f0c77a1", done.pop(0)) == f"{tmp_path}/last.ckpt.5f0c77a1.part"
    assert done == ["renamed", str(tmp_path)]


def test_what_a_killed_write_left_is_removed_too(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    others = {"last.ckpt.rank0.5f0c77a1.part", "newlast.ckpt.5f0c77a1.part", "last.ckpt.of mine.part"}
    for gone in (WholeFiles().remove_checkpoint, partial(WholeFiles().save_checkpoint, NEW)):
        WholeFiles().save_checkpoint(NEW, path)
        for name in ("last.ckpt.part", "last.ckpt.5f0c77a1.part", *others):
            (tmp_path / name).write_bytes(b"half")
        gone(path)
        assert {file.name for file in tmp_path.iterdir()} - {"last.ckpt"} == others
    WholeFiles().remove_checkpoint(path)
    WholeFiles().remove_checkpoint(path)
    WholeFiles().remove_checkpoint(tmp_path / "nowhere" / "last.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == others


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("at", ["open", "fsync"])
def test_a_write_that_was_given_up_and_goes_on_replaces_nothing(
    at: str, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its disk hung, and the next run has written to the same place since, or removed what was there."""
    hangs, there = Event(), Event()

    def hung(call: Any) -> Any:
        def hang(*arguments: Any) -> Any:
            done = call(*arguments)
            if threading.current_thread() is not threading.main_thread():
                hangs.set()
                assert there.wait(30.0)
            return done

        return hang

    if at == "open":
        monkeypatch.setattr(whole_files, "open", hung(open), raising=False)
    else:
        monkeypatch.setattr(os, "fsync", hung(os.fsync))
    path = tmp_path / "last.ckpt"
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(WholeFiles().save_checkpoint, OLD, path)
        assert hangs.wait(30.0)
        if removed:
            WholeFiles().remove_checkpoint(path)
        else:
            WholeFiles().save_checkpoint(NEW, path)
        there.set()
        old.result(30.0)
    assert removed or _loaded(path) == NEW["weights"].tolist()
    assert [file.name for file in tmp_path.iterdir()] == ([] if removed else ["last.ckpt"])
    assert caplog.messages == [f"a write to {path} comes to its end too late: what was done there since stays"]


class Theirs(TorchCheckpointIO):
    pass


def _kinds(io: Any) -> list[type[Any]]:
    inner = getattr(io, "checkpoint_io", None)
    return [type(io)] if inner is None else [type(io), *_kinds(inner)]


@pytest.mark.parametrize(
    ("plugins", "kinds"),
    [
        ([], [WholeFiles]),
        ([Theirs()], [Theirs]),
        ([AsyncCheckpointIO()], [AsyncCheckpointIO, WholeFiles]),
        ([AsyncCheckpointIO(TorchCheckpointIO())], [AsyncCheckpointIO, WholeFiles]),
        ([AsyncCheckpointIO(Theirs())], [AsyncCheckpointIO, Theirs]),
    ],
)
def test_strategies_write_so_unless_the_user_chose_another_way(plugins: list[Any], kinds: list[type[Any]]) -> None:
    t = trainer(1, max_epochs=1, plugins=plugins)
    t.fit(Lit(), loader(), loader(10, shuffle=False))
    assert _kinds(t.strategy.checkpoint_io) == kinds
