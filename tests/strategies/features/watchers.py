"""Scenes: callbacks that watch a run, and those that look for its best numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    ThroughputMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from tests.strategies.features.fits import (
    Fitted,
    Watch,
    alike,
    fit,
    heard,
    held_out,
    lines,
    maker,
    rank,
    samples,
    told,
)
from tests.strategies.features.table import Scene, differs, refused, works
from tests.strategies.lit import Lit

SECTION = "Callbacks"


class Bar(ProgressBar):
    """A bar of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []

    def disable(self) -> None:
        pass

    def enable(self) -> None:
        pass

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self.shown.append(self.get_metrics(trainer, module).get("train_step"))


def watching(folder: Path) -> dict[str, Any]:
    table = CSVLogger(folder, name="", version="")
    throughput = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4)
    rates = LearningRateMonitor(logging_interval="step")
    stats = DeviceStatsMonitor(cpu_stats=True)
    watch = Watch()
    one = maker([throughput, rates, stats, watch], logger=table, log_every_n_steps=4)
    one.accelerator.get_device_stats = lambda device: {"load": 0.5}  # type: ignore[method-assign]  # psutil may lack
    lit = Lit()
    one.fit(lit, samples(), held_out())
    bars = {}
    for name, bar in (("tqdm", TQDMProgressBar()), ("rich", RichProgressBar()), ("own", Bar())):
        quiet = {"enable_progress_bar": True, "enable_model_summary": True}
        summary = RichModelSummary() if name == "rich" else ModelSummary(max_depth=2)
        bars[name] = Fitted(fit(callbacks=[bar, summary], max_epochs=1, **quiet), shown=len(getattr(bar, "shown", [])))
    return {"first": told(one, lit, watch), "table": lines(folder / "metrics.csv") if rank() == 0 else [], **bars}


def _has(table: list[dict[str, str]], part: str) -> list[float]:
    return [float(value) for row in table for name, value in row.items() if part in name]


WATCHING = Scene(
    SECTION,
    watching,
    [
        differs(
            "ThroughputMonitor",
            "",
            "measures the first rank; its figures for all are that times the number of ranks",
            lambda a, b: (
                _has(a["table"], "train/samples_per_sec")
                == [2 * own for own in _has(a["table"], "train/device/samples_per_sec")]
                != []
            ),
        ),
        works("LearningRateMonitor", "", lambda a, b: {*_has(a["table"], "lr-SGD")} == {0.01}),
        works("DeviceStatsMonitor", "", lambda a, b: {*_has(a["table"], "load")} == {0.5}),
        works(
            "TQDMProgressBar",
            "",
            lambda a, b: alike(a["tqdm"], b["tqdm"]),
            "the total is a forecast, since the share follows the speed",
        ),
        works("RichProgressBar", "", lambda a, b: alike(a["rich"], b["rich"]), "the same"),
        works("ProgressBar", "as a base class", lambda a, b: a["own"].shown == a["own"].batches),
        works("ModelSummary", "", lambda a, b: alike(a["tqdm"], b["tqdm"])),
        works("RichModelSummary", "", lambda a, b: alike(a["rich"], b["rich"])),
    ],
    warnings=["Checkpoint directory", "When using the `ThroughputMonitor`", "Experiment logs directory"],
)


class Spikes(SpikeDetection):
    """The user's way to say what a spike is."""


class Sized(Lit):
    """Has what a tuner changes."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return samples(self.batch_size)


def tuned(folder: Path) -> dict[str, Any]:
    return {
        "spikes": heard(lambda: fit(callbacks=[Spikes()])),
        "rate": heard(lambda: fit(callbacks=[LearningRateFinder()])),
        "size": heard(lambda: fit(Sized(), callbacks=[BatchSizeFinder()])),
        "lr_find": heard(lambda: Tuner(maker()).lr_find(Lit(), samples(), held_out())),
        "scale": heard(lambda: Tuner(maker()).scale_batch_size(Sized())),
    }


FINDS = (
    "`LearningRateFinder` (`Tuner.lr_find`) sweeps the learning rate over steps that ranks take together; find it on "
    "one device with `strategy='auto'`: it holds here as it does with `ddp`"
)


SIZES = (
    "`BatchSizeFinder` tries sizes until the memory of a device is full; find the size on one device with "
    "`strategy='auto'`"
)


TUNED = Scene(
    SECTION,
    tuned,
    [
        refused(
            "SpikeDetection",
            "",
            "`SpikeDetection` compares losses of all ranks at every step; leave it out, or use it with `ddp`",
            key="spikes",
        ),
        refused("LearningRateFinder", "", FINDS, key="rate"),
        refused("BatchSizeFinder", "", SIZES, key="size"),
        refused("Tuner.lr_find", "", FINDS, key="lr_find"),
        refused(
            "Tuner.scale_batch_size",
            "",
            "Tuning the batch size is currently not supported with distributed strategies.",
            key="scale",
        ),
    ],
)


SCENES = [WATCHING, TUNED]
