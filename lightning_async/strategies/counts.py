"""The Trainer's counts are taken from it for the time of a run, and become points at which all ranks have come so far.

    max_steps, min_steps, every_n_train_steps   steps of the run: so many updates of each member
    val_check_interval, limit_train_batches     batches of each member; as a float, a part of the epoch
    meet_every                                  samples of all

Left to Lightning, each would be one rank's count. Callbacks that act by such a count are asked at meetings (`asking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.progress.agenda import Due, Item
from lightning_async.progress.tally import Unit
from lightning_async.strategies import compat

if TYPE_CHECKING:
    from lightning_async.strategies.feeding import Feeding

BY_TIME = 0.0
"""The `val_check_interval` of a Trainer that validates by time: Lightning gives it none. Not 1.0, once an epoch."""
NEVER = 2**62
"""A batch before which Lightning never validates by itself."""


class Counts:
    """What one Trainer was told.

    Args:
        meet_every: Samples of all members between two meetings; None: only where something else asks for one.

    Attributes:
        val_seconds: The time between two validations, if they go by time.
        at_end: Whether a validation stands at the end of an epoch.
        by_cut: Whether this callback's saves by steps need no meeting.
    """

    def __init__(self, meet_every: int | None) -> None:
        if meet_every is not None and (
            not isinstance(meet_every, int) or isinstance(meet_every, bool) or meet_every < 1
        ):
            raise ValueError(f"`meet_every` must be an integer of at least 1 (samples), or None, got {meet_every!r}")
        self.val_seconds: float | None = None
        self.at_end = True
        self._meet_every = meet_every
        self.by_cut: Callable[[ModelCheckpoint], bool] = _never
        self._taken: dict[str, Any] = {}
        self._val_every: int | float = 1.0

    @property
    def taken(self) -> bool:
        """Whether the Trainer's counts are the run's: not in a trial run of a few batches."""
        return bool(self._taken)

    def take(self, trainer: Trainer, feeding: Feeding) -> None:
        """Take over what Lightning would read as one rank's. Before the loaders are made."""
        if compat.fast_dev_run(trainer) or trainer.limit_train_batches == 0:
            return
        self.val_seconds = compat.val_seconds(trainer)
        if self.val_seconds is not None:
            trainer.val_check_interval = BY_TIME
        self._taken = {name: getattr(trainer, name) for name in ("limit_train_batches", "val_check_interval")}
        self._val_every = 1.0 if self.val_seconds is not None else trainer.val_check_interval
        feeding.limit = trainer.limit_train_batches
        trainer.limit_train_batches = 1.0

    def limit(self, trainer: Trainer) -> int | float:
        """The `limit_train_batches` that the user gave."""
        limit: int | float = self._taken.get("limit_train_batches", trainer.limit_train_batches)
        return limit

    @contextmanager
    def unread(self, trainer: Trainer) -> Iterator[None]:
        """For what in Lightning's loops would go by one rank's count or clock: it reads that nothing was asked for.

        Callbacks read what the user said: by that they choose between the ends of validations and those of epochs.
        """
        if not self.taken:
            yield
            return
        with compat.with_val_seconds(trainer, None):
            trainer.val_check_interval = 1.0
            try:
                yield
            finally:
                trainer.val_check_interval = self._taken["val_check_interval"]

    def put_back(self, trainer: Callable[[], Trainer]) -> None:
        """They are Lightning's again. Idempotent."""
        for name, value in self._taken.items():
            setattr(trainer(), name, value)
        if self.val_seconds is not None:
            del trainer().val_check_interval
        self._taken, self.val_seconds = {}, None

    def cuts(self, feeding: Feeding) -> bool:
        """Whether a limit ends the epochs of streams."""
        return self.taken and feeding.share is None and feeding.limit != 1.0

    def go_by_length(self, feeding: Feeding) -> bool:
        """Whether something goes by how long the epoch of streams is, each of which may have a length of its own."""
        every, limit = self._val_every, feeding.limit
        goes = isinstance(every, int) or every < 1.0 or (isinstance(limit, float) and limit < 1.0)
        return self.taken and feeding.share is None and goes

    def check_alike(self, feeding: Feeding, lengths: Mapping[int, bytes]) -> None:
        """Refuse a part of streams of unlike lengths, on all ranks: one may end before the part that falls to it."""
        if isinstance(feeding.limit, float) and feeding.limit < 1.0 and len(set(lengths.values())) > 1:
            said = ", ".join(f"{word.decode() or 'an unknown number'} on rank {rank}" for rank, word in lengths.items())
            raise MisconfigurationException(
                f"`limit_train_batches={feeding.limit}` is a part of streams of unlike lengths, in batches: {said}; "
                "give a number of batches"
            )

    def items(self, trainer: Trainer, feeding: Feeding, n: int, total: int | None) -> Iterator[Item]:
        """What is due when all have come so far together: `n` is what a step of the run counts for, and `total` an
        epoch's batches of all."""
        if not self.taken:
            return
        if self.cuts(feeding):  # before all that falls on the same batch: who is appointed to it fetches no further one
            batches = feeding.limit * n if isinstance(feeding.limit, int) else total
            if batches is None:
                raise _part_of_unknown("limit_train_batches", feeding.limit)
            yield Item(Due.END_EPOCH, Unit.BATCHES, int(batches), in_epoch=True)
        if trainer.max_steps > 0:
            yield Item(Due.NOTHING, Unit.UPDATES, trainer.max_steps * n, once=True)
        if trainer.min_steps:  # who was told to stop by then stops there
            yield Item(Due.NOTHING, Unit.UPDATES, trainer.min_steps * n, once=True)
        for callback in compat.callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and (every := compat.saves_every(callback)):
                if self.by_cut(callback):
                    continue
                yield Item(Due.NOTHING, Unit.UPDATES, every * n)
        if self._meet_every is not None:
            yield Item(Due.NOTHING, Unit.SAMPLES, self._meet_every)
        yield from self._validations(trainer, feeding, n, total)

    def _validations(self, trainer: Trainer, feeding: Feeding, n: int, total: int | None) -> Iterator[Item]:
        every, in_epoch = self._val_every, trainer.check_val_every_n_epoch is not None
        length = None if total is None else total // n
        if isinstance(every, float) and every < 1.0:
            if length is None:
                raise _part_of_unknown("val_check_interval", every)
            every = max(1, int(length * every))
        self.at_end = self.val_seconds is None and (every == 1.0 and isinstance(every, float))
        if isinstance(every, int):
            if in_epoch and trainer.limit_val_batches > 0:
                _check_is_reached(every, n, total)
            self.at_end = in_epoch and total is not None and total % (every * n) == 0
            below = total if total and in_epoch else None
            yield Item(Due.VALIDATE, Unit.BATCHES, every * n, in_epoch=in_epoch, below=below)


def _never(callback: ModelCheckpoint) -> bool:
    return False


def _check_is_reached(every: int, n: int, total: int | None) -> None:
    """Refuse to validate never. Of streams whose length nobody knows, only a limit says when an epoch is over."""
    if total is not None and every * n > total:
        raise ValueError(
            f"`val_check_interval` ({every}) must be at most the number of batches that each rank of a synchronous run "
            f"has in an epoch ({total // n}): no validation would ever come. To count batches across epochs set "
            "`check_val_every_n_epoch=None`; to validate never, `limit_val_batches=0`"
        )


def _part_of_unknown(name: str, value: float) -> MisconfigurationException:
    return MisconfigurationException(
        f"`{name}={value}` is a part of an epoch whose length nobody knows; give a number of batches"
    )
