"""Runs that are recorded for real, and their logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from lightning_async import SpeedFaults
from lightning_async.strategies.facts import digest
from tests.cli import recorded
from tests.strategies.lit import trainer
from tests.strategies.ranks import run

MODULES = "tests.cli.recorded:"
Said = Callable[..., tuple[int, str]]


def fit(n: int, folder: str, module: str, knobs: dict[str, Any], options: dict[str, Any], data: Any = None) -> str:
    """What each rank does; the digest of its last weights."""
    L.seed_everything(7, workers=module.startswith("Worked"), verbose=False)
    faults = SpeedFaults(step_seconds=0.003, slow={n - 1: 3.0})
    t = trainer(n, knobs={"record": folder, **knobs}, **{"callbacks": [faults], **options})
    t.fit(getattr(recorded, module)(), None if data is None else getattr(recorded, data)())
    return digest(t.strategy.replica.flat)  # type: ignore[attr-defined]


def record(
    folder: Path, n: int = 2, module: str = "Net", *, data: str | None = None, options: Any = None, **knobs: Any
) -> list[str]:
    """Record a run; the digest of each rank's last weights."""
    return run(n, fit, n, str(folder), module, knobs, options or {}, data)


def copied(folder: Path, to: Path, n: int = 2) -> dict[int, list[Any]]:
    """The lines of a run's logs, which are to be written to `to`."""
    to.mkdir()
    return {r: [json.loads(line) for line in (folder / f"rank{r}.jsonl").read_text().splitlines()] for r in range(n)}


def write(to: Path, logs: dict[int, list[Any]]) -> None:
    for rank, lines in logs.items():
        (to / f"rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
