"""What goes against what is fresh counts less, what goes along with it in full: wherever something late is folded.

server      the last rank trains the other way, and little: what was merged lately goes with the first one
gossip      the last rank does not train: to the first one, all that comes of it is a step back
pipeline    steps far too large for their delay: when a gradient is applied, that of then already points back
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import (
    AdaptiveShrink,
    AsyncGlobalStrategy,
    CyclicDelayStrategy,
    DelayedPipelineStrategy,
    GossipRingStrategy,
    SpeedFaults,
)
from tests.strategies import piped
from tests.strategies.lit import trainer
from tests.strategies.ranks import run


class Slope(L.LightningModule):
    """A plane: each rank goes down its own way, for ever."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.slopes = slopes

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.slopes[self.global_rank] * self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


STRATEGIES: dict[str, Any] = {
    "async_global": lambda: AsyncGlobalStrategy(balance="equal"),
    "cyclic, gradients": lambda: CyclicDelayStrategy(balance="equal", push="gradient"),
    "cyclic, moves": lambda: CyclicDelayStrategy(balance="equal"),
    "pairwise": lambda: GossipRingStrategy(balance="equal"),
    "push_sum": lambda: GossipRingStrategy(balance="equal", mode="push_sum"),
}


def _slopes(method: str, slopes: list[float]) -> dict[str, float]:
    n = len(slopes)
    shrink, faults = AdaptiveShrink("alignment", healthy=0), SpeedFaults(step_seconds=0.001, slow={n - 1: 4.0})
    t = trainer(n, strategy=STRATEGIES[method](), callbacks=[shrink, faults], max_epochs=1)
    t.fit(Slope(slopes), DataLoader(TensorDataset(torch.zeros(240, 1))))  # 120 batches of each: time enough to meet
    return shrink.figures


@pytest.mark.few(1)
@pytest.mark.parametrize("method", STRATEGIES)
def test_what_goes_against_the_fresh_is_shrunk(method: str) -> None:
    """The sender is named; to who does not move, nothing goes against anything."""
    against = 0.0 if method in ("pairwise", "push_sum") else -0.1
    found, other = run(2, _slopes, method, [1.0, against])
    assert found == other
    assert found["count"] > 0
    assert found["from1/min"] < 1
    if against == 0.0:
        assert found["from0/min"] == 1


@pytest.mark.few(0)
@pytest.mark.parametrize("method", ["async_global", "cyclic, gradients", "cyclic, moves"])
def test_what_goes_along_with_the_fresh_is_not(method: str) -> None:
    found = run(2, _slopes, method, [1.0, 0.1])[0]
    assert found["count"] > 0
    assert found["min"] == found["mean"] == 1


def _steps(lr: float, semantics: Any) -> tuple[dict[str, float], list[str]]:
    shrink = AdaptiveShrink("alignment")
    strategy = DelayedPipelineStrategy(stages="net", semantics=semantics)
    t = piped.trainer(3, strategy=strategy, callbacks=[shrink], max_epochs=1)
    same = TensorDataset(piped.INPUTS[:8].repeat(60, 1), piped.TARGETS[:8].repeat(60, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(piped.Piped(lr=lr, dropout=0.0), DataLoader(same, 8), piped.loader(20))
    said = [str(warning.message) for warning in caught if "AdaptiveShrink" in str(warning.message)]
    return shrink.figures, said


@pytest.mark.few(0)
def test_in_a_pipeline_it_goes_by_whether_late_gradients_still_point_where_fresh_ones_do() -> None:
    ends = {lr: run(3, _steps, lr, "stash")[0] for lr in (0.001, 0.3)}
    (calm, said), (hasty, _) = ends.values()
    assert not said
    assert calm["count"] == hasty["count"] > 100
    assert calm["min"] == 1
    assert hasty["min"] < 0.9


@pytest.mark.few(0)
def test_where_a_pipeline_shows_nothing_fresh_it_says_so() -> None:
    ends = run(3, _steps, 0.3, "recompute")
    assert ends[0][0]["min"] == 1
    for said in (ends[rank][1] for rank in (1, 2)):  # rank 0 holds the last stage, where nothing is late
        assert len(said) == 1
        assert "law='alignment' compares with what is fresh, and here is nothing" in said[0]
