"""The user's DataLoader, fed by a share: same data set, collation and workers, other indices, and no `__len__`.

    share --next_batch--> SharedBatches --> workers --> training        (pulled by the training thread)
      ^-------------------- completed --------------------'

Without a length Lightning takes the end of the iterator as the epoch's end; with one, an epoch that ends early is not
recognised and its validation is silently skipped. The share knows what is on its way: handed out less completed.

What becomes of each kind of loader:
 - map-style data set, any sampler: its samples are shared.
 - the user's own batch sampler: its batches are shared whole, one batch counts as one sample for the share.
 - `batch_size=None`: single items are shared.
 - IterableDataset, or not a DataLoader: not shareable, each rank has its own stream (`stream.py`). There is nothing to
   share: it has no positions.
 - a DataLoader class with an iterator of its own: refused, its iterator would bypass the share.
One share feeds one loader: with several training loaders, each needs its own.

Workers' queues are filled before the first step, when no speed is known. The share may leave them shorter then: the
iterator of batches says "no more" and has more later. A loader with workers asks once for each batch that comes out of
it, and ends when it has none on its way; so each worker is left one, whatever the share says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeGuard

from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_async.data.order import Order, pick
from lightning_async.data.share import Share
from lightning_async.transport.mail import Wait

Beginner = Callable[[Order], None]
Driver = Callable[[Wait["list[int] | None"]], "list[int] | None"]
Puller = Callable[[bool], "list[int] | None"]
Teller = Callable[[Any], object]


class SharedBatches:
    """A batch sampler that pulls from a share. It has no length for Lightning's loop, which would stop there.

    Args:
        order: What the positions stand for; named `sampler` so that Lightning finds its `set_epoch` in a batch sampler.
        begin: Opens the order's epoch at the share, and may turn the order to another one.
        pull: Gets the next positions from the share, waiting if it must; none if told that they are to spare.
        whole: One position is one batch of the user's own batch sampler.
        tell: Is told what each batch consists of.
        length: What it says of its length, where one may be told.
        spare: How many batches the loader's workers can do without.
        opens: Is called before an iterator draws the seed of its workers.
    """

    def __init__(
        self,
        order: Order,
        begin: Beginner,
        pull: Puller,
        *,
        whole: bool = False,
        tell: Teller | None = None,
        length: Callable[[], int | None] = lambda: None,
        spare: int = 0,
        opens: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampler = order
        self._begin = begin
        self._pull = pull
        self._whole = whole
        self._tell = tell
        self._length, self._spare, self._opens = length, spare, opens

    def __len__(self) -> int:
        return told(self._length())

    def __bool__(self) -> bool:
        return True

    def set_epoch(self, epoch: int) -> None:
        """Where this is the loader's sampler itself (`batch_size=None`), and not its batch sampler."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        self._opens()
        return _Pausing(self._batches())

    def _batches(self) -> Iterator[Any]:
        self._begin(self.sampler)
        items = self.sampler.items  # Lightning may turn the order to the next epoch while this one is on its way
        spare = self._spare
        while (positions := self._pull(spare > 0)) is not None:
            if not positions:
                spare -= 1
                yield _PAUSE
                continue
            picked = pick(items, positions)
            batch = picked[0] if self._whole else picked
            if self._tell is not None:
                self._tell(batch)
            yield batch


_PAUSE = object()


