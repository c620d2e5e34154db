"""Whatever the method: where a replay is not as recorded, it ends, and names the member and the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, LazySignStrategy, SpeedFaults
from tests.cli import recorded
from tests.cli.runs import Said, copied, write
from tests.strategies.lit import trainer
from tests.strategies.ranks import run

KINDS: dict[str, Any] = {
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": CyclicDelayStrategy,
    "lazy_sign": LazySignStrategy,
}


def _fit(folder: str, name: str) -> None:
    L.seed_everything(7, verbose=False)
    pace = SpeedFaults(step_seconds=0.003, slow={1: 1.0 if name == "lazy_sign" else 3.0})
    trainer(2, strategy=KINDS[name](record=folder), callbacks=[pace], max_epochs=1).fit(recorded.Net())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", KINDS)
def test_the_first_difference_is_named(name: str, tmp_path: Path, said: Said) -> None:
    """Letters that were never taken, and another loss than the one that was noted."""
    run(2, _fit, str(tmp_path / "run"), name)

    logs = copied(tmp_path / "run", tmp_path / "deleted")
    index = [i for i, line in enumerate(logs[1]) if i and line[1] == "take"][3]
    step = sum(line[1] == "at" for line in logs[1][1:index])
    del logs[1][index]
    write(tmp_path / "deleted", logs)
    status, words = said(tmp_path / "deleted")
    assert status == 1, words
    assert f"first difference: member 1, behind step {step}: member 1 strays at event" in words

    logs = copied(tmp_path / "run", tmp_path / "flipped")
    batch = [line for line in logs[1][1:] if line[1] == "batch"][5]
    batch[2] *= 1 + 2**-20
    write(tmp_path / "flipped", logs)
    status, words = said(tmp_path / "flipped")
    assert status == 1, words
    assert f"first difference: member 1, step 6: its loss was {batch[2]!r} and is " in words
