"""A replay trains on the recorded batches: the user's loader with the log's samples in the place of its sampler's.

log: batch 1 [4 8 1], batch 2 [0 7 3], ...  -->  the loader's data set and collate function

Samples of data of a member's own (a stream, a split of the user's own) have no numbers: the loader is drawn from as in
the run, from where it stood then, by who sees the member's rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from lightning_async.data.counts import epoch_batches
from lightning_async.data.heard import Ear, drawn
from lightning_async.data.loader import (
    drops_last,
    is_shareable,
    positions_of,
    remade,
    samples_per_batch,
    told,
)
from lightning_async.strategies.course import WrongInput
from lightning_async.strategies.feeding import Feeding, size_of
from lightning_async.strategies.office import Office
from lightning_async.strategies.replaying import Replaying
from lightning_async.transport.replay import ReplayCarrier
from lightning_async.transport.world import seen_as


class RecordedFeeding(Feeding):
    """Feeds the recorded batches.

    Args:
        carrier: Knows them.
        replaying: Is told what was trained on.
        mass: What a step of this member weighed.
        lengths: By epoch, how many batches its loader had: with a length Lightning fetches none ahead.
        skipped: The batches that were fetched in vain first.
    """

    def __init__(
        self,
        carrier: ReplayCarrier,
        replaying: Replaying,
        mass: int,
        *,
        lengths: Mapping[int, int] | None = None,
        skipped: Iterable[list[Any]] = (),
    ) -> None:
        super().__init__("equal")
        self._lengths, self._skipped = lengths or {}, iter(skipped)
        self._epoch: Callable[[], int] = int
        self._replaying, self._recorded_mass = replaying, mass
        self._coming = iter(carrier.epochs())
        self._fetched: deque[list[Any]] = deque()
        self._positions: int | None = None
        self.around = partial(seen_as, carrier.me, carrier.ranks)

    @property
    def mass(self) -> int:
        """What a step of this member weighed."""
        return self._recorded_mass

    def share_out(self, loader: object, office: Office, epoch: Callable[[], int]) -> object:
        """A loader like the user's, with the recorded batches."""
        if not is_shareable(loader):
            raise WrongInput(
                f"the training data are a {type(loader).__name__} here, but the recorded samples are numbers: give a "
                "DataLoader on a data set with numbered samples"
            )
        assert isinstance(loader, DataLoader)
        size, single, recording = size_of(loader), loader.batch_sampler is None, office.recording
        self._batch, self._drop_last = samples_per_batch(loader) * office.size, drops_last(loader)
        self._world, self._ranks, self._speaks = office.members, office.size, office.speaks
        self._positions, self._epoch = positions_of(loader), epoch

        def began() -> None:
            recording.epoch(epoch(), size)

        kind = _SizedBatches if self._lengths else _Batches
        batches = kind(self, began, recording.fetched, single=single)
        seeds = torch.Generator() if loader.num_workers else None
        fed = cast(_There, remade(loader, batches, kind=_There, generator=seeds))
        fed.around, fed.opens = self.around, recording.opens
        return fed

    def told_length(self) -> int | None:
        """As in the run."""
        if self._positions is None or not self.under_way:
            return None
        return epoch_batches(self._positions, members=self._world, batch=self._mean, drop_last=self._drop_last)

    def loader_length(self) -> int:
        """How many batches the loader has in this epoch."""
        epoch = self._epoch()
        return self._lengths[epoch if epoch in self._lengths else max(self._lengths)]

    def skipped(self) -> Iterator[list[Any]]:
        """The batches that are not trained on, once."""
        return self._skipped

    def next_epoch(self) -> Iterator[list[Any]]:
        """The batches of the next epoch; what was fetched before is not trained on any more."""
        self._fetched.clear()
        for batch in next(self._coming, []):
            self._fetched.append(batch)
            yield batch

    def completed(self, batch: object = None) -> None:
        """The oldest batch was trained on."""
        if self._fetched:
            self._replaying.samples = self._fetched.popleft()
            self.batches += 1
            self.samples += len(self._replaying.samples)


class DrawnFeeding(Feeding):
    """Feeds what the member draws from data of its own, as it drew then.

    Args:
        carrier: Knows which member.
        replaying: Is told what was trained on.
        mass: What a step of this member weighed.
    """

    def __init__(self, carrier: ReplayCarrier, replaying: Replaying, mass: int) -> None:
        super().__init__("equal")
        self._replaying, self._recorded_mass = replaying, mass
        self.around = partial(seen_as, carrier.me, carrier.ranks)

    @property
    def mass(self) -> int:
        """What a step of this member weighed."""
        return self._recorded_mass

    def share_out(self, loader: object, office: Office, epoch: Callable[[], int]) -> object:
        """The same stream."""
        if is_shareable(loader):
            raise WrongInput(
                f"the run trained on streams, and the data set here, a {type(loader.dataset).__name__}, is none: give "
                "the run's own training data"
            )
        return super().share_out(loader, office, epoch)

    def completed(self, batch: object = None) -> None:
        """The oldest batch that was drawn was trained on."""
        super().completed(batch)
        self._replaying.batches = self.batches


class _There(DataLoader[Any]):
    """A loader whose data set and workers see the member's rank."""

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    opens: Callable[[DataLoader[Any]], None] = staticmethod(lambda loader: None)

    def __iter__(self) -> Any:
        self.opens(self)
        with self.around():
            iterator = super().__iter__()
        return drawn(iterator, _Around(self.around))


class _Around(Ear):
    """Hears nothing, but stands there."""

    def __init__(self, around: Callable[[], AbstractContextManager[object]]) -> None:
        self._around = around

    def draws(self) -> AbstractContextManager[object]:
        return self._around()


class _Batches:
    """A batch sampler that says what it does. Its length is told as in the run: Lightning fetches ahead."""

    def __init__(
        self, feeding: RecordedFeeding, began: Callable[[], None], fetched: Callable[[Any], None], *, single: bool
    ) -> None:
        self._feeding, self._began, self._fetched, self._single = feeding, began, fetched, single

    def __len__(self) -> int:
        return told(self._feeding.told_length())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        for batch in self._feeding.skipped():
            yield self._given(batch)
        self._began()
        for batch in self._feeding.next_epoch():
            self._fetched(batch)
            yield self._given(batch)

    def _given(self, batch: list[Any]) -> Any:
        return batch[0] if self._single else batch


class _SizedBatches(_Batches):
    """The same with a length."""

    def __len__(self) -> int:
        return self._feeding.loader_length()
