"""What an epoch deals out, for who checks it afterwards: how many samples, which may miss, which may come again.

order      4 8 1 0 7 3 | 2 9 5 6         a limit leaves 6 samples, all unlike
drop_last  each member leaves out less than a batch
equal      all get equally many: less than one for each member comes twice
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_async.data.order import Items


@dataclass(frozen=True, slots=True)
class Dealt:
    """An epoch's samples.

    Attributes:
        samples: How many the order has, as far as a limit leaves it.
        unlike: How many of them differ: a sampler may draw one several times.
        missing: How many of these may not come.
        again: How many may come once more than the order has them.
        grows: Only a part is dealt out yet: what came in an epoch comes in the next one, too.
    """

    samples: int
    unlike: int
    missing: int = 0
    again: int = 0
    grows: bool = False

    def plain(self) -> dict[str, Any]:
        """For a log."""
        return asdict(self)


def dealt(
    items: Items, *, members: int, batch: int, drop_last: bool, equal: bool, rest: int, grows: bool, siblings: int = 0
) -> Dealt:
    """What members with batches of this size get of `items`, of which `rest` positions are not done yet; so many ranks
    have a sibling that speaks for them: a member's last batch need not divide, and each may have one sample twice."""
    flat, longest = _flat(items)
    unlike = len(items) if isinstance(items, (torch.Tensor, range)) else len(set(map(repr, flat)))
    few = rest < members * (batch if drop_last else 1)  # then some come again, so that each has a batch
    again = members * batch if few else members - 1 if equal and not drop_last else 0
    missing = members * batch - 1 if drop_last else 0
    return Dealt(len(flat), unlike, missing * longest, (again + siblings) * longest, grows)


def dealt_in_turn(loader: DataLoader[Any], *, cut: bool) -> Dealt | None:
    """What the readers of a loader get together, if each reads its sampler from end to end; None: the sampler is the
    user's own. With `cut`, a limit may end the epoch anywhere."""
    batches: Any = loader.batch_sampler
    source: Any = batches.sampler if type(batches) is BatchSampler else None
    if type(source) is DistributedSampler:
        readers, samples, unlike = source.num_replicas, source.total_size, min(source.total_size, _size(source))
    elif type(source) is SequentialSampler or (type(source) is RandomSampler and not source.replacement):
        readers, samples, unlike = 1, len(source), min(len(source), len(source.data_source))
    else:
        return None
    missing = unlike if cut else readers * (batches.batch_size - 1) if batches.drop_last else 0
    return Dealt(samples, unlike, missing)


def _size(sampler: DistributedSampler[Any]) -> int:
    return len(sampler.dataset) if isinstance(sampler.dataset, Sized) else sampler.total_size


def _flat(items: Items) -> tuple[Any, int]:
    """The samples of the positions, and of how many the longest one is: one may be a batch of the user's own."""
    if isinstance(items, (torch.Tensor, range)) or not all(isinstance(item, (list, tuple)) for item in items):
        return items, 1
    parts: Iterable[Any] = items
    return list(chain.from_iterable(parts)), max(map(len, items), default=1)
