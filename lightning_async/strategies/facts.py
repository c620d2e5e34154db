"""Facts of a run for its log: numbers, names and digests, from which nobody could take a weight or a gradient."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.algorithms.algorithm import no_shrink
from lightning_async.strategies.compat import callbacks
from lightning_async.version import __version__

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

TRAINER = (
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "reload_dataloaders_every_n_epochs",
)
"""What the Trainer was told that changes a step."""


def digest(weights: Tensor) -> str:
    """Eight bytes that differ, almost surely, between any two vectors."""
    return hashlib.blake2b(weights.detach().cpu().numpy().data, digest_size=8).hexdigest()


def about(strategy: AsyncStrategy) -> dict[str, Any]:
    """What a replay has to know before it can begin."""
    trainer, module = strategy.trainer, type(strategy.trainer.lightning_module)
    return {
        "torch_seed": torch.initial_seed(),
        "lightning": lightning.__version__,
        "lightning_async": __version__,
        "strategy": strategy.name,
        "knobs": knobs_of(strategy),
        "module": f"{module.__module__}:{module.__qualname__}",
        "limit": trainer.limit_train_batches,
        "device": strategy.root_device.type,
        "trainer": {name: getattr(trainer, name) for name in TRAINER},
        "callbacks": [type(callback).__name__ for callback in callbacks(trainer)],
    }


def start(strategy: AsyncStrategy) -> dict[str, Any]:
    """With what a member starts."""
    trainer, shrink = strategy.trainer, strategy.algorithm.shrink
    return {
        "weights": digest(strategy.replica.flat),
        "numbers": sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad),
        "mass": strategy.feeding.mass,
        "epoch": trainer.current_epoch,
        "resumed": trainer.ckpt_path is not None,
        "shrink": None if shrink is no_shrink else getattr(shrink, "__qualname__", type(shrink).__name__),
    }


def knobs_of(strategy: AsyncStrategy) -> dict[str, Any]:
    """The strategy's own knobs by name: each is an attribute of it, of its algorithm or of its feeding."""
    lightnings = inspect.signature(DDPStrategy.__init__).parameters
    mine = [name for name in inspect.signature(type(strategy).__init__).parameters if name not in lightnings]
    places = (strategy, strategy.algorithm, strategy.feeding)
    found = {name: getattr(place, name) for name in mine for place in places[::-1] if hasattr(place, name)}
    return {name: value for name, value in found.items() if value is None or isinstance(value, (bool, int, float, str))}


def knobs_of_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What is a number, or some, in each parameter group."""
    return [
        {name: plain for name, value in group.items() if name != "params" and (plain := _plain(value)) is not None}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (tuple, list)) and all(isinstance(one, (int, float)) for one in value):
        return list(value)
    return value if isinstance(value, (bool, int, float)) else None
