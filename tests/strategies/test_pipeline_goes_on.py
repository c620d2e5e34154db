"""A pipelined run that goes on is the run that was not interrupted, whatever its knobs and its data are."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_async import DelayedPipelineStrategy
from lightning_async.strategies import compat, pipe_setup
from tests.strategies.piped import INPUTS, TARGETS, Piped, loader, trainer, weights
from tests.strategies.ranks import run


class Noisy(Dataset[Any]):
    """What it gives of a sample depends on numbers of every kind, drawn when it is asked; it counts how often it is, in
    a worker too."""

    def __init__(self, n: int = 60) -> None:
        self.n, self.fetched = n, torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched += 1
        return INPUTS[index] + 0.1 * (torch.rand(()) + np.random.rand() + random.random()), TARGETS[index]


class Stream(IterableDataset[Any]):
    """The same, without a length."""

    fetched = 0

    def __iter__(self) -> Iterator[Any]:
        data = Noisy()
        for at in range(len(data)):
            self.fetched += 1
            yield data[at]


class Drawing(Piped):
    """Its hooks draw random numbers wherever a run begins, or goes on, and between batches; it asks early how many."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        torch.randn(8)

    def on_train_epoch_start(self) -> None:
        torch.randn(8)

    def on_train_batch_end(self, *_: Any) -> None:
        torch.randn(8)


