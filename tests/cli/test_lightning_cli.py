"""The ways to name a strategy on LightningCLI's command line, each of them run, and what wrong knobs say."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from torch.utils.data import DataLoader

import lightning_async  # noqa: F401  # registers the names
from lightning_async.cli.configs import names
from lightning_async.strategies import GossipRingStrategy

ROOT = Path(__file__).resolve().parents[2]
CLASS = "lightning_async.strategies.GossipRingStrategy"
CONFIG = f"{ROOT}/strategies/gossip_ring.yaml"
SMALL = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "limit_val_batches": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SPELLINGS = {
    "config file": ["--config", CONFIG],
    "class path": [f"--trainer.strategy.class_path={CLASS}"],
    "class and one knob": [f"--trainer.strategy={CLASS}", "--trainer.strategy.period=3"],
    "short class and one knob": ["--trainer.strategy=GossipRingStrategy", "--trainer.strategy.period=3"],
    "registered name": ["--trainer.strategy=gossip_ring"],
    "file, one knob changed": ["--config", CONFIG, "--trainer.strategy.init_args.period=3"],
}


class TwoLayers(BoringModel):
    """What a pipeline can cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 2))


class FewBatches(BoringDataModule):
    """Four batches to train on."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(RandomDataset(32, 4))


Build = Callable[..., LightningCLI]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """What a script with LightningCLI makes of its command line; `fit` is left to the test."""

    def script(*argv: str, **options: Any) -> LightningCLI:
        monkeypatch.setattr("sys.argv", ["train.py", *argv])
        return LightningCLI(
            TwoLayers, FewBatches, trainer_defaults=SMALL, seed_everything_default=1, **{"run": False, **options}
        )

    return script


def strategy_of(cli: LightningCLI) -> GossipRingStrategy:
    strategy = cli.trainer.strategy
    assert isinstance(strategy, GossipRingStrategy)
    return strategy


@pytest.mark.few(3)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, build: Build) -> None:
    cli = build(*SPELLINGS[spelling])
    assert strategy_of(cli).algorithm.period == (3 if "knob" in spelling else 2)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.state.finished
    assert cli.trainer.global_step == 4


@pytest.mark.few(3)
@pytest.mark.parametrize("name", names())
def test_two_ranks(name: str, build: Build) -> None:
    """Every config alone, and each callback together with a strategy, in a world of two."""
    argv = ["--config", f"{ROOT}/{name}.yaml"]
    if name.startswith("callbacks/"):
        argv = ["--config", CONFIG, *argv]
    if name == "strategies/delayed_pipeline":
        argv.append("--trainer.strategy.init_args.stages=layer")
    cli = build(*argv, "--trainer.devices=2", "--trainer.strategy.init_args.start_method=fork")
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.state.finished


def test_a_name_on_two_ranks(build: Build) -> None:
    cli = build("--trainer.strategy=gossip_ring_fork", "--trainer.devices=2")
    cli.trainer.fit(cli.model, cli.datamodule)
    assert strategy_of(cli).world_size == 2


def test_the_class_alone_is_not_enough(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """LightningCLI takes it for a registered name, in lower case. Should this pass one day, tell the docs."""
    with pytest.raises((SystemExit, ValueError)):
        build(f"--trainer.strategy={CLASS}")
    capsys.readouterr()


def test_print_config_can_be_read_again(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    knobs = ["--trainer.strategy.init_args.mode=push_sum", "--trainer.strategy.init_args.max_delay=null"]
    with pytest.raises(SystemExit, match="0"):
        build("--config", CONFIG, *knobs, "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["strategy"]["init_args"]["mode"] == "push_sum"
    Path("printed.yaml").write_text(printed, encoding="utf-8")
    strategy = strategy_of(build("--config", "printed.yaml"))
    assert strategy.mode == "push_sum"
    assert strategy.algorithm.max_delay is None  # type: ignore[attr-defined]


def test_idpas_knobs(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    knobs = ["balance.parts=4", "balance.partition=kept", "balance.nominal=[1.0,0.5]"]
    argv = ["--config", CONFIG, *(f"--trainer.strategy.init_args.{knob}" for knob in knobs)]
    with pytest.raises(SystemExit, match="0"):
        build(*argv, "--print_config")
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    cli = build("--config", "printed.yaml", "--trainer.strategy.init_args.balance.nominal=equal")
    cli.trainer.fit(cli.model, cli.datamodule)
    share = strategy_of(cli).feeding
    assert share.balance == "incremental"
    assert cli.trainer.global_step == 4


def test_the_config_is_saved_beside_the_logs(build: Build) -> None:
    """LightningCLI's own callback, on by default, broadcasts while it is set up."""
    fork = "--trainer.strategy.init_args.start_method=fork"
    logged = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    cli = build("--config", CONFIG, fork, "--trainer.devices=2", *logged)
    cli.trainer.fit(cli.model, cli.datamodule)
    (saved,) = Path("logs").rglob("config.yaml")
    named = yaml.safe_load(saved.read_text(encoding="utf-8"))["trainer"]["strategy"]["class_path"]
    assert pkgutil.resolve_name(named) is GossipRingStrategy  # older jsonargparse writes another way to it


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("mode=pairwize", "mode"),
        ("period=0", "`period` must be an integer of at least 1, got 0"),
        ("period=often", "period"),
        ("max_delay=-1", "`max_delay` must be an integer of at least 1, or None for no bound, got -1"),
        ("wire=fp16", "wire"),
        ("mixing=0.7", "`mixing` must be above 0 and at most 0.5 (0.5: a pair meets in the middle), got 0.7"),
        ("balance=speed", "balance"),
        ("balance.parts=0", "`parts` must be an integer of at least 1, got 0"),
        ("balance.partition=moved", "partition"),
        ("silence=0", "`silence` must be a number of seconds above 0, got 0"),
        ("perod=2", "perod"),
    ],
)
def test_a_wrong_knob_is_named(argument: str, sentence: str, build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        build("--config", CONFIG, f"--trainer.strategy.init_args.{argument}")
    assert sentence in f"{capsys.readouterr().err} {stopped.value}"


def test_an_unknown_name(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        build("--trainer.strategy=gossip_rin")
    assert "gossip_rin" in f"{capsys.readouterr().err} {stopped.value}"
