"""No test leaves anything behind: no thread, process, process group, signal handler, environment variable or file.

What a test forgot is put right where that is possible, and the test fails by name, not one that comes later.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is loaded: a process forked from one whose OpenMP threads have run hangs at its first matrix product, and
# several processes with a thread for every core each only get into each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
# torch asks the name service for the name behind each new socket, `::ffff:127.0.0.1` here, which no file of names has.
# A test needs no names but this host's, and a question that got lost would hold up all ranks for five seconds.
os.environ.setdefault("RES_OPTIONS", "attempts:0")
# What LightningCLI asks of jsonargparse is between the two of them.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# What torch has compiled is for all tests, whose temporary files each has for itself.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")

import pytest
import torch
import torch.distributed as dist

from benchmarks.store import Held

torch.set_num_threads(1)


def _end_with_the_parent() -> None:
    """Nothing that a test forks outlives the tests. torch asks for SIGINT, in the place of this SIGKILL, for what its
    launchers start: that has to end a rank too which is stuck where no handler of Python's runs, or under a shell that
    ignores it."""
    PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    PRCTL = ctypes.CDLL(None).prctl
    os.register_at_fork(after_in_child=_end_with_the_parent)

MOST_WORKERS = 8  # each loads torch and Lightning first
WORTH_TELLING = 30.0  # seconds of tests from which on their sum by folder is told
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
SYSTEMS = tempfile.gettempdir()
# Of torch and multiprocessing, whose processes leave them where they end by a signal or after a fork. `tmp`, an empty
# folder, is torch.distributed.nn's.
OTHERS_FILES = ("pymp-", "pytorch-errorfile-", "torchelastic_")
KNOWN_THREADS = ("TMonitor", "InductorSubproc", "pydevd", "_ChildProcessObserver")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: ranks wait more than they compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, MOST_WORKERS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The daily suite has cases of each kind; --thorough has every combination."""
    parser.addoption("--thorough", action="store_true", help="all cases of tests that are marked few(n)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases beyond the few, but where one is asked for by its name; skip what this machine cannot run."""
    if not config.getoption("thorough") and not any("[" in argument for argument in config.args):
        _keep_few(config, items)
    _skip(items)


def _keep_few(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    beyond: set[pytest.Item] = set()
    for mine in cases.values():
        marker = mine[0].get_closest_marker("few")
        n = marker.args[0] if marker else len(mine)
        kept = {round(k * (len(mine) - 1) / max(1, n - 1)) for k in range(n)}
        beyond.update(item for k, item in enumerate(mine) if k not in kept)
    if beyond:
        config.hook.pytest_deselected(items=[item for item in items if item in beyond])
        items[:] = [item for item in items if item not in beyond]


def _skip(items: list[pytest.Item]) -> None:
    reasons = {"gpu": None if torch.cuda.is_available() else "needs a CUDA device, and torch finds none"}
    reasons["forks"] = "Lightning forks nothing there with a build of torch for GPUs" if torch.version.cuda else None
    if any(item.get_closest_marker("netns") for item in items):
        from benchmarks.hosts import available

        reasons["netns"] = available()
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Set aside what is loaded by now: walking all of torch costs each later `gc.collect()` a tenth of a second."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of each folder cost, so that whoever adds to one sees it."""
    seconds, tests = Counter[str](), Counter[str]()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if isinstance(report, pytest.TestReport):
            parts = Path(report.nodeid.partition("::")[0]).parts
            room = parts[1] if len(parts) > 2 else "(top)"
            seconds[room] += report.duration
            tests[room] += report.when == "call"
    if sum(seconds.values()) > WORTH_TELLING:
        terminalreporter.section("seconds by folder (of all workers together)")
        for room, spent in seconds.most_common():
            terminalreporter.line(f"{spent:7.1f} s  {tests[room]:5} tests  {room}")


@pytest.fixture(autouse=True)
def port_of_its_own() -> Iterator[None]:
    """Lightning finds a free port long before it listens there: another worker of the suite may be given the same."""
    held = Held()
    os.environ["MASTER_PORT"] = str(held.port)
    yield
    os.environ.pop("MASTER_PORT", None)
    held.close()


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Compare the process before and after a test, which runs in a folder of its own.

    Lightning writes logs and checkpoints where it stands. (This fixture must not ask for `monkeypatch`: it would then
    look before that has put everything back.)
    """
    here = Path.cwd()
    aside = _set_aside_temporary_files()
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
        *(f"file {name}" for name in _files_in(aside)),
    ]
    if faults:
        for pid in _children_beside(children):
            os.kill(pid, signal.SIGKILL)
        pytest.fail("left behind: " + "; ".join(faults), pytrace=False)


def _set_aside_temporary_files() -> Path:
    """A folder for this test's temporary files, in the place of the system's; with a short path: sockets live there."""
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=SYSTEMS))
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def _files_in(folder: Path) -> list[str]:
    found = [path for path in folder.iterdir() if not path.name.startswith(OTHERS_FILES)]
    left = [
        path.name for path in found if not (path.name.startswith("tmp") and path.is_dir() and not any(path.iterdir()))
    ]
    shutil.rmtree(folder, ignore_errors=True)
    return left


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
    for pid in (pid for listed in Path("/proc/self/task").glob("*/children") for pid in _read(listed).split()):
        if _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] not in ([], ["Z"]):
            found[int(pid)] = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # it ended while we looked
        return ""


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
