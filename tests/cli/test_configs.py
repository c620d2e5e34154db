"""Every config is read and run by LightningCLI, alone and together with others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_async.callbacks import DelayStats, SpeedFaults
from lightning_async.cli.configs import names, read
from lightning_async.strategies import STRATEGIES, AsyncStrategy, DelayedPipelineStrategy

pytestmark = pytest.mark.filterwarnings("ignore:.* has nothing to say under this strategy")  # here: on one device
DOCS = Path(__file__).resolve().parents[2] / "docs"
SET_BY_THE_TRAINER = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
SMALL = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "limit_val_batches": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class FewBatches(BoringDataModule):
    """Three batches to train on."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(RandomDataset(32, 3))


def configs(*names: str) -> list[str]:
    argv = []
    for number, name in enumerate(names):
        file = Path(f"{number}.yaml")
        file.write_text(read(name), encoding="utf-8")
        argv += ["--config", str(file)]
    return argv


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A training script with LightningCLI, and its command line."""

    def script(*argv: str) -> Trainer:
        monkeypatch.setattr("sys.argv", ["train.py", *argv])
        cli = LightningCLI(
            BoringModel,
            FewBatches,
            trainer_defaults=SMALL,
            seed_everything_default=1,
            save_config_callback=None,
            run=False,
        )
        trainer: Trainer = cli.trainer
        trainer.fit(cli.model, cli.datamodule)
        return trainer

    return script


def callbacks_of(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


@pytest.mark.few(4)
@pytest.mark.parametrize("name", names())
def test_runs(name: str, fit: Callable[..., Trainer]) -> None:
    trainer = fit(*configs(name))
    assert trainer.state.finished


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("strategies/")])
def test_a_strategy_config_sets_nothing_else(name: str) -> None:
    assert _keys(yaml.safe_load(read(name))) == {"trainer": {"strategy"}}


@pytest.mark.parametrize("kind", [*STRATEGIES, DelayedPipelineStrategy], ids=lambda kind: kind.name)
def test_every_knob_stands_in_the_config_and_on_the_page(kind: type[AsyncStrategy | DelayedPipelineStrategy]) -> None:
    knobs = {*inspect.signature(kind).parameters} - SET_BY_THE_TRAINER
    config, page = read(f"strategies/{kind.name}"), (DOCS / f"{kind.name}.md").read_text(encoding="utf-8")
    assert {knob for knob in knobs if not re.search(rf"^ +(# )?{knob}: ", config, re.MULTILINE)} == set()
    assert {knob for knob in knobs if not re.search(rf"`{knob}[`=]", page)} == set()


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [n for n in names() if n.startswith("callbacks/")])
def test_a_callback_config_appends(name: str, fit: Callable[..., Trainer]) -> None:
    assert _keys(yaml.safe_load(read(name))) == {"trainer": {"callbacks+"}}
    both = [*configs(name, "callbacks/speed_faults" if name != "callbacks/speed_faults" else "callbacks/delay_stats")]
    assert _class_name(name) in [type(c).__name__ for c in callbacks_of(fit(*both))]


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("strategies/")])
def test_all_files_of_callbacks_compose(
    name: str, fit: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    every = [n for n in names() if n.startswith("callbacks/")]
    with pytest.raises(SystemExit, match="0"):
        fit(*configs(name, *every), "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert sorted(c["class_path"].rpartition(".")[2] for c in shown) == sorted(map(_class_name, every))
    assert len(shown) == len(every) == 5


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [n for n in names() if n.startswith("strategies/")])
def test_all_files_of_callbacks_run_together(name: str, fit: Callable[..., Trainer]) -> None:
    every = [n for n in names() if n.startswith("callbacks/")]
    trainer = fit(*configs(name, *every))
    assert {*map(_class_name, every)} <= {type(callback).__name__ for callback in callbacks_of(trainer)}
    (stats,) = (callback for callback in callbacks_of(trainer) if isinstance(callback, DelayStats))
    assert stats.figures["rank0/samples_per_second"] > 0


def test_one_that_measures_stands_once(fit: Callable[..., Trainer]) -> None:
    with pytest.raises(MisconfigurationException, match="DelayStats stands 2 times among the callbacks"):
        fit(*configs("callbacks/delay_stats", "callbacks/delay_stats"))


def test_knobs_of_faults_are_typed(fit: Callable[..., Trainer]) -> None:
    argv = ["--trainer.callbacks+=lightning_async.callbacks.SpeedFaults", "--trainer.callbacks.step_seconds=0.001"]
    argv += ["--trainer.callbacks.freeze={0: [100, 0.5]}", "--trainer.callbacks.slow={0: 2}"]
    (faults,) = [c for c in callbacks_of(fit(*argv)) if isinstance(c, SpeedFaults)]
    assert faults.freeze == {0: (100, 0.5)}
    assert faults.slow == {0: 2.0}
    with pytest.raises(SystemExit):
        fit("--trainer.callbacks+=lightning_async.callbacks.SpeedFaults", "--trainer.callbacks.step_seconds=fast")


def _keys(config: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    return {key: set(value) for key, value in config.items()}


def _class_name(name: str) -> str:
    path: str = yaml.safe_load(read(name))["trainer"]["callbacks+"][0]["class_path"]
    return path.rpartition(".")[2]
