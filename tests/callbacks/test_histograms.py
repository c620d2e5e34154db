"""Histograms go to the loggers that know them, in the form that each of them takes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_async.callbacks.histograms import MOST, _narrowed, _table, log_histogram

COUNTS = {0: 5, 1: 10, 4: 1}


def test_tensorboard() -> None:
    calls: list[tuple[Any, ...]] = []
    writer = SimpleNamespace(add_histogram_raw=lambda name, **raw: calls.append((name, raw)))
    log_histogram(SimpleNamespace(experiment=writer), "delay/histogram", COUNTS, 7)
    ((name, raw),) = calls
    assert name == "delay/histogram"
    assert (raw["num"], raw["sum"], raw["sum_squares"]) == (16, 14, 26)
    assert (raw["min"], raw["max"], raw["global_step"]) == (0, 4, 7)
    assert raw["bucket_counts"] == [5, 10, 1]
    assert raw["bucket_limits"] == [0.5, 2.5, 4.5]


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    class WandbLogger:
        """Has the name of the real one."""

        def __init__(self) -> None:
            self.logged: list[dict[str, Any]] = []
            self.experiment = SimpleNamespace(log=self.logged.append)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda np_histogram: np_histogram))
    logger = WandbLogger()
    log_histogram(logger, "delay/histogram", COUNTS, 7)
    values, edges = logger.logged[0]["delay/histogram"]
    assert len(edges) == len(values) + 1
    assert logger.logged[0]["trainer/global_step"] == 7


def test_the_others_are_left_alone() -> None:
    log_histogram(SimpleNamespace(), "delay/histogram", COUNTS, 7)
    log_histogram(SimpleNamespace(experiment=object()), "delay/histogram", COUNTS, 7)


@pytest.mark.parametrize("bins", [1, 2, 511, 512, 513, 768, 1024, 1025])
def test_wandb_takes_512_buckets(bins: int) -> None:
    values, edges = _table({3 * at: at + 1 for at in range(bins)})
    merged, kept = _narrowed(values, edges)
    assert len(merged) <= MOST
    assert len(kept) == len(merged) + 1
    assert sum(merged) == sum(values)
    assert (kept[0], kept[-1]) == (edges[0], edges[-1])
    for count, low, high in zip(merged, kept, kept[1:], strict=False):
        assert count == sum(at + 1 for at in range(bins) if low < 3 * at < high)
    if bins <= MOST:
        assert (merged, kept) == (values, edges)
