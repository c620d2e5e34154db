"""What cannot be supported is refused early, on every rank, by a sentence that says what to do instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, ModelPruning, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_async.strategies import compat
from lightning_async.strategies.members import sizes
from lightning_async.transport.mail import LONGEST

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


def refuse(trainer: Trainer, name: str) -> None:
    """Raise for the first conflict between the Trainer's arguments and a strategy whose ranks run free."""
    for conflict in _conflicts(trainer):
        raise MisconfigurationException(f"strategy={name!r}: {conflict}")


def refuse_run(strategy: AsyncStrategy) -> None:
    """Raise for what the module configured that cannot run free."""
    refuse_optimizers(strategy.optimizers, strategy.name)
    if strategy.buffers == "reestimate":
        refuse_manual(strategy.trainer.lightning_module, strategy.name)


def refuse_cuts(strategy: AsyncStrategy) -> None:
    """Raise for what does not go with checkpoints between meetings; say so if there is nothing to save there."""
    if strategy.saves != "cut":
        return
    for conflict in _conflicts_of_cuts(strategy):
        raise MisconfigurationException(f"strategy={strategy.name!r}: `saves='cut'`: {conflict}")
    found = [c for c in compat.callbacks(strategy.trainer) if isinstance(c, ModelCheckpoint)]
    if not any(strategy.cuts.saves(callback) for callback in found):
        rank_zero_warn(
            f"{strategy.name}: `saves='cut'` is for `ModelCheckpoint(every_n_train_steps=...)` without `monitor` and "
            "`save_last='link'`, and there is none: all checkpoints are saved at meetings"
        )


def _conflicts_of_cuts(strategy: AsyncStrategy) -> Iterator[str]:
    if compat.writes_later(strategy.checkpoint_io):
        yield (
            "a cut is written in a thread of its own, and `AsyncCheckpointIO` would write in another one: leave it "
            "out, or save at meetings"
        )
    if strategy.members < strategy.world_size:
        yield "the ranks of one member would have to be cut as one, which is not done yet: leave `inner` out"
    for callback in compat.callbacks(strategy.trainer):
        if isinstance(callback, (WeightAveraging, BaseFinetuning, ModelPruning)):
            yield (
                f"`{type(callback).__name__}` puts other weights into a checkpoint, or trains others from some epoch "
                "on, which only a meeting can save: leave one of the two out"
            )


def refuse_inner(strategy: AsyncStrategy, members: Sequence[Sequence[int]]) -> None:
    """Raise for what members of several ranks cannot do; where all go in step, for members of unlike size."""
    if strategy.algorithm.in_step and len({len(ranks) for ranks in members}) > 1:
        raise MisconfigurationException(
            f"strategy={strategy.name!r}: the members have{sizes(members)}, so their batches are of unlike size, and "
            "with equal shares they would take unlike numbers of steps, where all go in step: leave `inner` out, take "
            "nodes of one size, or a mode in which nobody waits"
        )
    if not compat.wants_our_sampler(strategy.trainer):
        raise MisconfigurationException(
            f"strategy={strategy.name!r}: with `inner` each batch of a member is split between its ranks, which "
            "`use_distributed_sampler=False` leaves to you: leave one of the two out"
        )


def refuse_module(module: torch.nn.Module, name: str) -> None:
    """Raise for layers that exchange tensors in the forward pass."""
    for path, layer in module.named_modules():
        if isinstance(layer, torch.nn.SyncBatchNorm):
            raise MisconfigurationException(
                f"strategy={name!r}: `{path}` is a SyncBatchNorm, whose forward waits for all ranks; use BatchNorm "
                "(its statistics are averaged at every meeting) or GroupNorm"
            )


def refuse_unmade(module: torch.nn.Module, name: str) -> None:
    """Raise for parameters and buffers that have no numbers yet: nothing could be made equal on all ranks."""
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise MisconfigurationException(
                f"strategy={name!r}: `{path}` is lazy, and its shape is not known before the first batch; give the "
                "layer its sizes, or run one batch through it in `configure_model`"
            )
        if tensor.is_meta:
            raise MisconfigurationException(
                f"strategy={name!r}: `{path}` is on the device 'meta' and has no numbers; make it on a real device in "
                "`configure_model`, with `to_empty` and an initialisation if it has to begin on 'meta'"
            )


def refuse_optimizers(optimizers: list[Optimizer], name: str) -> None:
    """Raise for optimizers that step several times a batch, or together with other ranks."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                f"strategy={name!r}: LBFGS evaluates the closure several times a step; use SGD, Adam or another "
                "optimizer that takes one step a batch"
            )
        if kinds_of(optimizer) & {"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer"}:
            raise MisconfigurationException(
                f"strategy={name!r}: {type(optimizer).__name__} exchanges state between ranks at every step; pass the "
                "optimizer it wraps"
            )


def refuse_manual(module: LightningModule, name: str) -> None:
    """Raise for a training step that cannot be run for its forward pass alone."""
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"strategy={name!r}: `buffers='reestimate'` runs `training_step` once more without training, but with "
            "manual optimisation it takes steps itself; use buffers='average'"
        )


def _conflicts(trainer: Trainer) -> Iterator[str]:
    if compat.synchronises_batchnorm(trainer):
        yield (
            "`sync_batchnorm=True` waits for all ranks in every forward pass; leave it out: BatchNorm's statistics are "
            "averaged at every meeting"
        )
    if str(trainer.precision).startswith("transformer-engine"):
        yield (
            f"`precision={trainer.precision!r}` combines its scales over all ranks at every step; use "
            "`precision='bf16-true'`, or 'bf16-mixed'"
        )
    plugin = trainer.precision_plugin
    if any(kind.startswith(("FSDP", "DeepSpeed", "XLA")) for kind in kinds_of(plugin)):
        yield (
            f"`{type(plugin).__name__}` belongs to another strategy, which cuts the weights into shards; use "
            "`precision=...` instead"
        )
    for callback in compat.callbacks(trainer):
        yield from _callback_conflicts(callback)


def _callback_conflicts(callback: object) -> Iterator[str]:
    kinds = kinds_of(callback)
    if "LearningRateFinder" in kinds:
        yield (
            "`LearningRateFinder` (`Tuner.lr_find`) sweeps the learning rate over steps that ranks take together; find "
            "it on one device with `strategy='auto'`: it holds here as it does with `ddp`"
        )
    if isinstance(callback, ModelPruning):
        method: str = getattr(callback.pruning_fn, "func", callback.pruning_fn).__name__  # type: ignore[union-attr]
        if "random" in method.lower():
            yield (
                f"`ModelPruning` with `{method}` draws another mask on each rank; use 'l1_unstructured' or "
                "'ln_structured', which go by weights that are equal on all ranks by then"
            )
    if "BatchSizeFinder" in kinds:
        yield (
            "`BatchSizeFinder` tries sizes until the memory of a device is full; find the size on one device with "
            "`strategy='auto'`"
        )
    if "SpikeDetection" in kinds:
        yield "`SpikeDetection` compares losses of all ranks at every step; leave it out, or use it with `ddp`"


def kinds_of(what: object) -> set[str]:
    """The names of its class and of those that this one is made from."""
    return {kind.__name__ for kind in type(what).__mro__}


def refuse_length(nbytes: int, name: str) -> None:
    """Raise for a model of which a message would be longer than a link takes."""
    if nbytes > LONGEST:
        raise MisconfigurationException(
            f"strategy={name!r}: a message of {nbytes / 1e9:.3g} GB would be sent, and a link takes up to "
            f"{LONGEST / 1e9:.3g} GB: halve it by wire='bf16', or use strategy='async_global', whose shards are as "
            "many as members (up to 8), so that each message is a part of the weights"
        )
