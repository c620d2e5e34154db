"""What a test leaves behind is caught and put right for the next one; and what the tests cost is told."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.strategies.ranks import run

LEAKS = """
import os, signal, subprocess, threading

def test_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()

def test_process():
    subprocess.Popen(["sleep", "30"])

def test_environment():
    os.environ["FORGOTTEN"] = "1"

def test_handler():
    signal.signal(signal.SIGTERM, lambda *_: None)

def test_put_right():
    assert "FORGOTTEN" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not os.listdir()

def test_files_stay_in_a_folder_of_their_own(monkeypatch):
    monkeypatch.setenv("FINE", "1")
    open("here", "w").close()
"""


def _pytest_in(folder: Path) -> str:
    os.chdir(folder)
    argv = ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", ".", "-rfE", "."]
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
    }.items():
        assert f"ERROR test_leaks.py::{name}" in output, output
        assert f"left behind: {sentence}" in output, output
    assert "6 passed, 4 errors" in output
    assert re.search(r"^ +\d+\.\d s +6 tests  \(top\)$", output, re.MULTILINE)
    assert not (tmp_path / "here").exists()
