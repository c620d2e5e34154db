"""The module's torchmetrics go through the meetings too: by default they would gather on the default process group.

Between meetings a metric computes its own rank's value; at meetings that of all that live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

Gather = Callable[[Tensor], list[Tensor]]


def lead_metrics(module: nn.Module, gather: Gather, available: Callable[[], bool]) -> None:
    """Give every metric of `module` our gathering, but for those that the user gave one of their own."""

    def gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
        return gather(state)

    for metric in module.modules():
        if isinstance(metric, Metric) and (metric.dist_sync_fn is None or hasattr(metric.dist_sync_fn, "ours")):
            gather_states.ours = True  # type: ignore[attr-defined]  # so that the next run may replace it
            metric.dist_sync_fn = gather_states
            metric.distributed_available_fn = available
