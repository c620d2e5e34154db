"""Averages over time are made equal where they are about to be used, like the weights: at meetings, over the ranks.

    last batch | MEETING: weights are the consensus; a callback averages them in
               | before validation, a save, the end of an epoch, the end: its averages of all ranks become their mean

The mean over ranks of averages over time is the average over time of the mean, so what is validated and saved is the
average of the consensus, as if one rank had trained (up to ranks that took more steps than others). Peers never get
averages in the place of weights: callbacks swap them in during validation only, when nothing is sent.

`WeightAveraging` (EMA) averages after every step, each rank its own weights: that is averaged here. The steps are the
run's, and a slow rank's batch takes several of them at once: where one of these was to be averaged, its end is, once.
`StochasticWeightAveraging` averages as an epoch starts, when all hold the consensus, so its averages are equal already.
Its last epoch trains nothing and takes BatchNorm's statistics anew. It needs the weights that the callback wrote, no
gradients that are left over, no step (Lightning asks for one behind its last batch), and a number of batches, which
data that are shared out by speed do not have. Whatever the method had of the weights before (what a server holds, what
is held back) ends there: it begins anew from the average.
"""

from __future__ import annotations

from collections.abc import Callable
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
        self.strategy.stepping.only_forward = False
        for callback in compat.callbacks(trainer):
            if isinstance(callback, StochasticWeightAveraging) and trainer.current_epoch == callback.swa_end + 1:
                self.strategy.replica.stay()
                self.strategy.consensus.rewritten = True
                self.strategy.stepping.only_forward = module.automatic_optimization
                self._give_length(trainer)
                for optimizer in trainer.optimizers:
                    optimizer.zero_grad()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on each rank averages its own weights."""
        self._equal = False

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages go on behind this hook, also at a meeting. The last batches may be wanted at the end."""
        self._equal = False
        if self.strategy.buffers == "reestimate":
            self.strategy.statistics.keep(batch)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages are validated."""
        self._make_equal(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages are saved."""
        self._make_equal(trainer, module)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Averages are saved, in mid-epoch too. Between meetings a file is one rank's, averages and all."""
        if self.strategy.meeting:
            self._make_equal(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Averages become the weights."""
        self._make_equal(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A later fit finds the length as it was."""
        if self._length is not None:
            trainer.fit_loop.max_batches, self._length = self._length, None

    def _make_equal(self, trainer: Trainer, module: LightningModule) -> None:
        """Called by all. A rank that is through with its epoch comes to the others' meetings with nothing changed."""
        changed, self._equal = not self._equal, True
        for callback in compat.callbacks(trainer):
            if isinstance(callback, WeightAveraging) and (average := compat.average_of(callback)) is not None:
                rounds, buffers = self.strategy.office.rounds, self.strategy.buffers != "local"
                mean = mean_of_averages(average, module, rounds, buffers=buffers, changed=changed)
                self.strategy.together(mean)

    def _give_length(self, trainer: Trainer) -> None:
        if not isinstance(trainer.fit_loop.max_batches, int):
            self._length, trainer.fit_loop.max_batches = trainer.fit_loop.max_batches, MANY


def miss_no_step(trainer: Trainer, leash: compat.Leash) -> None:
    """Ask a WeightAveraging about all steps that the run has taken since it was asked: with `update_every_n_steps=k` a
    rank whose batches end at other steps than multiples of `k` would hardly ever average."""
    for callback in compat.callbacks(trainer):
        if isinstance(callback, WeightAveraging):
            leash.wrap(callback, "should_update", _about_all_steps(callback))


def _about_all_steps(callback: WeightAveraging) -> Callable[..., bool]:
    ask, before = callback.should_update, -1

    def should_update(step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        nonlocal before
        if step_idx is None:
            return ask(epoch_idx=epoch_idx)
        first, before = max(before + 1, compat.averaged_until(callback)), max(before, step_idx)
        return any(ask(step_idx=step) for step in range(first, step_idx + 1))

    return should_update


def mean_of_averages(
    average: AveragedModel, module: nn.Module, rounds: Rounds, *, buffers: bool = True, changed: bool = True
) -> Wait[None]:
    """Give every member the mean of the averages that have begun; where none has, the first member's.

    Only parameters whose average is somewhere another than the weights travel: not those that were always frozen. None
    do where no member's average has `changed` since they were equal.
    """
    averaged = list(average.module.parameters())
    pairs = zip(averaged, module.parameters(), strict=True)
    moved = "".join(str(int(not torch.equal(a, p.to(a.device)))) for a, p in pairs)
    mine = f"{int(changed)}{int(average.n_averaged > 0)}{moved}"
    words = yield from rounds.agree(mine.encode(), what="averages over time")
    if all(word[:1] == b"0" for word in words.values()):
        return
    begun = [rank for rank, word in words.items() if word[1:2] == b"1"] or [min(words)]
    weight = int(rounds.carrier.me in begun)
    anywhere = [a for i, a in enumerate(averaged, start=2) if any(word[i : i + 1] == b"1" for word in words.values())]
    yield from average_weights(anywhere, rounds, weight)
    yield from average_buffers(average, rounds, weight, floats=buffers)
