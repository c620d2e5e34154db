"""A run that is recorded once for all tests here, and the command that replays it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_async.cli import main
from tests.cli.runs import MODULES, Said, record


@pytest.fixture(scope="session")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with nothing special, in which each step exchanges."""
    folder = tmp_path_factory.mktemp("runs") / "17"
    record(folder, period=1)
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What the command says, and its exit status."""

    def replay(folder: Path, *argv: str, module: str = "Net") -> tuple[int, str]:
        status = main(["replay", str(folder), "--module", MODULES + module, *argv])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return replay
