"""A run whose late contributions were shrunk by a callback: its factors are in the log, and the replay needs no law."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_async import AdaptiveShrink, AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, SpeedFaults
from tests.cli import recorded
from tests.cli.runs import Said, copied, write
from tests.strategies.lit import trainer
from tests.strategies.ranks import run


def _fit(folder: str, kind: Any, knobs: dict[str, Any], law: Any) -> None:
    L.seed_everything(7, verbose=False)
    shrink = AdaptiveShrink(law, healthy=0, **({"rate": 0.3} if law == "inverse" else {}))
    callbacks = [SpeedFaults(step_seconds=0.003, slow={1: 4.0}), shrink]
    t = trainer(2, strategy=kind(record=folder, **knobs), callbacks=callbacks)
    t.fit(recorded.Net())


def factors(logs: dict[int, list[Any]]) -> list[list[Any]]:
    """The lines that have one, each with its factor last."""
    return [line for lines in logs.values() for line in lines[1:] if line[1] in ("factor", "counts")]


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("kind", "knobs", "law"),
    [
        (GossipRingStrategy, {"period": 1}, "inverse"),
        (GossipRingStrategy, {"mode": "push_sum", "period": 1, "wire": "bf16"}, "alignment"),
        (AsyncGlobalStrategy, {"local_steps": 1}, "inverse"),
        (AsyncGlobalStrategy, {"local_steps": 2, "attenuation": "paper"}, "stability"),
        (GossipRingStrategy, {"period": 1, "at_meeting": "keep"}, "relative"),
        (CyclicDelayStrategy, {}, "inverse"),
        (CyclicDelayStrategy, {"push": "gradient"}, "stability"),
    ],
)
def test_whatever_was_shrunk(kind: Any, knobs: dict[str, Any], law: str, tmp_path: Path, said: Said) -> None:
    run(2, _fit, str(tmp_path / "run"), kind, knobs, law)
    status, words = said(tmp_path / "run")
    assert status == 0, words
    assert "the run is as recorded, to the bit" in words
    logs = copied(tmp_path / "run", tmp_path / "copy")
    written = factors(logs)
    assert all(0 < line[-1] <= 1 for line in written)
    less = [line for line in written if line[-1] < 1]
    if law == "relative" and not less:
        return  # all delays were usual
    less[0][-1] /= 2
    write(tmp_path / "copy", logs)
    status, words = said(tmp_path / "copy")
    assert status == 1
    assert re.search("first difference: member [01], ", words)


@pytest.mark.few(0)
def test_a_factor_for_nothing_that_came_is_named(tmp_path: Path, said: Said) -> None:
    run(2, _fit, str(tmp_path / "run"), AsyncGlobalStrategy, {"local_steps": 1}, "inverse")
    logs = copied(tmp_path / "run", tmp_path / "copy")
    line = next(line for line in factors(logs) if line[1] == "counts")
    line[2] = 5
    write(tmp_path / "copy", logs)
    status, words = said(tmp_path / "copy")
    assert status == 1
    said = r"the log has factors \[\[5, \d+, [\d.]+\].* for letter \d+ of its service, the replay factor\(\d, \d+\)"
    assert re.search(said, words), words
