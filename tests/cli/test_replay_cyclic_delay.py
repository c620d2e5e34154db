"""A cyclic run is replayed to the bit: whose push came when, and with which learning rate, is in its logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_async import CyclicDelayStrategy, SpeedFaults
from tests.cli import recorded
from tests.cli.runs import Said
from tests.strategies.lit import trainer
from tests.strategies.ranks import run


def _fit(n: int, folder: str, module: str, knobs: dict[str, Any], options: dict[str, Any]) -> None:
    L.seed_everything(7, verbose=False)
    faults = SpeedFaults(step_seconds=0.003, slow={n - 1: 3.0})
    strategy = CyclicDelayStrategy(record=folder, **knobs)
    trainer(n, strategy=strategy, callbacks=[faults], **options).fit(getattr(recorded, module)())


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("n", "module", "knobs", "options"),
    [
        (3, "Net", {"push": "gradient"}, {}),
        (2, "Plateau", {"push": "gradient", "token": "strict"}, {}),
        (2, "Unlike", {}, {}),
        (3, "Net", {"compensation": "lr", "scale": "delay", "strength": 2.0}, {}),
        (3, "Net", {"push": "gradient", "compensation": "dc", "max_accumulate": 3, "warm_up": 6}, {}),
        # the server hears of an epoch's rate in the last batch of the one before
        (2, "Epochs", {"push": "gradient"}, {"max_epochs": 3}),
    ],
)
def test_whatever_was_trained(
    n: int, module: str, knobs: dict[str, Any], options: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    run(n, _fit, n, str(tmp_path / "run"), module, knobs, options)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words
    assert re.search("the run is as recorded, to the bit", words)
