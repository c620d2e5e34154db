"""The module's torchmetrics go through the meetings too: by default they would gather on the default process group.

Between meetings a metric computes its own rank's value; at meetings that of all that live. After the run each metric
is as the user made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

Gather = Callable[[Tensor], list[Tensor]]


class LedMetrics:
    """The metrics of a module for the time of a run, but for those that the user gave a gathering of their own."""

    def __init__(self, module: nn.Module, gather: Gather, available: Callable[[], bool]) -> None:
        def gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
            return gather(state)

        self._before = [
            (metric, metric.distributed_available_fn)
            for metric in module.modules()
            if isinstance(metric, Metric) and metric.dist_sync_fn is None
        ]
        for metric, _ in self._before:
            metric.dist_sync_fn, metric.distributed_available_fn = gather_states, available

    def restore(self) -> None:
        """Put everything back. Idempotent."""
        while self._before:
            metric, available = self._before.pop()
            metric.dist_sync_fn, metric.distributed_available_fn = None, available
