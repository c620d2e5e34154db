"""Memory between two of one host: bodies come as they went, and nothing of it is left, whoever dies when."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async.transport import shared
from lightning_async.transport.gloo import Connection, Stood
from lightning_async.transport.shared import BODY_TAG, PLACES, SharedBodies, share

FORK = multiprocessing.get_context("fork")
FRAGMENT = 1 << 16


class End:
    """One end of a connection in this process, which counts what it carries."""

    def __init__(self) -> None:
        self.come: dict[int, deque[Tensor]] = {}
        self.changed = threading.Condition()
        self.carried: list[int] = []
        self.other: End

    def send(self, tensor: Tensor, tag: int) -> Any:
        self.carried.append(tag)
        with self.other.changed:
            self.other.come.setdefault(tag, deque()).append(tensor.clone())
            self.other.changed.notify_all()
        return shared.Written()

    def receive(self, tensor: Tensor, tag: int) -> Any:
        return Expected(self, tensor, tag)

    def stand(self, buffer: Tensor, tag: int) -> Any:
        return Stood(buffer, self.receive(buffer, tag))

    def cancel(self) -> None:
        pass


class Expected:
    def __init__(self, end: End, tensor: Tensor, tag: int) -> None:
        self.end, self.tensor, self.tag = end, tensor, tag

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        with self.end.changed:
            assert self.end.changed.wait_for(lambda: self.end.come.get(self.tag), 10.0)
            self.tensor.copy_(self.end.come[self.tag].popleft())
        return True


def ends() -> tuple[End, End]:
    a, b = End(), End()
    a.other, b.other = b, a
    return a, b


def shared_by(wanted: tuple[bool, bool] = (True, True), fragments: tuple[int, int] = (FRAGMENT, FRAGMENT)) -> Any:
    """Both ends of a connection, and what they became."""
    a, b = ends()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(share, e, fragment=f, wanted=w) for e, f, w in zip((a, b), fragments, wanted, strict=True)]
        return a, b, *(call.result(10.0) for call in calls)


def mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:lightning_async")


def test_bodies_go_through_memory_in_their_order() -> None:
    a, b, mine, theirs = shared_by()
    for there, here in ((mine, theirs), (theirs, mine)):
        for k in range(5):
            bodies = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in (FRAGMENT, FRAGMENT - 7 * k)]
            boxes = [torch.zeros_like(body) for body in bodies]
            works = [here.receive(box, BODY_TAG) for box in boxes]
            for body in bodies:
                there.send(body, BODY_TAG).wait()
            for work in works:
                work.wait()
            assert all(torch.equal(body, box) for body, box in zip(bodies, boxes, strict=True))
    assert BODY_TAG not in a.carried + b.carried
    mine.send(torch.ones(3), 1)
    box = torch.zeros(3)
    theirs.receive(box, 1).wait()
    assert torch.equal(box, torch.ones(3))


def test_memory_is_gone_with_the_last_that_has_it() -> None:
    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    _, _, mine, theirs = shared_by()
    assert mapped() == before + 4
    del mine
    assert mapped() == before + 2
    del theirs
    assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("wanted", [(False, True), (True, False), (False, False)])
def test_who_does_not_want_it_is_not_asked(wanted: tuple[bool, bool]) -> None:
    a, b, mine, theirs = shared_by(wanted)
    assert (mine, theirs) == (a, b)
    assert not mapped()


def test_members_that_cut_their_bodies_otherwise_use_the_network() -> None:
    a, b, mine, theirs = shared_by(fragments=(FRAGMENT, 2 * FRAGMENT))
    assert (mine, theirs) == (a, b)


@pytest.mark.parametrize("fault", ["another namespace", "another file", "not allowed", "no such kernel"])
def test_who_is_not_on_this_host_uses_the_network(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: dict[str, tuple[str, Callable[..., Any]]] = {
        "another namespace": ("stat", lambda path: os.stat_result([0, id(path) if "self" in path else 1, *[0] * 8])),
        "another file": ("pread", lambda *_: b"another token..."),
        "not allowed": ("open", lambda *_: (_ for _ in ()).throw(PermissionError())),
        "no such kernel": ("memfd_create", lambda *_: (_ for _ in ()).throw(OSError())),
    }
    files = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(shared.os, *faults[fault])
        a, b, mine, theirs = shared_by()
    assert (mine, theirs) == (a, b)
    assert not mapped()
    assert len(os.listdir("/proc/self/fd")) == files


class Piped:
    """A connection over a pipe between two processes."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    def send(self, tensor: Tensor, tag: int) -> Any:
        self.pipe.send(tensor.tolist())
        return shared.Written()

    def receive(self, tensor: Tensor, tag: int) -> Any:
        class Work:
            def wait(work, timeout: timedelta = timedelta()) -> bool:  # noqa: N805
                assert self.pipe.poll(30.0)
                tensor.copy_(torch.tensor(self.pipe.recv()))
                return True

        return Work()

    def stand(self, buffer: Tensor, tag: int) -> Any:
        return Stood(buffer, self.receive(buffer, tag))

    def cancel(self) -> None:
        pass


def _writes_for_ever(pipe: Pipe) -> None:
    way: Connection = share(Piped(pipe), fragment=FRAGMENT)
    assert isinstance(way, SharedBodies)
    pipe.send("shared")
    while True:
        way.send(torch.ones(FRAGMENT, dtype=torch.uint8), BODY_TAG)


def test_a_death_leaves_nothing(tmp_path: Path) -> None:
    """Killed while it writes, or while it has only offered."""
    named = set(os.listdir("/dev/shm"))
    for meets in (True, False):
        mine, theirs = FORK.Pipe()
        process = FORK.Process(target=_writes_for_ever, args=(theirs,))
        process.start()
        way: Any = None
        if meets:
            way = share(Piped(mine), fragment=FRAGMENT)
            assert mine.recv() == "shared"
            assert mapped() == 2
        else:
            assert mine.poll(30.0)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if meets:
            box = torch.zeros(FRAGMENT, dtype=torch.uint8)
            way.receive(box, BODY_TAG).wait()  # the memory of one that is dead can still be read
        assert set(os.listdir("/dev/shm")) == named
        del way
        assert not mapped()
        mine.close()
        theirs.close()


def test_there_are_as_many_places_as_fragments_on_their_way() -> None:
    from lightning_async.transport.line import WINDOW

    assert WINDOW == PLACES
