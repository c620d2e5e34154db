"""A histogram for the loggers that know them; the others get the figures only."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any

MOST = 512
"""Buckets of a W&B histogram."""


def log_histogram(logger: Any, name: str, counts: Mapping[int, int], step: int) -> None:
    """Log how often each value came, where the logger can.

    TensorBoard's writer has `add_histogram_raw`; W&B's run has `log`, and its module makes the histogram. Neither is
    needed here: whoever has such a logger has its module.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_histogram_raw"):
        experiment.add_histogram_raw(name, **_raw(counts), global_step=step)
    elif type(logger).__name__ == "WandbLogger":
        histogram = import_module("wandb").Histogram(np_histogram=_narrowed(*_table(counts)))
        experiment.log({name: histogram, "trainer/global_step": step})


def _raw(counts: Mapping[int, int]) -> dict[str, Any]:
    """The sums and buckets that TensorBoard takes in place of every single value."""
    values, edges = _table(counts)
    return {
        "min": min(counts),
        "max": max(counts),
        "num": sum(counts.values()),
        "sum": sum(value * count for value, count in counts.items()),
        "sum_squares": sum(value**2 * count for value, count in counts.items()),
        "bucket_limits": edges[1:],
        "bucket_counts": values,
    }


def _narrowed(values: list[int], edges: list[float]) -> tuple[list[int], list[float]]:
    """The same with neighbours put together: W&B takes 512 buckets at most."""
    width = -(-len(values) // MOST)
    starts = range(0, len(values), width)
    return [sum(values[at : at + width]) for at in starts], [*(edges[at] for at in starts), edges[-1]]


def _table(counts: Mapping[int, int]) -> tuple[list[int], list[float]]:
    """Counts, and the edges around each value: one more of them."""
    ordered = sorted(counts)
    middles = [(a + b) / 2 for a, b in pairwise(ordered)]
    return [counts[value] for value in ordered], [ordered[0] - 0.5, *middles, ordered[-1] + 0.5]
