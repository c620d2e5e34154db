"""Torch's optimizers show it themselves: their steps with gradients, and with an eighth of them. Others go by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.scale_free import sees_no_factor

KINDS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and kind not in (torch.optim.Optimizer, torch.optim.LBFGS)  # which is refused
]


def _moved(kind: type[torch.optim.Optimizer], factor: float) -> Tensor:
    """By the tenth step: RAdam begins as SGD does."""
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = kind([p], lr=0.1)  # type: ignore[call-arg]
    source = torch.Generator().manual_seed(0)
    for _ in range(10):
        before = p.detach().clone()
        gradient = (1 + torch.rand(4, 4, generator=source)) * factor
        p.grad = gradient.to_sparse() if kind is torch.optim.SparseAdam else gradient
        optimizer.step()
    return p.detach() - before


@pytest.mark.parametrize("kind", KINDS)
def test_who_steps_as_far_with_smaller_gradients(kind: type[torch.optim.Optimizer]) -> None:
    alike = torch.allclose(_moved(kind, 0.125), _moved(kind, 1.0), rtol=1e-2)
    assert sees_no_factor(kind([nn.Parameter(torch.zeros(4, 4))], lr=0.1)) is alike  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["Lion", "AdamW8bit", "FusedLAMB", "Lamb", "SignSGD", "DAdaptAdam"])
def test_those_of_other_packages_are_told_by_their_names(name: str) -> None:
    bases = (torch.optim.Optimizer,)
    assert sees_no_factor(type(name, bases, {})([nn.Parameter(torch.ones(2))], {}))
    assert not sees_no_factor(type("Plain", bases, {})([nn.Parameter(torch.ones(2))], {}))
