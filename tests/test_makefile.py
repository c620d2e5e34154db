"""`make` installs where another torch is asked for than last time, and is fast where it is the same."""

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
        (OLDER, None, True),
        (PINNED, ELSEWHERE, True),
        (ELSEWHERE, ELSEWHERE, False),
    ],
)
def test_the_torch_that_is_asked_for_is_tested(tmp_path: Path, last: str, now: str | None, installs: bool) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").write_text(last)
    said = _make("-n", "test", *([] if now is None else [f"TORCH={now}"]))
    assert (f"-m pip install --disable-pip-version-check {now or PINNED}" in said) == installs
    assert "-m pytest" in said


def _make(*arguments: str) -> str:
    """In this folder, and as a shell would: the suite's own `make` hands on its variables."""
    inherited = ("MAKE", "MFLAGS", "TORCH", "GNUMAKEFLAGS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    done = subprocess.run(["make", *arguments], env=env, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout
