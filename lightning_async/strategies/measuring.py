"""How long each block takes, on the input that the user's code gives the first of them.

The first batch goes through the user's `training_step` up to the call of the blocks, on rank 0 and once more than it
would otherwise; weights, statistics, random numbers and logs are as if it had not. All ranks fetch that batch: a loader
that remembers what it gave goes on alike everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from lightning_async.pipeline import partition
from lightning_async.strategies import compat
from lightning_async.strategies.handover import HandedOver, Handover

if TYPE_CHECKING:
    from lightning_async.strategies.pipe_setup import PipeSetup


def measured(strategy: PipeSetup, handover: Handover) -> list[float]:
    """Seconds of each block, forward and backward, on rank 0; called by all. `handover` must stand in the call."""
    module, precision, found = strategy.trainer.lightning_module, strategy.precision_plugin, []

    def answer(x: Tensor) -> NoReturn:
        found.append(x)
        raise HandedOver

    strategy.measuring = True
    try:
        with _as_it_was(module):
            batch = compat.first_batch(strategy.trainer)
            if strategy.global_rank != 0:
                return []
            batch = strategy.batch_to_device(batch, strategy.root_device)
            with handover.answering(answer), precision.train_step_context():
                try:
                    module.training_step(batch, 0)
                except HandedOver:
                    return partition.measure(handover.as_they_are(), found[0])
    finally:
        strategy.measuring = False
    return []


def first_batch(strategy: PipeSetup) -> None:
    """Fetch it and nothing else, as all ranks but the first do."""
    with _as_it_was(strategy.trainer.lightning_module):
        compat.first_batch(strategy.trainer)


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Training mode in here; afterwards modes, buffers and generators are as before."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            module.train()
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
