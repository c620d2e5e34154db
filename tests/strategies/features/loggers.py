"""Scenes: what is logged, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics import MeanMetric, SumMetric

from tests.strategies.features.fits import SAMPLES, alike, fit, lines, rank
from tests.strategies.features.table import Row, Scene, Verdict, differs, shown, works
from tests.strategies.lit import Lit

SECTION = "Logging"


class Diary(Logger):
    """A logger of the user's own: one method on the first rank, one on all."""

    def __init__(self) -> None:
        super().__init__()
        self.first: list[str] = []
        self.all: list[str] = []
        self.hparams: dict[str, Any] = {}

    name = property(lambda self: "diary")  # type: ignore[assignment]
    version = property(lambda self: "0")  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.all += metrics
        self._keep(metrics)

    @rank_zero_only
    def _keep(self, metrics: dict[str, float]) -> None:
        self.first += metrics

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.hparams = dict(params)


class Logs(Lit):
    """Logs in all ways, numbers that are known beforehand."""

    def __init__(self, knob: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sum, self.mean = SumMetric(), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        n = float(len(batch[0]))
        self.log("own", float(self.global_rank), on_step=True, on_epoch=False)
        self.log("one", n, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=len(batch[0]))
        self.log("total", n, reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        self.log("most", float(self.global_rank), reduce_fx="max", on_step=False, on_epoch=True, sync_dist=True)
        if self.trainer.is_global_zero:
            self.log_dict({"first": 1.0}, rank_zero_only=True, on_step=False, on_epoch=True)
        self.sum.update(n)
        self.log("sum", self.sum, on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)


def logs(folder: Path) -> dict[str, Any]:
    table, diary, quiet = CSVLogger(folder, name="", version=""), Diary(), Diary()
    first = fit(Logs(), logger=[table, diary], log_every_n_steps=4, max_epochs=1)
    no = fit(Logs(), logger=quiet, log_every_n_steps=0, enable_autolog_hparams=False, max_epochs=1)
    root = folder / "root"
    default = fit(
        logger=True,
        default_root_dir=root,
        enable_checkpointing=True,
        enable_model_summary=True,
        enable_progress_bar=True,
        max_epochs=1,
    )
    fit(logger=False, default_root_dir=folder / "off", max_epochs=1)
    return {
        "first": first,
        "off": (folder / "off").exists(),
        "table": lines(folder / "metrics.csv") if rank() == 0 else [],
        "diary": (diary.first, diary.all, diary.hparams),
        "quiet": (quiet.all, quiet.hparams),
        "no": no,
        "default": default,
        "root": sorted(
            str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".ckpt", ".csv") and "ranks" not in str(p)
        ),
    }


def _column(table: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in table if name in row]


def _steps(table: list[dict[str, str]], name: str) -> set[int]:
    return {int(row["step"]) for row in table if name in row}


LOGS = Scene(
    SECTION,
    logs,
    [
        differs(
            "self.log",
            "`on_step=True` in `training_step`",
            "rank 0's own value, also with `sync_dist=True`",
            lambda a, b: {*_column(a["table"], "own")} == {0.0} and {*_column(a["table"], "one_step")} == {4.0},
        ),
        works(
            "self.log",
            "`on_epoch=True, sync_dist=True`",
            lambda a, b: a["first"].metrics["one_epoch"] == b["first"].metrics["one_epoch"] == 4.0,
            "the mean over the samples of all ranks",
        ),
        works(
            "self.log",
            '`reduce_fx="sum"`',
            lambda a, b: a["first"].metrics["total"] == b["first"].metrics["total"] == SAMPLES,
        ),
        works(
            "self.log",
            '`reduce_fx="max"`',
            lambda a, b: a["first"].metrics["most"] == b["first"].metrics["most"] == 1.0,
        ),
        works(
            "self.log_dict",
            "`rank_zero_only=True`",
            lambda a, b: a["first"].metrics["first"] == 1.0 and "first" not in b["first"].metrics,
        ),
        works(
            "torchmetrics",
            "in training, at the end of an epoch",
            lambda a, b: a["first"].metrics["sum"] == b["first"].metrics["sum"] == SAMPLES,
        ),
        works(
            "torchmetrics", "in validation", lambda a, b: a["first"].metrics["metric"] == b["first"].metrics["metric"]
        ),
        works("self.log", "in `validation_step`", lambda a, b: a["first"].metrics["val"] == b["first"].metrics["val"]),
        differs(
            "log_every_n_steps",
            "4",
            "steps of the run; each multiple at most once, whether rank 0 is slow or fast",
            lambda a, b: set() < _steps(a["table"], "one_step") <= {3, 7, 11},
        ),
        works("log_every_n_steps", "0", lambda a, b: "one_step" not in a["quiet"][0] and "one_epoch" in a["quiet"][0]),
        works("logger", "several", lambda a, b: len(a["table"]) > 0 and len(a["diary"][0]) > 0),
        works(
            "Logger",
            "a class of the user's",
            lambda a, b: a["diary"][0] != [] and b["diary"][0] == [] and b["diary"][1] != [],
            "called on all ranks; `rank_zero_only` is the first that lives",
        ),
        works(
            "CSVLogger",
            "",
            lambda a, b: (
                _column(a["table"], "val") == [a["first"].metrics["val"]] or len(_column(a["table"], "val")) == 1
            ),
        ),
        works(
            "logger", "True", lambda a, b: any(name.endswith("metrics.csv") or "tfevents" in name for name in a["root"])
        ),
        works("logger", "False", lambda a, b: a["off"] is b["off"] is False, "no files"),
        works("enable_autolog_hparams", "True", lambda a, b: a["diary"][2] == {"knob": 7}),
        works("enable_autolog_hparams", "False", lambda a, b: a["quiet"][1] == {}),
        works(
            "default_root_dir",
            "a path",
            lambda a, b: a["root"] == b["root"] and any(name.endswith(".ckpt") for name in a["root"]),
        ),
        works("enable_model_summary", "True", lambda a, b: alike(a["default"], b["default"])),
        works(
            "enable_progress_bar",
            "True",
            lambda a, b: alike(a["default"], b["default"]),
            "the bar of rank 0, with a forecast of the epoch's length",
        ),
    ],
    warnings=[
        "Checkpoint directory",
        "Starting from v1.9.0",
        "Experiment logs directory",
        "It is recommended to use",
        ".*sync_dist=True.*",
    ],
)

OTHERS = {
    "TensorBoardLogger": "rank 0 alone writes; read back with tensorboard 2.21",
    "MLFlowLogger": "rank 0 alone writes; read back with mlflow 3.17, from a folder",
    "WandbLogger": "rank 0 alone writes; read back with wandb 0.31, offline",
    "CometLogger": "rank 0 alone writes; read back with comet_ml 3.58, offline",
    "LitLogger": "rank 0 alone writes; tried with a stand-in for its package and service",
}
ELSEWHERE: list[Row] = [
    shown(name, "", Verdict.WORKS, words, "strategies/test_other_loggers.py::test_rank_0_alone_writes_what_was_logged")
    for name, words in OTHERS.items()
]

SCENES = [LOGS]
