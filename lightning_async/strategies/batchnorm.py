"""BatchNorm's statistics taken anew: at the end of a run, of the weights that are left, on the last batches seen.

What BatchNorm has gathered belongs to weights of the past, each rank's its own. With `buffers="reestimate"` every rank
runs the last few of its training batches forward once more, under the weights that the run ends with, and the
statistics of all ranks are averaged. Nothing is trained and nothing is logged by that. Checkpoints that were written
before hold averages.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_async.strategies.buffers import average_buffers
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

KEPT = 8  # batches


class Statistics:
    """The last batches, and what becomes of them."""

    def __init__(self) -> None:
        self._batches: deque[Any] = deque(maxlen=KEPT)

    def keep(self, batch: Any) -> None:
        """A batch was trained on."""
        self._batches.append(batch)

    def forget(self) -> None:
        """The run is over."""
        self._batches.clear()

    @torch.no_grad()
    def take_anew(self, module: LightningModule, step: Callable[..., Any], rounds: Rounds) -> Wait[None]:
        """Run `step` (the training step) on the batches, and give every member the mean of the statistics."""
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms if self._batches else ():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
        numbered = "batch_idx" in inspect.signature(module.training_step).parameters
        with _quiet(module):
            for index, batch in enumerate(self._batches):
                step(batch, *([index] if numbered else []))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        yield from average_buffers(module, rounds, weight=max(1, len(self._batches)))


@contextmanager
def _quiet(module: LightningModule) -> Iterator[None]:
    """The module's `log` does nothing: Lightning would refuse it where no loop runs."""
    names = ("log", "log_dict")
    for name in names:
        setattr(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
