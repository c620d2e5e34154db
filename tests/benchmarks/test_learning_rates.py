"""What is compared by learning rate: averages that are not late are `ddp`, and lateness takes no move away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sklearn.datasets  # noqa: F401  # imported first, it changes the environment
import torch
from torch import Tensor, nn

from benchmarks.accuracy import ddp
from benchmarks.learning_rates import averages_late
from benchmarks.tasks import Task, digits


class Slope(Task):
    """Its gradients are the same wherever they are taken."""

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        """Linear in the weights."""
        return 1e-4 * samples.float().mean() * torch.stack([p.sum() for p in model.parameters()]).sum()


def test_averages_without_lateness_are_ddp_but_for_rounding() -> None:
    task = replace(digits(), passes=1)
    assert averages_late(task, 3, 0).score.loss == pytest.approx(ddp(task, 3).score.loss, rel=1e-4)


@pytest.mark.parametrize("late", [1, 2, 5])
def test_late_moves_all_count_once(late: int) -> None:
    task = Slope(**{**vars(digits()), "passes": 1})
    assert averages_late(task, 3, late).score.loss == pytest.approx(ddp(task, 3).score.loss, rel=1e-5)
