"""No test leaves anything behind: no thread, process, process group, signal handler, environment variable or file.

What a test forgot is put right where that is possible, and the test fails by name, not one that comes later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is loaded: a process forked from one whose OpenMP threads have run hangs at its first matrix product, and
# several processes with a thread for every core each only get into each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
# What LightningCLI asks of jsonargparse is between the two of them.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)

GRACE = 5.0  # seconds in which a thread or a process that is on its way out may go
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGCONT]
# Set by Lightning and torch for the processes they start, and never taken back by them.
OURS_TO_RESTORE = (
    "MASTER_",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "RANK",
    "PL_",
    "POPLAR_",
    "TORCH",
    "KINETO",
    "TRITON",
)
# They serve a whole process on purpose: the bookkeeper and the nursery of `multiprocessing`, the compile pool of torch.
HOUSEKEEPING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch._inductor.compile_worker")
# Lightning's observer of popen children looks every 5 s whether it may end.
KNOWN_THREADS = ("TMonitor", "InductorSubproc", "pydevd", "_ChildProcessObserver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with a sentence."""
    reasons = {"gpu": None if torch.cuda.is_available() else "needs a CUDA device, and torch finds none"}
    if any(item.get_closest_marker("netns") for item in items):
        from benchmarks.hosts import available

        reasons["netns"] = available()
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Compare the process before and after a test, which runs in a folder of its own.

    Lightning writes logs and checkpoints where it stands. (This fixture must not ask for `monkeypatch`: it would then
    look before that has put everything back.)
    """
    here = Path.cwd()
    threads, children = set(threading.enumerate()), _children()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    environment = dict(os.environ)
    os.chdir(tmp_path)
    yield
    os.chdir(here)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # Lightning itself leaves it for the end of the process
    faults = [
        *(f"thread {name}" for name in _settled(lambda: _threads_beside(threads))),
        *(f"process {name}" for name in _settled(lambda: list(_children_beside(children).values()))),
        *_restore_handlers(handlers),
        *_restore_environment(environment),
    ]
    if faults:
        for pid in _children_beside(children):
            os.kill(pid, signal.SIGKILL)
        pytest.fail("left behind: " + "; ".join(faults), pytrace=False)


def _settled(look: Callable[[], list[str]]) -> list[str]:
    end = time.monotonic() + GRACE
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def _threads_beside(before: set[threading.Thread]) -> list[str]:
    new = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    return [thread.name for thread in new if not f"{type(thread).__name__} {thread.name}".startswith(KNOWN_THREADS)]


def _children() -> dict[int, str]:
    """This process's living children and what they run; nothing where there is no /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (OSError, ValueError):  # it ended while we looked
            continue
    return found


def _children_beside(before: dict[int, str]) -> dict[int, str]:
    new = {pid: command for pid, command in _children().items() if pid not in before}
    return {pid: f"{pid} ({c[:80]})" for pid, c in new.items() if not any(known in c for known in HOUSEKEEPING)}


def _restore_handlers(before: dict[signal.Signals, object]) -> list[str]:
    changed = [number for number, handler in before.items() if signal.getsignal(number) != handler]
    for number in changed:
        signal.signal(number, before[number])  # type: ignore[arg-type]
    return [f"a handler of {number.name}" for number in changed]


def _restore_environment(before: dict[str, str]) -> list[str]:
    now = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    then = {name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"}
    changed = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    for name in changed:
        if name in then:
            os.environ[name] = then[name]
        else:
            os.environ.pop(name, None)
    return [f"environment variable {name}" for name in changed if not name.startswith(OURS_TO_RESTORE)]


if sys.platform == "win32":  # the carriers, the faults and these checks are for POSIX systems
    collect_ignore_glob = ["*"]
