"""Feeding: which samples this rank trains on, seen from the strategy: one share, made with the training loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_async.algorithms.gossip import UNIT
from lightning_async.data.loader import drops_last, is_shareable, samples_per_batch, shared_loader
from lightning_async.data.share import Balance, Share, make_share

if TYPE_CHECKING:
    from lightning_async.strategies.office import Office


class Feeding:
    """The share of this rank and what the algorithm needs to know of it."""

    def __init__(self, balance: Balance) -> None:
        if balance == "incremental":
            raise ValueError(
                "`balance='incremental'` comes with the async_global strategy; use 'claim' or 'equal' here"
            )
        if balance not in get_args(Balance):
            raise ValueError(f"`balance` must be 'claim' or 'equal', got {balance!r}")
        self.balance = balance
        self.share: Share | None = None
        self._batch = 1
        self._epoch: int | None = None
        self._made_for: tuple[int, bool] | None = None

    @property
    def mass(self) -> int:
        """What a step of this rank weighs: a member with larger batches counts for more, each sample for the same."""
        return UNIT * self._batch

    def share_out(self, loader: object, office: Office, epoch: Callable[[], int]) -> object:
        """The training loader, fed by this rank's share."""
        self._batch = samples_per_batch(loader) if is_shareable(loader) else getattr(loader, "batch_size", None) or 1
        if not is_shareable(loader):
            self.share = None
            if not isinstance(loader, DataLoader):
                rank_zero_warn(
                    f"`{type(loader).__name__}` is not a DataLoader: every rank trains on all that it yields"
                )
            return loader
        if self._epoch == epoch():
            raise MisconfigurationException(
                "several training loaders cannot be shared out by one share: put the data sets into one DataLoader, or "
                "set `use_distributed_sampler=False` and give each rank its part of each"
            )
        self._epoch = epoch()
        made_for = (self._batch, drops_last(loader))
        if self.share is None or self._made_for != made_for:
            self._made_for = made_for
            self.share = make_share(self.balance, office.carrier, batch=self._batch, drop_last=drops_last(loader))
        recording, size = office.recording, size_of(loader)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # as Lightning's own DistributedSampler does
        return shared_loader(
            loader,
            self.share,
            wait=office.glance,
            now=office.carrier.now,
            seed=seed,
            epoch=epoch(),
            patience=office.limit,
            tell=recording.fetched,
            began=lambda number: recording.epoch(number, size),
        )

    def completed(self) -> None:
        """A batch was trained on."""
        if self.share is not None:
            self.share.completed()

    def epoch_ended(self, *, deaths: bool) -> None:
        """Say what nobody trained on. Only a death can leave something, and then the notes are final by now."""
        share = self.share
        if deaths and share is not None and share.settled() and (left := share.abandoned()):
            rank_zero_warn(f"{left} samples of epoch {share.epoch} were not trained on: their rank died at its end")

    def close(self) -> None:
        """The run is over."""
        self.share = self._epoch = None


def size_of(loader: object) -> int:
    """How many samples a loader's data set has; 0 where it does not say."""
    data = getattr(loader, "dataset", None)
    return len(data) if isinstance(data, Sized) else 0
