"""Q of a push: by the training loss since the last one, within its bounds, whatever the loss."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_async.strategies.quality import LEAST, Quality


def q(*losses: float) -> float:
    quality = Quality("train", dict)
    for loss in losses:
        quality.saw(torch.tensor(loss))
    return quality.now()


def test_it_is_e_to_minus_the_mean_loss_since_the_last_push() -> None:
    quality = Quality("train", dict)
    for loss in (0.5, 1.5):
        quality.saw({"loss": torch.tensor(loss)})
    assert quality.now() == pytest.approx(math.exp(-1.0))
    assert quality.now() == pytest.approx(math.exp(-1.0))  # nothing new
    quality.saw(torch.tensor(0.1))
    assert quality.now() == pytest.approx(math.exp(-0.1))


@pytest.mark.parametrize(
    ("loss", "counts"),
    [(-1.0, 1.0), (-1000.0, 1.0), (-math.inf, 1.0), (1000.0, LEAST), (math.inf, LEAST), (math.nan, LEAST)],
)
def test_any_loss_counts_between_a_little_and_1(loss: float, counts: float) -> None:
    assert q(loss) == counts
