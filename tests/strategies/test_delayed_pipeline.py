"""A pipelined run in the Trainer is the simulator's, to the bit; with one stage it is plain training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.strategies.piped import Piped, loader, trainer, weights
from tests.strategies.ranks import run


def _fit(devices: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    lit = Piped(**module)
    t = trainer(devices, knobs=knobs, **options)
    t.fit(lit, loader(shuffle=True), loader(20))
    return {
        "weights": weights(lit),
        "losses": lit.losses,
        "metrics": {key: float(value) for key, value in t.callback_metrics.items()},
        "step": t.global_step,
        "delays": [a.delay for a in t.strategy.arrivals()],
    }


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_all_ranks_end_equal(devices: int) -> None:
    ends = run(devices, _fit, devices, {}, {}, {})
    for end in ends[1:]:
        assert end["weights"] == ends[0]["weights"]
        assert end["metrics"] == ends[0]["metrics"]
        assert end["step"] == ends[0]["step"] == 16
    assert len(ends[0]["losses"]) == 16
    assert ends[-1]["losses"] == []
    assert ends[0]["losses"][-1] < ends[0]["losses"][0]
