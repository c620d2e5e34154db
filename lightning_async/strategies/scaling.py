"""A step that the gradient scaler of fp16 skips is counted and harms nobody: nothing moved, and the exchange goes on.

The rank's steps are counted by batches, so no ledger falls behind, and Adam's correction sees that no step was taken.
Each rank has a scale of its own. An optimizer that unscales in its own step (`fused=True`) is asked for each, and is
told on its device which to skip: that is read when somebody wants the number, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.optim import Optimizer

Steps = Sequence[Tensor | None]
"""Calls of an optimizer's step, each with what it was told of gradients that are not finite; not 0: it did nothing."""


class SkippedSteps:
    """How often an optimizer was asked for a step and its gradients were not finite."""

    def __init__(self) -> None:
        self._count = 0
        self._told: Tensor | None = None

    @property
    def count(self) -> int:
        """How often, by now."""
        if self._told is not None:
            self._count, self._told = self._count + int(self._told), None
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self._count, self._told = count, None

    @contextmanager
    def watch(self, plugin: Precision, optimizer: Optimizer) -> Iterator[None]:
        """Count if the optimizer does not step inside of this block. Without a scaler it always does."""
        if getattr(plugin, "scaler", None) is None:
            yield
            return
        with steps_of(optimizer) as steps:
            yield
        self._count += not steps
        for told in steps:
            if told is not None:
                skipped = (told > 0).sum()
                self._told = skipped if self._told is None else self._told + skipped


@contextmanager
def steps_of(optimizer: Optimizer) -> Iterator[Steps]:
    """A list that has one entry more for each call of the optimizer's step inside of this block."""
    steps: list[Tensor | None] = []
    hook = optimizer.register_step_post_hook(lambda one, *_: steps.append(getattr(one, "found_inf", None)))
    try:
        yield steps
    finally:
        hook.remove()


def has_stepped(steps: Steps) -> bool:
    """Whether one of them did something."""
    return any(told is None or not bool(told) for told in steps)


def scale_of(plugin: Precision) -> float:
    """By what fp16's scaler multiplies this rank's losses now; 1 without one."""
    scaler = getattr(plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
