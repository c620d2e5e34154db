"""The user's DataLoader, fed by a share: same data set, collation and workers, other indices, and no `__len__`.

    share --next_batch--> SharedBatches --> workers --> training        (pulled by the training thread)
      ^-------------------- completed --------------------'

Without a length Lightning takes the end of the iterator as the epoch's end; with one, an epoch that ends early is not
recognised and its validation is silently skipped. The share knows what is on its way: handed out less completed.

What becomes of each kind of loader:
 - map-style data set, any sampler: its samples are shared.
 - the user's own batch sampler: its batches are shared whole, one batch counts as one sample for the share.
 - `batch_size=None`: single items are shared.
 - IterableDataset: unchanged, each rank has its own stream. There is nothing to share: it has no positions.
 - not a DataLoader: unchanged, with a warning.
 - a DataLoader class with an iterator of its own: refused, its iterator would bypass the share.
One share feeds one loader: with several training loaders, each needs its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_async.data.order import Order
from lightning_async.data.share import Share, drive

Puller = Callable[[], "list[int] | None"]
Teller = Callable[[Any], object]


class SharedBatches:
    """A batch sampler that pulls from a share. It has no length on purpose.

    Args:
        share: Where the positions come from.
        order: What they stand for; named `sampler` so that Lightning finds its `set_epoch`.
        pull: Gets the next positions from the share, waiting if it must.
        whole: One position is one batch of the user's own batch sampler.
        tell: Is told what each batch consists of.
        began: Is told the number of each epoch, before its first batch is asked for.
    """

    def __init__(
        self,
        share: Share,
        order: Order,
        pull: Puller,
        *,
        whole: bool = False,
        tell: Teller | None = None,
        began: Teller | None = None,
    ) -> None:
        self.share = share
        self.sampler = order
        self._pull = pull
        self._whole = whole
        self._tell = tell
        self._began = began

    def __iter__(self) -> Iterator[Any]:
        order = self.sampler
        if self._began is not None:
            self._began(order.epoch)
        self.share.begin_epoch(order.epoch, total=len(order), digest=order.digest)
        self.share.rewind()
        while (positions := self._pull()) is not None:
            batch = order[positions[0]] if self._whole else [order[p] for p in positions]
            if self._tell is not None:
                self._tell(batch)
            yield batch


def samples_per_batch(loader: object) -> int:
    """The `batch` a share for this loader is made with; 1 where the share counts batches or single items."""
    sampler = getattr(loader, "batch_sampler", None)
    return int(sampler.batch_size) if type(sampler) is BatchSampler else 1


def drops_last(loader: object) -> bool:
    """The `drop_last` a share for this loader is made with."""
    sampler = getattr(loader, "batch_sampler", None)
    return bool(sampler.drop_last) if type(sampler) is BatchSampler else False


def is_shareable(loader: object) -> bool:
    """Whether `shared_loader` will feed this loader from a share, or leave it as it is."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def shared_loader(
    loader: object,
    share: Share,
    *,
    wait: Callable[[float], None],
    now: Callable[[], float],
    seed: int = 0,
    epoch: int = 0,
    patience: float = 600.0,
    tell: Teller | None = None,
    began: Teller | None = None,
) -> object:
    """A loader like `loader` whose batches come from `share`.

    Args:
        loader: The user's loader, as it comes to a strategy's `process_dataloader`.
        share: This member's share, made with `samples_per_batch(loader)` and `drops_last(loader)`.
        wait: Returns when something new may be there, at the latest after so many seconds.
        now: Seconds on a clock.
        seed: The seed of the shuffling, the same on every rank.
        epoch: The epoch the first iterator belongs to; later ones are told by `set_epoch`.
        patience: Seconds after which waiting for the store ends with a `TimeoutError`.
        tell: Is told what each batch consists of, as it goes to the loader.
        began: Is told the number of each epoch, before its first batch is asked for.
    """
    if not patience > 0:
        raise ValueError(f"`patience` must be above 0, got {patience}")
    if not isinstance(loader, DataLoader):
        name = type(loader).__name__
        warnings.warn(f"`{name}` is not a DataLoader: every rank trains on all of it, as it comes", stacklevel=2)
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return loader
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"`{type(loader).__name__}` has an iterator of its own, which would bypass the sharing of the samples; "
            'use a plain DataLoader for training, or `balance="equal"` with your own split between the ranks'
        )
    source, size, whole = _parts(loader)
    order = Order(source, seed=seed, epoch=epoch)

    def pull() -> list[int] | None:
        return drive(share.next_batch(size), wait=wait, now=now, patience=patience)

    return _remade(loader, SharedBatches(share, order, pull, whole=whole, tell=tell, began=began))


def recorded_loader(loader: DataLoader[Any], batches: Iterable[Any]) -> DataLoader[Any]:
    """A loader like `loader` that fetches these batches, in this process."""
    single: dict[str, Any] = {"batch_size": None, "sampler": batches}
    options = single if loader.batch_sampler is None else {"batch_sampler": batches}
    return DataLoader(loader.dataset, collate_fn=loader.collate_fn, generator=loader.generator, **options)


def _parts(loader: DataLoader[Any]) -> tuple[Any, int, bool]:
    """What the positions stand for, how many make a batch, and whether each is what the data set's fetcher gets."""
    batches: Any = loader.batch_sampler
    if batches is None:
        return loader.sampler, 1, True
    if type(batches) is BatchSampler:
        return batches.sampler, batches.batch_size, False
    return batches, 1, True


def _remade(loader: DataLoader[Any], batches: SharedBatches) -> DataLoader[Any]:
    single: dict[str, Any] = {"batch_size": None, "sampler": batches}
    options: dict[str, Any] = single if loader.batch_sampler is None else {"batch_sampler": batches}
    if loader.pin_memory_device:
        options["pin_memory_device"] = loader.pin_memory_device
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
        **options,
    )
