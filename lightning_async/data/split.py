"""A member of several ranks has one share, its speaker's: each batch of it is split evenly between them.

    the member's batch   17 18 19 20 21 22 23 24      two ranks      the last one of an epoch   25 26 27
    rank 2               17    19    21    23                                                   25    27
    rank 3                  18    20    22    24                                                   26 25

As a DistributedSampler deals them out. All ranks get equally many, so that none waits for a step that another one does
not take, and the mean over ranks is the mean over samples: where a batch does not divide, its first samples come twice.
The share, its ledger and what others hear of it count each once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_async.data.handed import Handed
from lightning_async.data.order import Items
from lightning_async.data.ranges import Range
from lightning_async.data.share import Share
from lightning_async.transport.mail import Wait
from lightning_async.transport.siblings import Siblings


class SplitShare:
    """One rank's part of its member's share.

    Args:
        whole: The member's share, at its speaker; None at its siblings.
        siblings: The ranks of the member.
    """

    def __init__(self, whole: Share | None, siblings: Siblings) -> None:
        self.whole = whole
        self.epoch = -1
        self._siblings = siblings
        self._place = siblings.ranks.index(siblings.me)
        self._handed = Handed()
        self._ended = False

    @property
    def outstanding(self) -> int:
        """Samples of this rank handed out and not completed."""
        return self._handed.outstanding

    @property
    def dry(self) -> bool:
        """Whether this rank was told that there is no more, and has trained on all it got."""
        return self._ended and not self.outstanding

    def begin_epoch(
        self,
        epoch: int,
        *,
        total: int,
        digest: int = 0,
        done: Sequence[Range] = (),
        limit: int | None = None,
        items: Items | None = None,
    ) -> None:
        """See `Share.begin_epoch`."""
        if self.whole is not None:
            self.whole.begin_epoch(epoch, total=total, digest=digest, done=done, limit=limit, items=items)
        self._ended = self._ended and epoch == self.epoch
        self.epoch = epoch

    def rewind(self) -> None:
        """See `Share.rewind`."""
        if self.whole is not None:
            self.whole.rewind()
        self._handed.back()

    def next_batch(self, size: int, *, spare: bool = False) -> Wait[list[int] | None]:
        """This rank's part of the member's next batch; whether there is one now is said by the speaker."""
        batch = None
        if self.whole is not None:
            batch = yield from self.whole.next_batch(size * len(self._siblings.ranks), spare=spare)
        batch = yield from self._siblings.word("the next batch", batch)
        if batch is None:
            self._ended = True
            return None
        if not batch:
            return []
        part = dealt(batch, len(self._siblings.ranks))[self._place]
        self._handed.give(len(part))
        return part

    def completed(self, samples: int | None = None) -> int:
        """Count the oldest batch as trained on: at the speaker the member's, elsewhere this rank's part of it."""
        if samples is not None:
            raise ValueError(f"a batch that several ranks share is completed as a whole, got `samples`={samples}")
        own = self._handed.trained()
        return own if self.whole is None else self.whole.completed()

    def done(self) -> list[Range]:
        """The speaker tells for all."""
        return [] if self.whole is None else self.whole.done()

    def left_out(self) -> list[Range]:
        """The speaker tells for all."""
        return [] if self.whole is None else self.whole.left_out()

    def expected_batches(self) -> int:
        """As many as the member's; 0 where that is not known."""
        return 0 if self.whole is None else self.whole.expected_batches()

    def abandoned(self) -> int:
        """The speaker tells for all."""
        return 0 if self.whole is None else self.whole.abandoned()

    def settled(self) -> bool:
        """The speaker tells for all."""
        return self.whole is not None and self.whole.settled()

    def memory(self) -> dict[str, Tensor]:
        """The speaker's."""
        return {} if self.whole is None else self.whole.memory()

    def recall(self, memory: dict[str, Tensor]) -> None:
        """The speaker's."""
        if self.whole is not None:
            self.whole.recall(memory)


def dealt(batch: list[int], ranks: int) -> list[list[int]]:
    """A batch, dealt out to so many ranks: equally many for each, the first samples twice where it does not divide."""
    filled = [batch[number % len(batch)] for number in range(-(-len(batch) // ranks) * ranks)]
    return [filled[rank::ranks] for rank in range(ranks)]


def check_loaders_alike(loader: object, siblings: Siblings) -> Wait[None]:
    """Raise where a rank's loader would fetch other batches than its speaker's, or at other times: both would wait."""
    mine = {name: getattr(loader, name, None) for name in ("batch_size", "drop_last", "num_workers", "prefetch_factor")}
    said = yield from siblings.word("its loader", mine)
    for name, value in mine.items():
        if value != said[name]:
            raise RuntimeError(
                f"the ranks of one member need loaders alike: {name}={said[name]} on rank {siblings.speaker}, and "
                f"{name}={value} on rank {siblings.me}"
            )