class _Pausing:
    """Says "no more" at a pause too, and goes on when it is asked again."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        if batch is _PAUSE:
            raise StopIteration
        return batch


def told(length: int | None) -> int:
    """This length of an epoch, or a sentence for who asks where it may not be told."""
    if length is None:
        raise TypeError(
            "how many batches this rank has is not known before the epoch is over: ranks share it out as they go. "
            "While batches are trained on, the length is told that each rank of a synchronous run has; elsewhere "
            "ask `trainer.estimated_stepping_batches`, or the length of your own DataLoader"
        )
    return length


def samples_per_batch(loader: object) -> int:
    """The `batch` a share for this loader is made with; 1 where the share counts batches or single items."""
    sampler = getattr(loader, "batch_sampler", None)
    return int(sampler.batch_size) if type(sampler) is BatchSampler else 1


def drops_last(loader: object) -> bool:
    """The `drop_last` a share for this loader is made with."""
    sampler = getattr(loader, "batch_sampler", None)
    return bool(sampler.drop_last) if type(sampler) is BatchSampler else False


def is_shareable(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether `shared_loader` can feed this loader from a share."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def positions_of(loader: DataLoader[Any]) -> int | None:
    """How many positions an epoch has; None where the sampler has no length."""
    source, _, _ = _parts(loader)
    return len(source) if isinstance(source, Sized) else None


def counts_samples(loader: DataLoader[Any]) -> bool:
    """Whether a position is one sample, and not a batch of the user's own or an item of `batch_size=None`."""
    return type(loader.batch_sampler) is BatchSampler


def shared_loader(
    loader: DataLoader[Any],
    share: Share,
    *,
    drive: Driver,
    seed: int = 0,
    epoch: int = 0,
    begin: Beginner | None = None,
    tell: Teller | None = None,
    length: Callable[[], int | None] = lambda: None,
    opens: Callable[[], None] = lambda: None,
) -> DataLoader[Any]:
    """A loader like `loader` whose batches come from `share`.

    Args:
        loader: The user's loader, as it comes to a strategy's `process_dataloader`.
        share: This member's share, made with `samples_per_batch(loader)` and `drops_last(loader)`.
        drive: Runs a `Wait` to its end.
        seed: The seed of the shuffling, the same on every rank.
        epoch: The epoch the first iterator belongs to; later ones are told by `set_epoch`.
        begin: Opens the order's epoch at the share; None: all of it, as it comes.
        tell: Is told what each batch consists of, as it goes to the loader.
        length: What the loader says of its length: None where Lightning's loop would take it for the end.
        opens: Is called before an iterator draws the seed of its workers.
    """
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"`{type(loader).__name__}` has an iterator of its own, which would bypass the sharing of the samples; "
            'use a plain DataLoader for training, or `balance="equal"` with your own split between the ranks'
        )
    source, size, whole = _parts(loader)
    order = Order(source, seed=seed, epoch=epoch)

    def pull(spare: bool) -> list[int] | None:
        return drive(share.next_batch(size, spare=spare))

    def begin_all(order: Order) -> None:
        share.begin_epoch(order.epoch, total=len(order), digest=order.digest, items=order.items)
        share.rewind()

    spare = loader.num_workers * ((loader.prefetch_factor or 1) - 1)
    batches = SharedBatches(
        order, begin or begin_all, pull, whole=whole, tell=tell, length=length, spare=spare, opens=opens
    )
    return remade(loader, batches)


def _parts(loader: DataLoader[Any]) -> tuple[Any, int, bool]:
    """What the positions stand for, how many make a batch, and whether each is what the data set's fetcher gets."""
    batches: Any = loader.batch_sampler
    if batches is None:
        return loader.sampler, 1, True
    if type(batches) is BatchSampler:
        return batches.sampler, batches.batch_size, False
    return batches, 1, True


def remade(
    loader: DataLoader[Any],
    batches: Iterable[Any],
    *,
    kind: type[DataLoader[Any]] = DataLoader,
    generator: Generator | None = None,
) -> DataLoader[Any]:
    """A loader like `loader` that fetches these batches; of this `kind`, with a `generator` for its workers' seeds."""
    single: dict[str, Any] = {"batch_size": None, "sampler": batches}
    options: dict[str, Any] = single if loader.batch_sampler is None else {"batch_sampler": batches}
    if loader.pin_memory_device:
        options["pin_memory_device"] = loader.pin_memory_device
    return kind(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator or loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=True,  # what was trained on is booked in the order in which it was handed out
        **options,
    )
