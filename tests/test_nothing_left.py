"""What a test leaves behind is caught and put right for the next one; and what the tests cost is told."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not exported by name

from tests.strategies.ranks import Forked, run

LONG = 60.0
"""Seconds for which a rank would be stuck."""
LEAKS = """
import os, signal, subprocess, tempfile, threading

def test_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()

def test_process():
    subprocess.Popen(["sleep", "30"])

def test_environment():
    os.environ["FORGOTTEN"] = "1"

def test_handler():
    signal.signal(signal.SIGTERM, lambda *_: None)

def test_file():
    tempfile.mkstemp(prefix="forgotten")

def test_put_right():
    assert "FORGOTTEN" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not os.listdir() and not os.listdir(tempfile.gettempdir())

def test_files_stay_in_a_folder_of_their_own(monkeypatch):
    monkeypatch.setenv("FINE", "1")
    open("here", "w").close()
"""


def _pytest_in(folder: Path) -> str:
    os.chdir(folder)
    argv = ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", ".", "--basetemp", "base", "-rfE", "."]
    with redirect_stdout(io.StringIO()) as output:
        pytest.main(argv)
    return output.getvalue()


def test_leaks_are_caught(tmp_path: Path) -> None:
    source = Path(__file__).with_name("conftest.py").read_text()
    source = source.replace("GRACE = 5.0", "GRACE = 0.1").replace("TELLING = 30.0", "TELLING = 0.0")
    (tmp_path / "conftest.py").write_text(source)
    (tmp_path / "test_leaks.py").write_text(LEAKS)
    (output,) = run(1, _pytest_in, tmp_path)
    for name, sentence in {
        "test_thread": "thread forgotten",
        "test_process": "process ",
        "test_environment": "environment variable FORGOTTEN",
        "test_handler": "a handler of SIGTERM",
        "test_file": "file forgotten",
    }.items():
        assert f"ERROR test_leaks.py::{name}" in output, output
        assert f"left behind: {sentence}" in output, output
    assert "7 passed, 5 errors" in output
    assert re.search(r"^ +\d+\.\d s +7 tests  \(top\)$", output, re.MULTILINE)
    assert not (tmp_path / "here").exists()


def _launches(folder: Path) -> None:
    torch.multiprocessing.start_processes(_is_stuck, (folder,), nprocs=2, start_method="fork")


def _is_stuck(rank: int, folder: Path) -> None:
    """Where no handler of Python's runs, as under `ddp` in a collective that one rank alone has come to."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=LONG))
    (folder / str(os.getpid())).touch()
    store.get("what nobody says")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not hear that its parent is gone")
def test_no_rank_outlives_who_launched_it(tmp_path: Path) -> None:
    """Whoever kills the tests kills all: a SIGTERM to this process alone once left two ranks behind for minutes."""
    end = time.monotonic() + LONG / 2
    with Forked(1, _launches, tmp_path, store=True) as launcher:
        while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        launcher.signal(0, signal.SIGKILL)
        while any(map(_runs, pids)) and time.monotonic() < end:
            time.sleep(0.01)
        left = [pid for pid in pids if _runs(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2
    assert not left
