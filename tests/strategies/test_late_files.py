"""A main file that is written later names only what is there; every wait for the others has an end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_async.strategies import compat
from lightning_async.strategies.late_files import LEAVE_FAILED, MOST, LateFiles
from lightning_async.strategies.writer import Writer

SAVE = "5f0c"


class Notes(CheckpointIO):
    """Remembers what it was asked to write."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.error: Exception | None = None

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.error is not None:
            raise self.error
        self.written.append(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        raise FileNotFoundError

    def remove_checkpoint(self, path: Any) -> None:
        self.written.remove(path)


class Board:
    """Rank 0's view of a run of two: the first word stays."""

    me, failed = 0, None

    def __init__(self) -> None:
        self.words: dict[str, bytes] = {}
        self.here = (0, 1)
        self.asked = 0

    def propose(self, key: str, value: bytes) -> None:
        self.words.setdefault(key, value)

    def decided(self, key: str) -> bytes | None:
        self.asked += 1
        return self.words.get(key)

    def members(self) -> tuple[int, ...]:
        return self.here


class Place(SimpleNamespace):
    """What is asked of the office."""

    @property
    def fails(self) -> bool:
        return self.flags.failed is not None


class Rank:
    """Rank 0 has written its part, and asks for the main file and for the removal of an older one."""

    def __init__(self, limit: float = 30.0) -> None:
        self.inner, self.board = Notes(), Board()
        self.io = AsyncCheckpointIO(self.inner)
        office = Place(carrier=self.board, limit=limit, is_open=True, flags=SimpleNamespace(failed=None))
        self.late = LateFiles(cast(Any, SimpleNamespace(checkpoint_io=self.io, office=office)))
        self.flags = office.flags

    def saves(self, save: str = SAVE, old: str = "old") -> None:
        self.io.save_checkpoint({}, old)
        self.io.save_checkpoint({}, "own")
        self.late.tell(save)
        self.late.write_main(save, (0, 1), lambda: self.io.save_checkpoint({}, "main"))
        self.late.queued()
        self.late.behind(lambda: self.inner.remove_checkpoint(old))

    def finish(self) -> BaseException | None:
        return _end(self.late.finish())


def _end(waiting: Iterator[Any]) -> Any:
    while True:
        try:
            next(waiting)
        except StopIteration as end:
            return end.value


@pytest.fixture
def rank() -> Iterator[Rank]:
    one = Rank()
    yield one
    one.late.leave()
    one.io._error = None
    one.io.teardown()


def _says(rank: Rank, word: bytes) -> None:
    rank.board.propose(f"written/{SAVE}/1", word)


def test_the_main_file_comes_behind_the_word_of_all(rank: Rank) -> None:
    rank.saves()
    while rank.board.asked < 2:
        time.sleep(0.001)
    assert rank.inner.written == ["old", "own"]
    _says(rank, b"+")
    assert rank.finish() is None
    assert rank.inner.written == ["own", "main"]


def test_who_died_has_no_file_to_wait_for(rank: Rank) -> None:
    rank.saves()
    rank.board.here = (0,)
    assert rank.finish() is None
    assert rank.inner.written == ["own", "main"]
    assert rank.board.words[f"written/{SAVE}/1"] == b"-"


def test_where_another_rank_could_not_write_all_stays_as_it_is(rank: Rank) -> None:
    _says(rank, b"OSError: no space")
    rank.saves()
    assert rank.finish() is None, "that rank tells it"
    assert rank.inner.written == ["old", "own"]


def test_where_this_rank_could_not_write_all_stays_as_it_is(rank: Rank) -> None:
    _says(rank, b"+")
    rank.io.save_checkpoint({}, "before")
    _end(rank.late.finish())
    rank.inner.error = OSError("no space")
    with suppress(OSError):  # Lightning raises it as soon as it can
        rank.saves()
    assert rank.finish() is rank.inner.error
    rank.late.tell("another")
    rank.finish()
    assert rank.board.words["written/another/0"] == b"OSError: no space"
    assert rank.inner.written == ["before"]


def test_who_says_nothing_is_waited_for_as_long_as_a_meeting_may_take() -> None:
    rank = Rank(limit=0.05)
    rank.saves()
    trouble = rank.finish()
    assert isinstance(trouble, TimeoutError)
    assert str(trouble) == "rank 1 did not say that its part of the checkpoint is written"
    assert rank.inner.written == ["old", "own"]
    rank.io.teardown()


def test_who_hangs_is_named_in_the_log_while_all_train_on(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Now and then, and not at every look."""
    monkeypatch.setattr("lightning_async.strategies.late_files.TELL", 0.01)
    rank.saves()
    while not caplog.messages or rank.board.asked < 5:
        time.sleep(0.001)
    _says(rank, b"+")
    assert rank.finish() is None
    assert len(caplog.messages) < rank.board.asked
    assert caplog.messages[0].startswith("rank 1 has not written its part of a checkpoint for 0 s: look at its disk.")
    assert rank.inner.written == ["own", "main"]


def test_a_run_that_failed_waits_for_nobody(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.strategies.late_files.LEAVE_FAILED", 0.01)
    rank.saves()
    rank.flags.failed = "rank 0 stopped"
    rank.late.leave()
    assert rank.finish() is None
    assert rank.inner.written == ["old", "own"]


def test_who_waits_for_its_own_disk_is_told_for_which_file(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of a run, and of one that ended well for as long as a meeting may take."""
    monkeypatch.setattr("lightning_async.strategies.late_files.TELL", 0.01)
    monkeypatch.setattr("lightning_async.strategies.late_files.GLANCE", 0.02)
    rank, there = Rank(limit=0.2), Event()
    compat.let_write(rank.io, Writer(rank.late.patience))
    compat.in_its_thread(rank.io, partial(_written_when, there, "own"))
    while not compat.being_written(rank.io):  # its thread may take a while to begin
        time.sleep(0.001)
    waiting = rank.late.finish()
    while not caplog.messages:
        next(waiting)
    assert caplog.messages[0].startswith("rank 0 waits for own to be written, for 0 s by now and 0 s at most: look at")
    assert rank.late.patience() == 0.2
    caplog.clear()
    rank.late.leave()
    assert caplog.messages
    assert rank.late.patience() == LEAVE_FAILED
    there.set()
    rank.io.teardown()


def _written_when(there: Event, path: str) -> None:
    there.wait(30.0)


def test_where_a_disk_hangs_the_next_save_waits_behind_the_fourth(rank: Rank, caplog: pytest.LogCaptureFixture) -> None:
    """Each that is not written yet holds all of its tensors in memory. Rank 1's disk hangs."""
    for number in range(MOST):
        assert not list(rank.late.room())
        rank.saves(f"save{number}", old=f"old{number}")
    assert not caplog.messages
    waiting = rank.late.room()
    assert next(waiting) == next(waiting) == "one of the 4 checkpoints that wait in memory to be written"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "4 checkpoints wait in memory to be written: look at the disks. This save waits"
    )
    rank.board.propose("written/save0/1", b"+")
    _end(waiting)
    assert next(rank.late.room(), None) is None
    assert "main" in rank.inner.written
    for number in range(MOST):
        rank.board.propose(f"written/save{number}/1", b"+")


def test_who_waits_for_a_disk_hears_that_a_write_went_wrong(rank: Rank) -> None:
    for number in range(MOST):
        rank.saves(f"save{number}", old=f"old{number}")
    waiting = rank.late.room()
    next(waiting)
    rank.late._stuck = TimeoutError("rank 1 did not say that its part of the checkpoint is written")
    assert _end(waiting) is None, "the save that follows says it to all"


def test_without_a_late_writer_all_is_done_at_once() -> None:
    rank = Rank()
    rank.late._strategy.checkpoint_io = rank.inner
    for name in ("own", "main"):
        rank.late.write_main(SAVE, (0, 1), lambda name=name: rank.inner.save_checkpoint({}, name))
    rank.late.behind(lambda: rank.inner.remove_checkpoint("own"))
    assert rank.inner.written == ["main"]
