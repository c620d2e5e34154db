"""A step that the gradient scaler of fp16 skips is counted and harms nobody: nothing moved, and the exchange goes on.

The rank's steps are counted by batches, so no ledger falls behind, and Adam's correction sees that no step was taken.
Each rank has a scale of its own. An optimizer that unscales in its own step (`fused=True`) hides what it skips.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer


class SkippedSteps:
    """How often an optimizer was asked for a step and its gradients were not finite."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def watch(self, plugin: Precision, optimizer: Optimizer) -> Iterator[None]:
        """Count if the optimizer does not step inside of this block. Without a scaler it always does."""
        if getattr(plugin, "scaler", None) is None:
            yield
            return
        with steps_of(optimizer) as stepped:
            yield
        self.count += not stepped


@contextmanager
def steps_of(optimizer: Optimizer) -> Iterator[list[bool]]:
    """A list that has one entry more for each step the optimizer takes inside of this block."""
    stepped: list[bool] = []
    hook = optimizer.register_step_post_hook(lambda *_: stepped.append(True))
    try:
        yield stepped
    finally:
        hook.remove()


def scale_of(plugin: Precision) -> float:
    """By what fp16's scaler multiplies this rank's losses now; 1 without one."""
    scaler = getattr(plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
