"""Every example runs, with small numbers: those who read it will run it."""

from __future__ import annotations

import json
import logging
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # imported first, it changes the environment: that is not the examples' doing

import lightning_async  # noqa: F401  # the same
from lightning_async.callbacks.journal import read
from tests.strategies.ranks import FORK

EXAMPLES = {
    "async_global.py",
    "cli.py",
    "cyclic_delay.py",
    "delayed_pipeline.py",
    "demo.py",
    "gossip_ring.py",
    "lazy_sign.py",
    "watch.py",
}
ROOT = Path(__file__).resolve().parents[1]
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Script]:
    """Runs an example as a script in this process; returns what it and its forked processes printed."""
    loggers = {name: logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")}
    levels = {name: logger.level for name, logger in loggers.items()}

    def run(name: str, *argv: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *argv])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capfd.readouterr().out

    yield run
    for name, logger in loggers.items():
        logger.setLevel(levels[name])


def test_all_are_here() -> None:
    assert {file.name for file in (ROOT / "examples").glob("*.py")} == EXAMPLES


@pytest.mark.parametrize("strategy", ["gossip_ring_fork", "ddp_fork"])
def test_one_changed_argument(strategy: str, script: Script) -> None:
    said = script("gossip_ring.py", "--strategy", strategy, "--devices", "2", "--epochs", "1")
    assert "validation loss" in said
    assert "accuracy" in said


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:.* has nothing to say under this strategy")
@pytest.mark.parametrize("strategy", ["gossip_ring_fork", "ddp_fork"])
def test_two_added_lines(strategy: str, script: Script, tmp_path: Path) -> None:
    out = tmp_path / "watch"
    script("watch.py", "--strategy", strategy, "--devices", "2", "--epochs", "1", "--out", str(out))
    words = [line["words"] for line in read(out / "meetings.jsonl") if line["group"] == "delay"]
    assert words
    assert all(set(word) == {"0", "1"} for word in words)
    trained = [each["trained"] for word in words for each in word.values()]
    assert all(batches for batches, _, _ in trained)
    assert sum(samples for _, _, samples in trained) in (1797, 1798)  # one more: ddp gives all ranks as many


def test_bytes_of_a_step(script: Script) -> None:
    said = script("lazy_sign.py", "--start-method", "fork", "--epochs", "1")
    assert "accuracy" in said
    assert "bytes a step" in said


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_global_weights(mode: str, script: Script) -> None:
    said = script("async_global.py", "--mode", mode, "--devices", "2", "--epochs", "1", "--start-method", "fork")
    assert "validation loss" in said
    assert "delays of rank 0's exchanges" in said


@pytest.mark.few(1)
@pytest.mark.parametrize("arguments", [(), ("--token", "strict"), ("--push", "gradient")], ids=str)
def test_turns(arguments: tuple[str, ...], script: Script) -> None:
    said = script("cyclic_delay.py", *arguments, "--devices", "2", "--epochs", "1", "--start-method", "fork")
    assert "validation loss" in said
    assert "batches in rank 0's pushes" in said


def test_a_pipeline(script: Script) -> None:
    said = script("delayed_pipeline.py", "--start-method", "fork", "--epochs", "1")
    assert "validation accuracy" in said
    assert "stage 0   " in said
    assert "stage 1   " in said


def test_cli(script: Script) -> None:
    configs = ["--config", f"{ROOT}/strategies/gossip_ring.yaml", "--config", f"{ROOT}/callbacks/speed_faults.yaml"]
    small = ["--trainer.strategy.init_args.start_method=fork", "--trainer.max_epochs=1", "--data.samples=256"]
    assert "Trainable params" in script("cli.py", "fit", *configs, *small)


def test_demo(script: Script, tmp_path: Path) -> None:
    said = script("demo.py", "--epochs", "1", "--step", "0.001", "--out", str(tmp_path / "out"))
    rows = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    assert list(rows) == ["ddp", "gossip_ring sync", "gossip_ring none", "gossip_ring"]
    assert all(name in said for name in rows)
    assert rows["gossip_ring"]["folded"] > 0
    assert rows["gossip_ring none"]["folded"] == 0
    assert rows["gossip_ring"]["spread"] < rows["gossip_ring none"]["spread"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert FORK.active_children() == []
