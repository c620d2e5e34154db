"""Facts of a run for its log: numbers, names and digests, from which nobody could take a weight or a gradient."""

from __future__ import annotations

import hashlib
import inspect
import os
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.strategies.compat import callbacks, wants_our_sampler
from lightning_async.version import __version__

TRAINER = (
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "reload_dataloaders_every_n_epochs",
)
"""What the Trainer was told that changes a step."""


class Recorded(Protocol):
    """A strategy whose runs can be recorded."""

    name: str

    @property
    def trainer(self) -> Trainer:
        """Whom it serves."""

    @property
    def root_device(self) -> torch.device:
        """Where this rank computes."""

    def begins_with(self) -> dict[str, Any]:
        """What of its own a member starts with: "weights" (a digest), "mass", "shrink", ..."""


def digest(weights: Tensor) -> str:
    """Eight bytes that differ, almost surely, between any two vectors."""
    return hashlib.blake2b(weights.detach().cpu().numpy().data, digest_size=8).hexdigest()


def about(strategy: Recorded) -> dict[str, Any]:
    """What a replay has to know before it can begin."""
    trainer, module = strategy.trainer, type(strategy.trainer.lightning_module)
    return {
        "torch_seed": torch.initial_seed(),
        "seeds_workers": os.environ.get("PL_SEED_WORKERS") == "1",
        "lightning": lightning.__version__,
        "lightning_async": __version__,
        "strategy": strategy.name,
        "knobs": knobs_of(strategy),
        "module": f"{module.__module__}:{module.__qualname__}",
        "limit": trainer.limit_train_batches,
        "device": strategy.root_device.type,
        "trainer": {
            **{name: getattr(trainer, name) for name in TRAINER},
            "use_distributed_sampler": wants_our_sampler(trainer),
        },
        "callbacks": [type(callback).__name__ for callback in callbacks(trainer)],
    }


def start(strategy: Recorded) -> dict[str, Any]:
    """With what a member starts, and behind how many batches of which epoch."""
    trainer = strategy.trainer
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return {
        "numbers": sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad),
        "epoch": trainer.current_epoch,
        "batch": batches.ready,
        "resumed": trainer.ckpt_path is not None,
        **strategy.begins_with(),
    }


def knobs_of(strategy: Recorded) -> dict[str, Any]:
    """The strategy's own knobs by name: each is an attribute of it, of its algorithm or of its feeding."""
    lightnings = inspect.signature(DDPStrategy.__init__).parameters
    mine = [name for name in inspect.signature(type(strategy).__init__).parameters if name not in lightnings]
    places = (strategy, *(getattr(strategy, part) for part in ("algorithm", "feeding") if hasattr(strategy, part)))
    found = {name: getattr(place, name) for name in mine for place in places[::-1] if hasattr(place, name)}
    return {name: value for name, value in found.items() if _is_plain(value)}


def name_of(law: object) -> str:
    """What a law is called."""
    return str(getattr(law, "__qualname__", type(law).__name__))


def knobs_of_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What is a number, or some, in each parameter group."""
    return [
        {name: plain for name, value in group.items() if name != "params" and (plain := _plain(value)) is not None}
        for group in optimizer.param_groups
    ]


def _is_plain(value: Any) -> bool:
    one = value is None or isinstance(value, (bool, int, float, str))
    return one or (isinstance(value, (list, tuple)) and all(isinstance(each, (int, float, str)) for each in value))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (tuple, list)) and all(isinstance(one, (int, float)) for one in value):
        return list(value)
    return value if isinstance(value, (bool, int, float)) else None