class OfTwo(Piped):
    """Trains on two loaders, of which the shorter begins again."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (other, _) = batch
        return super().training_step((x + 0.1 * other[: len(x)].mean(0), y), batch_idx)


class Knows(DataLoader[Any]):
    """It could say where it stands; in mid-epoch a pipeline asks it to begin anew."""

    def state_dict(self) -> dict[str, Any]:
        return {"begins": "anew"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


def _hush() -> None:
    for sentence in ("The dirpath has changed", "Be aware that when using `ckpt_path`"):
        warnings.filterwarnings("ignore", sentence)


def _train(devices: int, folder: str, every: int | None, resume: str | None, options: dict[str, Any]) -> dict[str, Any]:
    _hush()
    options = dict(options)
    workers, two, stream = (options.pop(name, 0) for name in ("workers", "two", "stream"))
    kind = OfTwo if two else Drawing if options.pop("draws", False) else Piped
    data: Any = Stream() if stream else Noisy()
    lit = kind(schedule=options.pop("schedule", ""))
    at_end = options.pop("save_on_train_epoch_end", None)
    saved = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=every, save_on_train_epoch_end=at_end
    )
    batches: Any = DataLoader(data, 8, shuffle=not stream, num_workers=workers, drop_last=bool(two))
    if two:
        batches = [batches, Knows(Noisy(40), 8, shuffle=True)]  # it begins again within an epoch
    t = trainer(devices, callbacks=[saved], enable_checkpointing=True, **{"max_epochs": 3, **options})
    t.fit(lit, batches, loader(20), ckpt_path=resume)
    end = {"weights": weights(lit), "step": t.global_step, "log step": compat.log_step(t), "epochs": t.current_epoch}
    return end | {"losses": lit.losses, "fetched": int(data.fetched)}


CASES: dict[str, tuple[int, int, list[int], dict[str, Any]]] = {
    "random data": (2, 5, [10], {"schedule": "plateau"}),
    "replicas": (4, 3, [6], {"knobs": {"replicas": 2}}),
    "workers": (4, 2, [6, 8], {"knobs": {"replicas": 2}, "workers": 1, "limit_val_batches": 0, "draws": True}),
    "draws in hooks": (2, 2, [4, 8, 10], {"draws": True}),
    "two loaders": (2, 2, [6, 10], {"two": True, "val_check_interval": 5}),
    "stream": (2, 5, [10], {"stream": True}),
    "annealed": (3, 5, [5], {"knobs": {"compensate": "lr", "anneal": 12}}),
    "clipped": (3, 5, [5], {"knobs": {"clip": "pipe"}, "gradient_clip_val": 0.01}),
    "reloaded": (2, 4, [4, 8], {"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.few(0)
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    devices, every, steps, options = CASES[name]
    whole = run(devices, _train, devices, str(tmp_path / "whole"), every, None, options)
    for step in steps:
        file = str(tmp_path / "whole" / f"step={step}.ckpt")
        rest = run(devices, _train, devices, str(tmp_path / f"rest{step}"), every, file, options)
        for one, other in zip(whole, rest, strict=True):
            assert other["losses"] == one["losses"][step:] if one["losses"] else not other["losses"]
            for key in ("weights", "step", "log step", "epochs"):
                assert one[key] == other[key], (step, key)
            assert 3 * other["fetched"] == (3 - step // (one["step"] // 3)) * one["fetched"] > 0, (
                "an epoch is fetched once"
            )


@pytest.mark.few(0)
def test_what_a_run_that_went_on_saved_behind_a_validation_goes_on_too(tmp_path: Path) -> None:
    """Of loaders that it began anew it says nothing, and plain Lightning goes on from it as well."""

    def train(devices: int, name: str, every: int | None, file: str | None, **options: Any) -> Any:
        resume = file and str(tmp_path / file)
        return run(devices, _train, devices, str(tmp_path / name), every, resume, options)[0]

    whole = train(2, "whole", 4, None, max_epochs=2)
    train(2, "once", None, "whole/step=4.ckpt", max_epochs=1, save_on_train_epoch_end=False)
    saved = torch.load(tmp_path / "once/step=8.ckpt", weights_only=True)
    assert "combined_loader" not in saved["loops"]["fit_loop"]["state_dict"]
    assert len(train(1, "plain", None, "once/step=8.ckpt", max_epochs=2, strategy="auto")["losses"]) == 8
    saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{}]  # as some were written
    torch.save(saved, tmp_path / "older.ckpt")
    assert train(2, "twice", 4, "older.ckpt", max_epochs=2)["losses"] == whole["losses"][8:]


def _cut(folder: str, seconds: list[float], resume: str | None, split: str = "auto") -> tuple[int, ...]:
    _hush()
    pipe_setup.measured = lambda *_: seconds  # in this process, which is forked for this run
    saved = ModelCheckpoint(folder, filename="x", enable_version_counter=False)
    t = trainer(2, knobs={"split": split}, callbacks=[] if resume else [saved], enable_checkpointing=True)
    t.fit(Piped(), loader(), loader(20), ckpt_path=resume)
    cuts: tuple[int, ...] = t.strategy.cuts
    return cuts


def test_cuts_are_those_that_were_measured_first(tmp_path: Path) -> None:
    """Measured anew they would be others, whose stages draw other random numbers."""
    assert run(2, _cut, str(tmp_path), [1.0, 1.0, 1.0, 9.0], None) == [(3,), (3,)]
    assert run(2, _cut, str(tmp_path), [9.0, 1.0, 1.0, 1.0], str(tmp_path / "x.ckpt")) == [(3,), (3,)]


def test_cuts_that_nobody_measured_are_measured(tmp_path: Path) -> None:
    assert run(2, _cut, str(tmp_path), [], None, "even") == [(2,), (2,)]
    assert run(2, _cut, str(tmp_path), [9.0, 1.0, 1.0, 1.0], str(tmp_path / "x.ckpt")) == [(1,), (1,)]


def test_cuts_of_another_network_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DelayedPipelineStrategy, "depth", 2)
    strategy = DelayedPipelineStrategy(stages="net", split="auto")
    strategy.resumed = {"cuts": [3]}
    assert [strategy._saved_cuts(blocks) for blocks in (5, 4, 3)] == [(3,), (3,), ()]


def test_one_stage_that_is_limited_by_epochs_and_steps_loses_no_epoch(tmp_path: Path) -> None:
    """Its random numbers are Lightning's, so it does not go on to the bit."""
    options = {"limit_val_batches": 0}
    run(1, _train, 1, str(tmp_path), None, None, {"max_epochs": 1, **options})
    file = str(tmp_path / "step=8.ckpt")
    (end,) = run(1, _train, 1, str(tmp_path / "on"), None, file, {"max_steps": 100, **options})
    assert (end["epochs"], end["step"], len(end["losses"])) == (3, 24, 16)
