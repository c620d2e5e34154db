"""SLURM's signal in `validate`, `test` and `predict`: nothing is saved, a place in the queue is asked for, once.

    any rank      heard .. before its next batch, or in a wait: says so on the board
    first rank    heard, or read there: asks, between two batches or in a wait

In the signal handler nobody may wait for the others, so there the signal is only counted, as in a fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_async.strategies import compat
from lightning_async.strategies.wishes import Requeue

if TYPE_CHECKING:
    from lightning_async.strategies.collectives import Collectives


class Unsaved:
    """What one rank hears of it.

    Args:
        strategy: Whose.
    """

    def __init__(self, strategy: Collectives) -> None:
        self._strategy, self._requeue, self._said = strategy, Requeue(), 0

    def begin(self, trainer: Trainer, leash: compat.Leash) -> None:
        """An evaluation begins."""
        self._requeue, self._said = Requeue(), 0
        self._trainer, self._carrier = trainer, self._strategy.office.carrier
        self._stage = trainer.state.fn.value if trainer.state.fn is not None else "an evaluation"
        self._save_and_ask = leash.replace("_signal_connector._slurm_sigusr_handler_fn", self._requeue.hear)
        if getattr(self._strategy.cluster_environment, "auto_requeue", False):
            self._strategy.office.flags.heed = self.look

    def look(self) -> None:
        """Say what was heard, or do what is said. Called wherever flags are looked at, up to the farewell."""
        carrier, requeue = self._carrier, self._requeue
        if carrier.me != carrier.members()[0]:
            while self._said < requeue.heard:
                self._said += 1
                carrier.propose(f"requeue/{self._said}", b"")
        elif requeue.wanted or carrier.decided(f"requeue/{requeue.answered + 1}") is not None:
            requeue.answer()
            rank_zero_warn(
                f"{self._strategy.name}: SLURM's signal came in `{self._stage}`: a place in the queue is "
                "asked for, and nothing is saved, since nothing is trained. The next job begins with the script: let a "
                "`fit` in it go on from a checkpoint of its own"
            )
            compat.requeue_unsaved(self._trainer, self._save_and_ask)
