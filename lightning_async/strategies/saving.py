"""What Lightning saves, loads and removes is a checkpoint of all ranks at meetings, and of one rank alone between them.

save_checkpoint      MEETING: the consensus, and beside it each rank's own (`checkpoints.py`)
                     alone: this rank's weights, and a warning that says so; never where a consensus lies
                     asked by a cut, between meetings: the cut's (`cuts.py`)
                     after the run: the consensus, and of the ranks' own the first one's
load_checkpoint      MEETING: all decide together how the run goes on
remove_checkpoint    the main file, then the files of all ranks

A run that was told to end, and whose ranks could not meet within its grace, ends as one that failed: a rank may save on
its way out, and what is looked for under a ModelCheckpoint's names is what all saved. So its weights are put aside:

    step=20.ckpt          the consensus, as it was saved at a meeting; `last.ckpt` is it, or a link to it, as before
    step=37.ckpt.rank0    what rank 0 had when it stopped: plain weights and optimizers, for who wants them
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.strategies import compat, foreign
from lightning_async.strategies.checkpoints import Checkpoints
from lightning_async.strategies.collectives import Collectives
from lightning_async.strategies.cuts import Cuts
from lightning_async.strategies.waiting import PeerFailedError

log = logging.getLogger(__name__)


class Saving(Collectives):
    """Gives Lightning's file operations their meaning.

    Attributes:
        checkpoints: Saves and restores the run, seen from this rank.
        cuts: The same between meetings, where a strategy can.
    """

    checkpoints: Checkpoints
    cuts: Cuts

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """The consensus, and beside it what each rank has of its own. Between meetings there is none: say so."""
        if self.cuts.first.asking:
            self.cuts.first.save(checkpoint, filepath, storage_options)
            return
        if self.meeting and self.checkpoints.holds_all(checkpoint):
            self.checkpoints.before_save()
            self.together(self.checkpoints.save(checkpoint, filepath, storage_options))
            return
        if not self.meeting and self.office.is_open:
            filepath = self._of_one_rank(filepath)
        if not self.office.is_open and self.world_size > 1 and "optimizer_states" in checkpoint:
            rank_zero_info(
                f"{self.name}: a checkpoint that is saved after `fit` holds the consensus, but of each rank's own "
                "state only the first one's: to go on exactly, let `ModelCheckpoint(save_last=True)` save in the run"
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _of_one_rank(self, filepath: Any) -> Any:
        """Where this rank's weights go, and who is told so: what all saved is not replaced by them."""
        if self.aside or (self.world_size > 1 and self.is_global_zero and self.checkpoints.lie_at(filepath)):
            filepath = f"{os.fspath(filepath)}.rank{self.global_rank}"
            rank_zero_warn(
                f"{self.name}: the ranks are not together, so {filepath} holds the weights of this one, not the "
                "consensus; what all saved before stays where it is, to go on from"
            )
            return filepath
        rank_zero_warn(
            f"{self.name}: a checkpoint between meetings holds the weights of one rank, not the consensus; save at "
            "the end of an epoch"
        )
        return filepath

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """What Lightning restores on this rank. Read by all ranks."""
        load = partial(super().load_checkpoint, checkpoint_path, weights_only=weights_only, **options)
        checkpoint = foreign.read(load, checkpoint_path, self.name)
        if not self.meeting:
            return checkpoint
        return self.together(self.checkpoints.load(checkpoint_path, checkpoint, weights_only=weights_only))

    def remove_checkpoint(self, filepath: Any) -> None:
        """The main file, then the files of all ranks."""
        if self.cuts.first.asking:
            self.cuts.first.remove_behind(partial(self.remove_checkpoint, filepath))
            return
        path, remove = self.checkpoints.agreed(filepath), super().remove_checkpoint
        self.checkpoints.behind(lambda: remove(path))
        if self.is_global_zero:
            self.checkpoints.remove(path)


def guard_exits(trainer: Trainer, leash: compat.Leash, strategy: Collectives) -> None:
    """What a ModelCheckpoint saves on an exception is one rank's, unless all stop together: its name says so, no link
    leads to it, and no older one goes for it. And whatever a callback, a datamodule or a logger does then, this rank
    leaves the run."""
    for callback in compat.callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and strategy.world_size > 1:
            leash.wrap(callback, "on_exception", partial(_put_aside, callback, strategy, callback.on_exception))
        leash.wrap(callback, "on_exception", partial(_leave_all_the_same, strategy, callback.on_exception))
    if (data := getattr(trainer, "datamodule", None)) is not None:
        leash.wrap(data, "on_exception", partial(_leave_all_the_same, strategy, data.on_exception))
    for logger in trainer.loggers:
        leash.wrap(logger, "finalize", partial(_finalize, strategy, logger.finalize))


def _finalize(strategy: Collectives, finalize: Callable[[str], None], status: str) -> None:
    """Where a run ends well, Lightning's own way out follows."""
    if status == "success":
        finalize(status)
    else:
        _leave_all_the_same(strategy, finalize, status)


def _put_aside(callback: ModelCheckpoint, strategy: Collectives, save: Callable[..., None], *exception: Any) -> None:
    if strategy.meeting:
        save(*exception)
        return
    save_last, callback.save_last, strategy.aside = callback.save_last, None, True
    try:
        save(*exception)
    finally:
        callback.save_last, strategy.aside = save_last, False


def _leave_all_the_same(strategy: Collectives, hook: Callable[..., None], *exception: Any) -> None:
    """Lightning leaves its teardown out where somebody raises on the way out: the others would count on this rank.

    The end of the run may come into a save, where the grace is over. That is no exception of its own: what is under way
    is told, and what else is saved is this rank's.
    """
    try:
        hook(*exception)
    except (SIGTERMException, PeerFailedError) as stopped:
        strategy.alone = True
        why = "the grace is over" if isinstance(stopped, SIGTERMException) else stopped
        log.warning("what rank %d saved on its way out is left out: %s", strategy.global_rank, why)
    except BaseException:
        with suppress(Exception):
            strategy.teardown()
        raise
