"""Every logger gets the same figures, under names that all of them take; both bars show those that are selected."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger

from lightning_async import AdaptiveShrink, DelayedPipelineStrategy, DelayStats, SpreadStats, TrafficStats
from lightning_async.strategies import STRATEGIES
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

NAME = re.compile(r"[\w.\- ]+(/[\w.\- ]+)*", re.ASCII)
"""What MLflow takes, the strictest of all; slashes make groups in TensorBoard and W&B."""


class Writer:
    """The part of TensorBoard's `SummaryWriter` that knows histograms, with its parameters."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str, int, list[float], list[int], int | None]] = []

    def add_histogram_raw(
        self,
        tag: str,
        min: float,
        max: float,
        num: int,
        sum: float,
        sum_squares: float,
        bucket_limits: list[float],
        bucket_counts: list[int],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        self.drawn.append((tag, num, bucket_limits, bucket_counts, global_step))


class Diary(Logger):
    """Keeps what it gets."""

    def __init__(self, experiment: Any = None) -> None:
        super().__init__()
        self.told: list[tuple[dict[str, float], int | None]] = []
        self._experiment = experiment

    @property
    def experiment(self) -> Any:
        return self._experiment

    @property
    def name(self) -> str:
        return "diary"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told.append((dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Not of interest."""


class Shown(Callback):
    """What the bar shows in the end."""

    def __init__(self) -> None:
        self.bar: dict[str, Any] = {}

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.bar = trainer.progress_bar_callback.get_metrics(trainer, module)


def _logged(folder: str, bar: type[Callback]) -> dict[str, Any]:
    stats = [DelayStats(folder=folder), TrafficStats(folder=folder), SpreadStats(depth=1, every=None, folder=folder)]
    stats.append(AdaptiveShrink(healthy=0, folder=folder))
    shown, diaries = Shown(), [Diary(), Diary(Writer())]
    t = trainer(2, callbacks=[*stats, bar(), shown], logger=diaries, enable_progress_bar=True)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    ours = [
        [(told, step) for told, step in diary.told if any(name.split("/")[0] in GROUPS for name in told)]
        for diary in diaries
    ]
    return {
        "told": ours,
        "drawn": diaries[1].experiment.drawn,
        "bar": shown.bar,
        "figures": {one.group: one.figures for one in stats},
    }


GROUPS = ("delay", "shrink", "traffic", "spread")


@pytest.mark.few(1)
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_every_logger_and_both_bars(bar: type[Callback], tmp_path: Any) -> None:
    if bar is RichProgressBar:
        pytest.importorskip("rich")
    first, second = run(2, _logged, str(tmp_path), bar)
    one, other = first["told"]
    assert one == other
    assert second["told"] == [[], []]  # rank 0 logs for all
    steps = [step for _, step in one]
    assert steps == sorted(steps)
    for told, _ in one:
        assert len({name.split("/")[0] for name in told}) == 1
        assert all(NAME.fullmatch(name) for name in told)
        assert all(math.isfinite(value) for value in told.values())
    for group, figures in first["figures"].items():
        newest = [told for told, _ in one if next(iter(told)).startswith(f"{group}/")][-1]
        assert newest == {f"{group}/{name}": value for name, value in figures.items() if math.isfinite(value)}
    for tag, num, limits, counts, step in first["drawn"]:
        assert (tag, num, len(limits)) == ("delay/histogram", sum(counts), len(counts))
        assert step in steps
    assert first["drawn"][-1][1] == first["figures"]["delay"]["folded"] + first["figures"]["delay"]["shrunk"]
    for name in ("delay/p95", "delay/straggler", "shrink/mean", "traffic/bytes_sent", "spread/relative"):
        group, key = name.split("/")
        assert float(first["bar"][name]) == pytest.approx(first["figures"][group][key], rel=1e-2)
    assert set(first["bar"]) == set(second["bar"])


@pytest.mark.parametrize("kind", [*STRATEGIES, DelayedPipelineStrategy])
def test_kinds_of_messages_have_names_that_loggers_take(kind: type[Any]) -> None:
    assert all(NAME.fullmatch(name) for name in kind().kinds.values())
