"""Histograms go to the loggers that know them, in the form that each of them takes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_async.callbacks.histograms import log_histogram

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
