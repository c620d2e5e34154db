"""BatchNorm's statistics at the end: the mean of the ranks', taken anew of the last weights, or each rank's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async import SpeedFaults
from lightning_async.strategies.batchnorm import KEPT
from tests.strategies.lit import INPUTS, Lit, loader, trainer
from tests.strategies.ranks import run


class Remembers(Lit):
    """It remembers its batches, and how many there were when the training ended."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self.ended = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch[0].tolist())
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.ended = len(self.batches)


class NoNumber(Remembers):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


def _fit(buffers: str, kind: type[Remembers]) -> dict[str, Any]:
    torch.manual_seed(0)
    lit = kind()
    t = trainer(2, knobs={"buffers": buffers}, callbacks=[SpeedFaults(step_seconds=0.002, slow={1: 3.0})], max_epochs=1)
    t.fit(lit, loader(10), loader(40, shuffle=False))
    norm = lit.layer[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.momentum == 0.1
    assert "log" not in vars(lit)
    return {
        "weights": [p.detach().tolist() for p in lit.parameters()],
        "statistics": [b.tolist() for b in norm.buffers()],
        "before": lit.batches[: lit.ended],
        "after": lit.batches[lit.ended :],
    }


def anew(ends: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Mean and variance under the last weights, over the batches that were run after the end."""
    weight, bias = torch.tensor(ends[0]["weights"][0]), torch.tensor(ends[0]["weights"][1])
    hidden = [INPUTS[batch] @ weight.T + bias for end in ends for batch in end["after"]]
    return torch.stack([h.mean(0) for h in hidden]).mean(0), torch.stack([h.var(0) for h in hidden]).mean(0)


@pytest.mark.parametrize("kind", [Remembers, NoNumber])
def test_reestimated_statistics_are_those_of_the_last_weights(kind: type[Remembers]) -> None:
    ends = run(2, _fit, "reestimate", kind)
    mean, var = anew(ends)
    for end in ends:
        assert end["after"] == end["before"][-KEPT:]
        assert end["weights"] == ends[0]["weights"]
        assert end["statistics"] == ends[0]["statistics"]
        torch.testing.assert_close(torch.tensor(end["statistics"][0]), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(end["statistics"][1]), var, rtol=1e-5, atol=1e-5)


def test_averaged_statistics_are_equal() -> None:
    first, second = run(2, _fit, "average", Remembers)
    assert first["after"] == second["after"] == []
    assert first["statistics"] == second["statistics"]


def test_local_statistics_are_each_ranks_own() -> None:
    first, second = run(2, _fit, "local", Remembers)
    assert first["weights"] == second["weights"]
    assert first["statistics"] != second["statistics"]
