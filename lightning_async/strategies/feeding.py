"""A rank trains on its share of one loader's samples, or on streams of its own: which, where they stand, how many come.

load_state_dict    ->  share_out               ->  completed, completed, ...  ->  state_dict
of a checkpoint        Lightning makes its loaders    after each batch                into a checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_async.data.balance import Balance, knobs_of, name_of, refuse_unknown
from lightning_async.data.counts import epoch_batches, limited, samples_in
from lightning_async.data.dealt import Dealt, dealt
from lightning_async.data.heard import DEAF, Ear, Heard, StatefulHeard
from lightning_async.data.kept import KeptShare
from lightning_async.data.loader import counts_samples, drops_last, is_shareable, samples_per_batch, shared_loader
from lightning_async.data.opening import usable
from lightning_async.data.order import Items, Order
from lightning_async.data.ranges import Range, Rest
from lightning_async.data.resume import Interrupted, State, as_ranges, as_tensor
from lightning_async.data.share import Share, make_share
from lightning_async.data.split import SplitShare, check_loaders_alike
from lightning_async.data.stream import Stream, Streams, is_stateful, source_of
from lightning_async.strategies.drawing import Drawing
from lightning_async.strategies.unlike import Sizes
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

if TYPE_CHECKING:
    from lightning_async.strategies.office import Office

STREAM_INSIDE = (
    "with `inner` each batch of a member is split between its ranks, and a stream (an IterableDataset, or a loader "
    "that is no DataLoader) cannot be: use a map-style data set, or leave `inner` out: then each rank has a stream"
)
DATA = 0
"""The page of a member's note that is the share's."""


class Feeding(Sizes):
    """The share of this rank and what the algorithm needs to know of it.

    Attributes:
        limit: Lightning's `limit_train_batches`: so many batches for each rank of a synchronous run (int), or a part of
            the epoch (float). To be set before the loader is shared out. It does not cut a stream.
        batches: Batches that this rank trained on in this run.
        samples: Samples in them.
        under_way: Whether batches of an epoch are being trained on: then its length may be told. Lightning's loop asks
            at other times, and would end the epoch there.
    """

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What stands around what is drawn from loaders of the rank's own."""

    def __init__(self, balance: Balance) -> None:
        super().__init__()
        refuse_unknown(balance)
        self.balance = name_of(balance)
        self._balance = balance
        self.limit: int | float = 1.0
        self.batches = self.samples = 0
        self.under_way = False
        self.share: Share | None = None
        self._kept: tuple[Share, int, bool, int] | None = None
        self._drop_last, self._world, self._ranks = False, 1, 1
        self._speaks, self._siblings = True, 0
        self._total: int | None = None
        self._by_sample = False
        self._begun = True
        self._streams = Streams(self._drawn)
        self._interrupted = Interrupted(rank_zero_warn)
        self._memory: dict[str, Any] = {}
        self._in_mid_epoch = False
        self._tell_epoch: Callable[[int], None] | None = None
        self._tell_dealt: Callable[[Dealt], None] | None = None

    @property
    def dry(self) -> bool:
        """Whether this rank's loader has nothing more in this epoch, and all that it gave is trained on.

        Of several streams that Lightning draws from together, only Lightning knows which one ends the epoch.
        """
        fed = self.share is not None or len(self._streams) > 0
        return fed and self._streams.dry and (self.share is None or self.share.dry)

    def partition(self) -> Tensor | None:
        """The samples that this rank owns by now, by index in the data set; None where none are kept."""
        share = self.share.whole if isinstance(self.share, SplitShare) else self.share
        return share.samples() if isinstance(share, KeptShare) else None

    def share_out(self, loader: object, office: Office, epoch: Callable[[], int]) -> object:
        """The training loader, fed by this rank's share; a stream as it is, but watched."""
        if not is_shareable(loader):
            if office.siblings is not None:
                raise MisconfigurationException(STREAM_INSIDE)
            if not isinstance(loader, DataLoader):
                rank_zero_warn(
                    f"`{type(loader).__name__}` is not a DataLoader: every rank trains on all that it yields"
                )
            return self.watch(loader, office, epoch)
        if not loader.in_order:
            rank_zero_warn(
                "`in_order=False` is not followed: which samples were trained on is booked in their order. Slow "
                "samples of one worker hold up less with a larger `prefetch_factor`"
            )
        self._new_loaders()
        self._batch, self._by_sample = samples_per_batch(loader) * office.size, counts_samples(loader)
        if self.share is not None:
            raise MisconfigurationException(
                "several training loaders cannot be shared out by one share: put the data sets into one DataLoader, or "
                "set `use_distributed_sampler=False` and give each rank its part of each"
            )
        self._drop_last, self._ranks = drops_last(loader), office.size
        self._world, self._speaks, self._siblings = office.members, office.speaks, office.carrier.world - office.members
        if office.siblings is not None:
            office.drive(check_loaders_alike(loader, office.siblings))
        recording, size = office.recording, size_of(loader)
        self.share = self._share(office, size)
        self._tell_epoch = lambda number: recording.epoch(number, size)
        self._tell_dealt = recording.dealt if recording.on else None
        return shared_loader(
            loader,
            self.share,
            drive=office.drive,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),  # as Lightning's own DistributedSampler does
            epoch=epoch(),
            begin=self._begin,
            tell=recording.fetched,
            length=self.told_length,
            opens=partial(recording.opens, loader),
        )

    def watch(self, loader: Any, office: Office | None = None, epoch: Callable[[], int] = int) -> Stream:
        """A loader that is this rank's own: its batches are counted and its state is kept. A log hears of them."""
        self._new_loaders()
        self._batch = getattr(loader, "batch_size", None) or 1
        if source_of(loader) is None and is_stateful(getattr(loader, "dataset", None)):
            rank_zero_warn(
                f"`{type(loader.dataset).__name__}` has a state, but its copies in the workers advance unseen, and a "
                "resumed run begins the stream anew: use a loader with a `state_dict`, as torchdata's "
                "StatefulDataLoader, or `num_workers=0`"
            )
        elif source_of(loader) is None and self._in_mid_epoch:
            rank_zero_warn(
                f"`{type(loader).__name__}` has no state, so this run begins its stream anew and trains again on what "
                "it has trained on: use a loader with a `state_dict`, as torchdata's StatefulDataLoader or litdata's "
                "StreamingDataLoader"
            )
        return self._streams.watch(loader, self._ear(loader, office, epoch))

    def note(self, loader: Any, office: Office | None = None, epoch: Callable[[], int] = int) -> object:
        """A loader that stays as it is: it tells how long an epoch is, if it knows. A log hears of its batches."""
        self._new_loaders()
        ear = self._ear(loader, office, epoch)
        self._streams.note(loader)
        return loader if ear is DEAF else (StatefulHeard if is_stateful(loader) else Heard)(loader, ear)

    def _ear(self, loader: object, office: Office | None, epoch: Callable[[], int]) -> Ear:
        """Who hears of what is drawn from a loader of the rank's own, which may be the first of several."""
        if office is None or not office.recording.hears:
            return DEAF
        first = not self._streams.known
        return Drawing(office.recording, epoch, size_of(loader), first=first, around=self.around)

    @property
    def fed(self) -> str:
        """With what: "numbers" of samples, of a share; a "stream", or "both"; a "split" of the user's own."""
        streams = len(self._streams) > 0
        return ("both" if streams else "numbers") if self.share is not None else "stream" if streams else "split"

    def replace(self) -> None:
        """Lightning is about to make its loaders: they come in the place of those before, drawn from or not."""
        self._begun = True

    def agree(self, rounds: Rounds, *, in_step: bool = False) -> Wait[None]:
        """All ranks made their loaders: what a batch of a member is on average decides how many an epoch has, and how
        long its streams are; who speaks for one says it. Before any of them draws. Raises on all ranks."""
        length = self._streams.batches(1.0) if self._streams.known else None
        yield from self.tell_sizes(rounds, length, speaks=self._speaks)
        if in_step and self.share is not None and len(set(self._batches_of.values())) > 1:
            told = ", ".join(f"on rank {rank}: {size}" for rank, size in self._batches_of.items())
            raise MisconfigurationException(
                f"the batch sizes are unlike ({told}), and all ranks take each step together: equal shares of one data "
                "set would be unequal numbers of batches. So give all ranks one batch_size, or take a mode in which "
                "nobody waits"
            )

    def completed(self, batch: object = None) -> None:
        """A batch was trained on."""
        shared = self.share.completed() if self.share is not None else 0
        self._streams.trained()
        self._drawn()
        self.batches += 1
        mine = samples_in(batch) or self._batch // self._ranks
        self.samples += shared if self._by_sample else mine * self._ranks

    def cut(self) -> None:
        """A limit ends the epoch with the batch under way: streams go on from there in the next one."""
        self._streams.cut()

    def epoch_batches(self) -> int | None:
        """How many batches one rank of a synchronous run has in an epoch; None while that is not known."""
        if self._total is None:
            return self._streams.batches(self.limit) if self._streams.known else None
        span = self._span(self._total)
        return epoch_batches(span, members=self._world, batch=self._mean, drop_last=self._drop_last)

    def foreseen(self, accumulated: int = 1) -> int | None:
        """The same, for who plans ahead: streams may be of unlike lengths, and the run has those of all, each of which
        ends with a step of the batches that are left, if so many make a step."""
        mine = self.epoch_batches()
        if not mine or self.share is not None or (isinstance(self.limit, float) and self.limit < 1.0):
            return mine
        of_all = self.length_of_all(self.limit, accumulated)
        return mine if of_all is None else of_all

    def length(self) -> int | None:
        """How many batches this rank's own streams have in an epoch, limits aside; None while that is not known."""
        return self._streams.batches(1.0) if self._streams.known else None

    def told_length(self) -> int | None:
        """What the loader of a synchronous run says of its length, limits aside; None where it may not be told."""
        if self._total is None or not self.under_way:
            return None
        return epoch_batches(self._total, members=self._world, batch=self._mean, drop_last=self._drop_last)

    def met(self, *, deaths: bool) -> None:
        """All have met: who waited for that goes on with the next epoch. Say what nobody trained on of this one.

        Only a death can leave something, and then the notes are final by now.
        """
        share, self._streams.over = self.share, False
        if deaths and share is not None and share.settled() and (left := share.abandoned()):
            rank_zero_warn(f"{left} samples of epoch {share.epoch} were not trained on: their rank died at its end")

    def close(self) -> None:
        """The run is over."""
        self.under_way = False
        self.share = self._kept = self._total = None
        self.forget()
        self.batches = self.samples = 0
        self._begun, self._by_sample = True, False
        self._tell_epoch = self._tell_dealt = None
        self._streams.clear()
        self._in_mid_epoch = self._streams.over = False
        self._interrupted = Interrupted(rank_zero_warn)
        self._memory = {}

    # -- an epoch that goes on -----------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The epoch and what is done of it, as far as this rank knows; `resume.unite` makes one of those of all."""
        if self.share is None:
            return {"epoch": -1, "done": as_tensor([])}
        return {**self._interrupted.state(self.share), **self.share.memory()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what all ranks of an interrupted run have done. To be called before the loader is shared out."""
        self._interrupted.load(state)
        self._memory = dict(state)

    def left(self, state: Mapping[str, Any]) -> int:
        """How many samples of this epoch are left to a run that goes on from such a state; 0: its epoch is over."""
        return 0 if self._total is None else self._left(self._total, as_ranges(state["done"]))

    def loader_states(self) -> list[Any]:
        """The state of each stream of this rank, as of what was trained on; None where it has none."""
        return self._streams.bookmarks()

    def load_loader_states(self, states: Sequence[Any], *, in_mid_epoch: bool = False, over: bool = False) -> None:
        """Go on with this rank's own streams from there. To be called before the loader is shared out.

        Args:
            states: One for each stream.
            in_mid_epoch: Whether the run was saved in the middle of an epoch.
            over: Whether that epoch was over for who saved these, and not for all.
        """
        self._streams.load(states, in_mid_epoch=in_mid_epoch, over=over)
        self._in_mid_epoch = in_mid_epoch and not over

    def _new_loaders(self) -> None:
        """Lightning makes all its loaders before it draws from one: what comes after that replaces them."""
        if self._begun and (self.share is not None or self._streams.known):
            self._streams.clear()
            self.share = self._total = None
            self._by_sample = False
        self._begun = False

    def _drawn(self) -> None:
        self._begun = True

    def _begin(self, order: Order) -> None:
        """Open the order's epoch at the share, without what is done of it."""
        assert self.share is not None
        done = self._interrupted.begin(order, self._left)
        if self._tell_epoch is not None:
            self._tell_epoch(order.epoch)
        self._drawn()
        self._total = len(order)
        left = self._left(self._total, done)
        if done and 0 < left < self._world * self._unit:
            rank_zero_info(
                f"{left} samples are left of epoch {order.epoch}: some come again, so that each rank has a batch"
            )
        span, items = self._span(self._total), order.items
        if self._tell_dealt is not None:
            self._tell_dealt(self._dealt(items[:span], left))
        self.share.begin_epoch(order.epoch, total=self._total, digest=order.digest, done=done, limit=span, items=items)
        self.share.rewind()

    def _dealt(self, items: Items, left: int) -> Dealt:
        kept = self.balance == "incremental" and knobs_of(self._balance).partition == "kept"
        return dealt(
            items,
            members=self._world,
            batch=self._batch,
            drop_last=self._drop_last,
            equal=self.balance == "equal",
            rest=left,
            grows=kept,
            siblings=self._siblings,
        )

    @property
    def _unit(self) -> int:
        return self._batch if self._drop_last else 1

    def _span(self, total: int) -> int:
        """How many positions the limit leaves."""
        return limited(self.limit, total, members=self._world, batch=self._mean, drop_last=self._drop_last)

    def _left(self, total: int, done: Sequence[Range]) -> int:
        return usable(len(Rest(self._span(total), done)), members=1, unit=self._unit)

    def _share(self, office: Office, size: int) -> Share:
        """The share of the loader before, if that was like this one: its epoch goes on."""
        batch, drop_last = self._batch, self._drop_last
        size = size if self._by_sample and knobs_of(self._balance).partition == "kept" else 0
        if self._kept is None or self._kept[1:] != (batch, drop_last, size):
            share = self._made(office, size)
            share.recall(self._memory if self._kept is None else self._kept[0].memory())
            self._kept = share, batch, drop_last, size
        return self._kept[0]

    def _made(self, office: Office, size: int) -> Share:
        """The member's share; of a member of several ranks its speaker has it, and each rank a part of its batches."""
        siblings = office.siblings
        if siblings is not None and not office.speaks:
            return SplitShare(None, siblings)
        desk = office.desk(DATA)
        share = make_share(self._balance, desk, batch=self._batch, drop_last=self._drop_last, size=size)
        return share if siblings is None else SplitShare(share, siblings)


def size_of(loader: object) -> int:
    """How many samples a loader's data set has; 0 where it does not say."""
    data = getattr(loader, "dataset", None)
    return len(data) if isinstance(data, Sized) else 0
