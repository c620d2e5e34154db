"""A run with a service is replayed to the bit: the order of arrivals at each shard is in its logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_async import AsyncGlobalStrategy, SpeedFaults
from tests.cli import recorded
from tests.cli.runs import Said
from tests.strategies.lit import trainer
from tests.strategies.ranks import run


def _fit(n: int, folder: str, module: str, knobs: dict[str, Any], options: dict[str, Any]) -> None:
    L.seed_everything(7, verbose=False)
    faults = SpeedFaults(step_seconds=0.003, slow={n - 1: 1.0 if knobs.get("mode") == "sync" else 3.0})
    strategy = AsyncGlobalStrategy(record=folder, **knobs)
    trainer(n, strategy=strategy, callbacks=[faults], **options).fit(getattr(recorded, module)())


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("n", "module", "knobs", "options"),
    [
        (3, "Net", {}, {}),
        (2, "Plateau", {"wire": "bf16", "local_steps": 3, "outer_momentum": 0.5, "outer_lr": 0.7}, {}),
        (2, "Net", {"accuracy_weight": "train", "attenuation": "paper", "shards": 1}, {"accumulate_grad_batches": 2}),
        (2, "Net", {"accuracy_weight": "train_step", "on_late": "wait", "max_delay": 2}, {"precision": "bf16-true"}),
        (2, "Net", {"mode": "sync", "pace": 4}, {}),
    ],
)
def test_whatever_was_trained(
    n: int, module: str, knobs: dict[str, Any], options: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    run(n, _fit, n, str(tmp_path / "run"), module, knobs, options)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words
    assert re.search("the run is as recorded, to the bit", words)
