"""`make` installs where another torch is asked for than last time, and leaves what is there where none is named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINNED = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
OLDER, ELSEWHERE = "torch==2.11.0", f"{PINNED} --index-url 'https://torch.example/cpu'"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("last", "now", "installs"),
    [
        ("", None, False),
        (PINNED, None, False),
        ("", OLDER, True),
        (PINNED, OLDER, True),
        (OLDER, OLDER, False),
        (OLDER, None, False),
        (OLDER, PINNED, True),
        (PINNED, ELSEWHERE, True),
        (ELSEWHERE, ELSEWHERE, False),
        (ELSEWHERE, None, False),
    ],
)
def test_the_torch_that_is_asked_for_is_tested(tmp_path: Path, last: str, now: str | None, installs: bool) -> None:
    _copy(tmp_path, last)
    said = _make(tmp_path, *([] if now is None else [f"TORCH={now}"]))
    assert (f"-m pip install --disable-pip-version-check {now or PINNED}" in said) == installs
    assert installs or "pip install" not in said
    assert "-m pytest" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("last", "wanted", "kept"), [("", PINNED, ""), (OLDER, OLDER, OLDER), (ELSEWHERE,) * 3])
def test_what_the_project_needs_may_change_and_the_torch_that_was_chosen_stays(
    tmp_path: Path, last: str, wanted: str, kept: str
) -> None:
    _copy(tmp_path, last)
    os.utime(tmp_path / ".venv" / ".chosen", (0, 0))  # older than pyproject.toml
    said = _make(tmp_path)
    assert f"-m pip install --disable-pip-version-check {wanted}\n" in said
    assert f"printf '%s\\n' {_quoted(kept)} > .venv/.chosen" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("half", [True, False])
def test_what_could_not_be_created_is_created_the_next_time(tmp_path: Path, half: bool) -> None:
    """Debian's `venv` without python3-venv links a Python, and ends before that has a pip."""
    _copy(tmp_path, "")
    os.utime(tmp_path / ".venv" / ".chosen", (0, 0))
    if half:
        (tmp_path / ".venv" / "bin").mkdir()
        (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/false")
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\n[ "$1" = -m ] && mkdir -p .venv/bin && exit 1\nexit 0\n')
    broken.chmod(0o755)
    done = _call(tmp_path, f"PYTHON={broken}")
    assert done.returncode != 0
    assert "== creating .venv" in done.stdout
    assert "installing" not in done.stdout
    assert not (tmp_path / ".venv").exists()


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _copy(folder: Path, last: str) -> None:
    """What `make` goes by, where this torch was chosen last time."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".chosen").write_text(last)


def _make(folder: Path, *arguments: str) -> str:
    """What `make test` would do there."""
    done = _call(folder, "-n", *arguments)
    done.check_returncode()
    return done.stdout


def _call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a shell would call it: the suite's own `make` hands on its variables."""
    inherited = ("MAKE", "MFLAGS", "TORCH", "GNUMAKEFLAGS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    command = ["make", "-C", str(folder), "test", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
