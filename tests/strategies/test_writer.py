"""Files that are written later are written in order, and a disk that hangs keeps neither a run nor its process."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from lightning_async.strategies.writer import Writer, path_in
from tests.strategies.ranks import FORK


def test_jobs_are_done_in_their_order_and_their_results_are_kept() -> None:
    writer, done = Writer(lambda: 30.0), list[int]()
    asked = [writer.submit(done.append, number) for number in range(20)]
    failed = writer.submit(lambda: 1 // 0)
    last = writer.submit(lambda: len(done))
    writer.shutdown()
    assert done == list(range(20))
    assert [one.result() for one in asked] == [None] * 20
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert last.result() == 20
    with pytest.raises(RuntimeError, match="behind the end of a run"):
        writer.submit(print)


def test_who_wrote_nothing_waits_for_nothing() -> None:
    Writer(lambda: 1e9).shutdown()


def test_a_file_that_hangs_is_named_and_what_waits_behind_it_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Also when the disk answers at last: by then nobody counts on what it would have done."""
    there, done = threading.Event(), list[str]()
    writer = Writer(lambda: 0.05)
    hangs = writer.submit(_save, {}, "x/last.ckpt", there)
    behind = [writer.submit(done.append, name) for name in ("main", "removed")]
    start = time.monotonic()
    writer.shutdown()
    assert time.monotonic() - start < 10.0
    assert caplog.messages[0].startswith("x/last.ckpt was not written within 0 s: look at its disk.")
    assert "(2 more)" in caplog.messages[0]
    assert all(one.cancelled() for one in behind)
    there.set()
    hangs.result(30.0)
    assert not done


def test_a_file_that_takes_long_is_named_and_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_async.strategies.writer.TELL", 0.01)
    monkeypatch.setattr("lightning_async.strategies.writer.LOOK", 0.01)
    there, writer = threading.Event(), Writer(lambda: 30.0)
    saved = writer.submit(_save, {}, Path("last.ckpt"), there)
    leaves = threading.Thread(target=writer.shutdown)
    leaves.start()
    while not caplog.messages:
        time.sleep(0.001)
    assert leaves.is_alive()
    there.set()
    leaves.join(30.0)
    assert saved.result() == "last.ckpt"
    assert caplog.messages[0].startswith("last.ckpt is still being written after 0 s: look at its disk.")


def test_an_accident_meanwhile_ends_the_wait() -> None:
    there, limit = threading.Event(), [1e9]
    writer = Writer(lambda: limit[0])
    writer.submit(_save, {}, "x", there)
    leaves = threading.Thread(target=writer.shutdown)
    leaves.start()
    limit[0] = 0.0
    leaves.join(30.0)
    assert not leaves.is_alive()
    there.set()


def test_a_process_ends_while_its_disk_hangs() -> None:
    """Python waits for all threads that are no daemons, and for those of its own executors."""
    process = FORK.Process(target=_ends_while_it_writes)
    process.start()
    process.join(30.0)
    assert process.exitcode == 0
    process.close()


def _ends_while_it_writes() -> None:
    writer = Writer(lambda: 0.05)
    writer.submit(threading.Event().wait)
    writer.shutdown()


def _save(checkpoint: object, path: str | Path, there: threading.Event) -> str:
    there.wait(30.0)
    return str(path)


@pytest.mark.parametrize(
    ("job", "path"),
    [
        (partial(_save, {"a": "b"}, "here"), "here"),
        (partial(_save, {}, path=Path("here")), "here"),
        (partial(print, partial(partial(_save, {}), "here")), "here"),
        (partial(partial(_save, {}, "here")), "here"),
        (partial(print, 3, None), ""),
        (print, ""),
    ],
)
def test_the_path_of_a_call(job: partial[object], path: str) -> None:
    assert path_in(job) == path
