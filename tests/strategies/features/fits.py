"""How the scenes fit: a small module on two ranks, the second 3x slower, and what a rank sees of it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights

SAMPLES, BATCH = 96, 4
STEPS = SAMPLES // BATCH // 2
"""Steps of the run in an epoch."""


def flat(module: L.LightningModule) -> list[float]:
    """The weights, without buffers."""
    return [float(x) for p in module.parameters() for x in p.detach().flatten()]


class Left(L.Callback):
    """What training leaves, for those who stand behind it to put something else in its place."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.trained: list[float] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = flat(module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trained = flat(module)


class Watch(L.Callback):
    """What the loop does on this rank."""

    def __init__(self, look: Callable[[L.Trainer, L.LightningModule], Any] | None = None) -> None:
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.validated: list[int] = []
        self.saved: list[int] = []
        self.epochs: list[int] = []
        self.starts: list[list[float]] = []
        self.seen_by_epoch: list[int] = []
        self.looked: list[Any] = []
        self.sanity = self.evaluated = 0
        self._look = look

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        if trainer.optimizers:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if self._look:
            self.looked.append(self._look(trainer, module))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.sanity += trainer.sanity_checking
        self.evaluated += not trainer.sanity_checking

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.evaluated += 1

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.evaluated += 1

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.starts.append(flat(module))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.epochs.append(trainer.global_step)
        self.seen_by_epoch.append(len(getattr(module, "seen", ())))

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved.append(trainer.global_step)


class Fitted(dict[str, Any]):
    """What a rank saw, by name; attributes read it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> Any:
        return (Fitted, (dict(self),))


def fit(
    module: Any = None,
    data: Any = "small",
    validation: Any = "small",
    callbacks: Sequence[L.Callback] = (),
    look: Callable[[L.Trainer, L.LightningModule], Any] | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Fitted:
    """Fit, and tell what came of it."""
    watch, module = Watch(look), Lit() if module is None else module
    one = maker(callbacks=[*callbacks, watch], **options)
    loaders = samples() if isinstance(data, str) else data, held_out() if isinstance(validation, str) else validation
    one.fit(module, *loaders, ckpt_path=ckpt_path)
    return told(one, module, watch)


def maker(callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    """A Trainer of two ranks, one of them slow."""
    faults = SpeedFaults(step_seconds=options.pop("pace", 0.001), slow={1: 3.0})
    return trainer(options.pop("devices", 2), callbacks=[faults, *callbacks], **options)


def told(one: L.Trainer, module: Any, watch: Watch) -> Fitted:
    """What is worth comparing."""
    found = {name: value for name, value in vars(watch).items() if isinstance(value, (list, int))}
    numbers = {name: float(value) for name, value in one.callback_metrics.items()}
    return Fitted(
        found,
        batches=len(watch.steps),
        global_step=one.global_step,
        steps=getattr(one.strategy, "steps", 0),
        epoch=one.current_epoch,
        seen=list(getattr(module, "seen", ())),
        weights=weights(module),
        left=flat(module),
        metrics=numbers,
    )


def samples(batch_size: int = BATCH, n: int = SAMPLES, **options: Any) -> Any:
    """The training data."""
    return loader(batch_size, n=n, **options)


def held_out(n: int = 24) -> Any:
    """The validation data: 3 batches a rank."""
    return loader(BATCH, n=n, shuffle=False)


def alike(a: Fitted, b: Fitted) -> bool:
    """Both ranks end with the same weights, at the same step of the same epoch, and heard the same of validation."""
    return all(a[name] == b[name] for name in ("weights", "global_step", "epoch", "validated", "saved", "epochs"))


def whole(a: Fitted, b: Fitted, epochs: int, n: int = SAMPLES) -> bool:
    """Each sample was trained on once in every epoch."""
    return sorted(a.seen + b.seen) == sorted(list(range(n)) * epochs)


def free(a: Fitted, b: Fitted) -> bool:
    """The fast rank did not go at the pace of the slow one. Of fits whose `pace` is slow beside what a batch costs."""
    return bool(a.batches > 1.3 * b.batches)


PACE = 0.012  # seconds


def another(one: Fitted) -> bool:
    """What training left on this rank (see `Left`), of all or of a stage, is not what there is behind the fit."""
    parts = zip(one.began, one.trained, one.left, strict=True)
    moved = [now != trained for began, trained, now in parts if began != trained]
    return sum(moved) > len(moved) / 2


def mean_of(one: Fitted, first: int, last: int) -> bool:
    """What there is behind the fit is the mean of what was there as these epochs began, of all or of a stage."""
    starts = list(zip(*one.starts[first : last + 1], strict=True))
    means = [(sum(found) / len(found), now) for found, now in zip(starts, one.left, strict=True) if len({*found}) > 1]
    return len(means) > 0 and all(math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-5) for pair in means)


def heard(function: Callable[[], Any]) -> str:
    """The sentence with which it was refused; "" if it was not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except BaseException as refusal:
            return str(refusal)
    return ""


def stored(file: Path) -> list[float]:
    """What `weights` says of a checkpoint, in plain Lightning."""
    lit = Lit()
    lit.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    return weights(lit)


def rank() -> int:
    """This rank's number."""
    return int(os.environ["RANK"])


def each(values: Sequence[Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """One fit after the other, by the value as text."""
    return {str(value): function(value) for value in values}


def lines(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without empty cells."""
    import csv

    with file.open() as text:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(text)]
