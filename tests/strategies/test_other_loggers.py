"""Loggers of other people's packages: rank 0 alone writes, and what was logged is read back from where it wrote.

Where a package is not installed its test is skipped with a sentence. None of them reaches its service here: files, or
what the package keeps while it is offline; of Lightning's own service there is a stand-in.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lightning as L
import pytest
from lightning.pytorch import loggers

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run
from tests.strategies.resumable import rank


class Kind(NamedTuple):
    """A logger, and what it has written of "val", in its order."""

    package: str
    make: Callable[[Path], Any]
    read: Callable[[Any, Path], list[float]]


def _tensorboard(logger: Any, folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("val")]


def _mlflow(logger: Any, folder: Path) -> list[float]:
    from mlflow.tracking import MlflowClient

    return [metric.value for metric in MlflowClient(f"file:{folder}").get_metric_history(logger.run_id, "val")]


def _wandb(logger: Any, folder: Path) -> list[float]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    wandb.teardown()
    (file,) = folder.rglob("*.wandb")
    found = []
    for data in _of_leveldb(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {".".join(one.nested_key) or one.key: one.value_json for one in record.history.item}
        found += [json.loads(value) for key, value in items.items() if key == "val"]
    return found


def _of_leveldb(log: bytes) -> Iterator[bytes]:
    """The entries of a log of LevelDB's: blocks of pieces, each with a sum, a length, and whether more follows."""
    at, block, entry = 7, 1 << 15, b""
    while at < len(log):
        if block - at % block < 7:  # no room for another head
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        entry += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield entry
            entry = b""


def _comet(logger: Any, folder: Path) -> list[float]:
    logger.experiment.end()
    (file,) = folder.glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        lines = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [one["payload"]["metric"] for one in lines if one["type"] == "metric_msg"]
    return [float(metric["metricValue"]) for metric in metrics if metric["metricName"] == "val"]


class Experiment(dict[str, Any]):
    """As much of litlogger's as Lightning's logger uses."""

    def __init__(self, **options: Any) -> None:
        self.finalized: list[Any] = []

    def __missing__(self, key: str) -> Any:
        self[key] = series = Series()
        return series

    def print_url(self) -> None:
        pass

    def finalize(self, status: Any) -> None:
        self.finalized.append(status)


class Series(list[float]):
    """What it keeps of one metric."""

    def append(self, value: float, step: int = 0) -> None:
        super().append(value)


def _lit_logger(folder: Path) -> Any:
    sys.modules["litlogger"] = stand_in = ModuleType("litlogger")
    stand_in.Experiment = Experiment  # type: ignore[attr-defined]
    return loggers.LitLogger(folder, name="x")


def _lit(logger: Any, folder: Path) -> list[float]:
    assert logger.experiment.finalized == ["success"]
    return list(logger.experiment["val"])


def _mlflow_logger(folder: Path) -> Any:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return loggers.MLFlowLogger(save_dir=str(folder))


def _comet_logger(folder: Path) -> Any:
    os.environ["COMET_START_ONLINE"] = "0"  # with `online=False` Lightning switches the experiment off
    return loggers.CometLogger(offline_directory=str(folder))


KINDS = {
    "TensorBoardLogger": Kind(
        "tensorboard", lambda folder: loggers.TensorBoardLogger(folder, name="", version=""), _tensorboard
    ),
    "MLFlowLogger": Kind("mlflow", _mlflow_logger, _mlflow),
    "WandbLogger": Kind("wandb", lambda folder: loggers.WandbLogger(save_dir=folder, offline=True), _wandb),
    "CometLogger": Kind("comet_ml", _comet_logger, _comet),
    "LitLogger": Kind("", _lit_logger, _lit),
}


class Validated(L.Callback):
    """What each validation came to."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.found.append(float(trainer.callback_metrics["val"]))


def _logs(name: str, folder: Path) -> dict[str, Any]:
    """Each rank has a folder of its own, so that one that writes shows."""
    kind, validated, lit, own = KINDS[name], Validated(), Lit(), folder / str(rank())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = kind.make(own)
        pace = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
        t = trainer(2, logger=logger, callbacks=[pace, validated], max_epochs=3, log_every_n_steps=4)
        t.fit(lit, loader(), loader(40, shuffle=False))
        read = kind.read(logger, own) if rank() == 0 else []
    files = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    wrote = any("train_epoch" in path.name or b"train_epoch" in content for path, content in files.items())
    return {"validated": validated.found, "read": read, "wrote": wrote, "weights": weights(lit)}


@pytest.mark.parametrize("name", KINDS)
def test_rank_0_alone_writes_what_was_logged(name: str, tmp_path: Path) -> None:
    if (package := KINDS[name].package) and not _is_there(package):
        pytest.skip(f"{name} needs the package {package}, which is not installed")
    first, second = run(2, _logs, name, tmp_path)
    assert first["weights"] == second["weights"]
    assert len(first["validated"]) == 3
    assert first["validated"] == second["validated"]
    assert first["read"] == pytest.approx(first["validated"], rel=1e-6)
    assert not second["wrote"]


def _is_there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
