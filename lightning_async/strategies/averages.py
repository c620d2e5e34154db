"""Averages over time are made equal where they are about to be used, like the weights: at meetings, over the ranks.

    last batch | MEETING: weights are the consensus; a callback averages them in
               | before validation, the end of an epoch, the end: its averages of all ranks become their mean

The mean over ranks of averages over time is the average over time of the mean, so what is validated and saved is the
average of the consensus, as if one rank had trained (up to ranks that took more steps than others). Peers never get
averages in the place of weights: callbacks swap them in during validation only, when nothing is sent.

`WeightAveraging` (EMA) averages after every step, each rank its own weights: that is averaged here.
`StochasticWeightAveraging` averages as an epoch starts, when all hold the consensus, so its averages are equal already.
Its last epoch trains nothing and takes BatchNorm's statistics anew. It needs the weights that the callback wrote, no
gradients that are left over, and a number of batches, which data that are shared out by speed do not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_async.strategies import compat
from lightning_async.strategies.buffers import average_buffers, average_weights
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

MANY = 2**62  # batches; more than there are


class Averages(Callback):
    """Stands behind `Meetings` and before all others, so that averages are equal before anybody uses them."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.strategy = strategy
        self._equal = False
        self._length: int | float | None = None

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Make room for an epoch that trains nothing."""
        for callback in compat.callbacks(trainer):
            if isinstance(callback, StochasticWeightAveraging) and trainer.current_epoch == callback.swa_end + 1:
                self.strategy.replica.stay()
                self._give_length(trainer)
                for optimizer in trainer.optimizers:
                    optimizer.zero_grad()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on each rank averages its own weights."""
        self._equal = False

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The last batches may be wanted at the end."""
        if self.strategy.buffers == "reestimate":
            self.strategy.statistics.keep(batch)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages are validated."""
        self._make_equal(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages are saved."""
        self._make_equal(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages become the weights."""
        self._make_equal(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A later fit finds the length as it was."""
        if self._length is not None:
            trainer.fit_loop.max_batches, self._length = self._length, None

    def _make_equal(self, trainer: Trainer, module: LightningModule) -> None:
        if self._equal:
            return
        self._equal = True
        for callback in compat.callbacks(trainer):
            if isinstance(callback, WeightAveraging) and (average := compat.average_of(callback)) is not None:
                office, buffers = self.strategy.office, self.strategy.buffers != "local"
                office.drive(mean_of_averages(average, module, office.rounds, buffers=buffers))

    def _give_length(self, trainer: Trainer) -> None:
        if not isinstance(trainer.fit_loop.max_batches, int):
            self._length, trainer.fit_loop.max_batches = trainer.fit_loop.max_batches, MANY


def mean_of_averages(average: AveragedModel, module: nn.Module, rounds: Rounds, *, buffers: bool = True) -> Wait[None]:
    """Give every member the mean of the averages that have begun; where none has, the first member's.

    Only parameters whose average is somewhere another than the weights travel: not those that were always frozen.
    """
    averaged = list(average.module.parameters())
    pairs = zip(averaged, module.parameters(), strict=True)
    moved = "".join(str(int(not torch.equal(a, p.to(a.device)))) for a, p in pairs)
    words = yield from rounds.agree(f"{int(average.n_averaged > 0)}{moved}".encode(), what="averages over time")
    begun = [rank for rank, word in words.items() if word[:1] == b"1"] or [min(words)]
    weight = int(rounds.carrier.me in begun)
    anywhere = [a for i, a in enumerate(averaged, start=1) if any(word[i : i + 1] == b"1" for word in words.values())]
    yield from average_weights(anywhere, rounds, weight)
    yield from average_buffers(average, rounds, weight, floats=buffers)
