"""Who owns which sample, for as long as a run lasts: samples are only ever added to a member, never taken from it.

    slots     |  part 1: 0 . 1 .. 2 .  |  part 2: 0 . 1 ... 2  |  not allotted yet      |      a part more an epoch
    samples   one shuffled order of the data set, so that no member gets a class or a folder to itself

The samples of a member that has left go to the others, by the same measure as a new part. If a member is there that
was not before (a run that goes on with more of them), all is cut anew.

`by_owner` numbers the positions of an epoch so that each member's are a range:

    positions      0 1 2 3 4 5 6 7            numbers   0 1 2 | 3 4 5 6 7
    owners         1 0 1 1 0 1 0 1                      1 4 6   0 2 3 5 7
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from numbers import Integral

import torch
from torch import Tensor

from lightning_async.data.order import shuffled
from lightning_async.data.ranges import Range, cut, joined

NOBODY = -1


class Partition:
    """The slots of each member.

    Args:
        size: How many samples there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.given = 0
        self.epoch = -1
        self._slots: dict[int, list[Range]] = {}

    def owned(self, rank: int) -> int:
        """How many samples a member has."""
        return sum(amount for _, amount in self._slots.get(rank, ()))

    def freed(self, members: Iterable[int]) -> list[Range]:
        """The slots that were given and belong to none of these members, who are all that are left."""
        if not self._known(members := set(members)):
            return [(0, self.given)]
        return joined(sorted(pair for rank, own in self._slots.items() if rank not in members for pair in own))

    def kept(self, members: Iterable[int]) -> list[int]:
        """What each of these members has and keeps."""
        known = self._known(members := list(members))
        return [self.owned(rank) if known else 0 for rank in members]

    def add(self, epoch: int, sizes: Sequence[Range]) -> None:
        """All members that are left, and how many more samples each gets from this epoch on: freed ones, then new."""
        members, amount = [rank for rank, _ in sizes], sum(n for _, n in sizes)
        freed = self.freed(members)
        new = amount - sum(n for _, n in freed)
        ranges, begin = [*freed, (self.given, new)], 0
        known = self._known(members)
        slots = {rank: list(self._slots.get(rank, ())) if known else [] for rank in members}
        for rank, n in sizes:
            slots[rank] = joined([*slots[rank], *cut(ranges, begin, n)])
            begin += n
        self._slots, self.given, self.epoch = slots, self.given + new, epoch

    def samples(self, rank: int) -> Tensor:
        """The samples of a member, by their index in the data set, in order."""
        order = shuffled(self.size, 0)
        parts = [order[first : first + amount] for first, amount in self._slots.get(rank, ())]
        return torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.int64)

    def owners(self) -> Tensor:
        """The rank that owns each sample of the data set, or `NOBODY`."""
        slots = torch.full((self.size,), NOBODY, dtype=torch.int32)
        for rank, own in self._slots.items():
            for first, amount in own:
                slots[first : first + amount] = rank
        owners = torch.empty_like(slots)
        owners[shuffled(self.size, 0)] = slots
        return owners

    def state_dict(self) -> dict[str, Tensor]:
        """As it lies in a checkpoint."""
        rows = [(rank, *pair) for rank, own in sorted(self._slots.items()) for pair in own or [(0, 0)]]
        return {
            "partition": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
            "partition_at": torch.tensor([self.size, self.given, self.epoch]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> bool:
        """Go on with it; False if it is the partition of other data."""
        size, given, epoch = state["partition_at"].tolist()
        if size != self.size:
            return False
        self.given, self.epoch, self._slots = given, epoch, {}
        for rank, *pair in state["partition"].tolist():
            self._slots.setdefault(rank, []).extend([(pair[0], pair[1])] if pair[1] else [])
        return True

    def _known(self, members: Iterable[int]) -> bool:
        """Whether all of them were here before."""
        return set(members) <= set(self._slots)


class ByOwner:
    """The positions of an epoch, numbered member by member.

    Args:
        owners: The owner of each position, or `NOBODY`.
        members: All that must have some.
        least: How many each must have: taken from those that have most, or, where all have few, repeated.
    """

    def __init__(self, owners: Tensor, members: Sequence[int], *, least: int = 1) -> None:
        groups = {rank: (owners == rank).nonzero().reshape(-1) for rank in members}
        if any(len(group) for group in groups.values()):
            _make_up(groups, least)
        self.seats = tuple((rank, len(group)) for rank, group in groups.items())
        self._positions = torch.cat(list(groups.values()))

    def __len__(self) -> int:
        return len(self._positions)

    def positions(self, first: int, amount: int) -> Iterator[Range]:
        """The positions that have the `amount` numbers from `first` on."""
        return ((position, 1) for position in self._positions[first : first + amount].tolist())


def _make_up(groups: dict[int, Tensor], least: int) -> None:
    for rank in groups:
        while (short := least - len(groups[rank])) > 0:
            richest = max(groups, key=lambda r: len(groups[r]))
            spare = min(short, max(0, len(groups[richest]) - least)) if richest != rank else 0
            found = groups[richest][len(groups[richest]) - spare :] if spare else groups[richest][:short]
            groups[richest] = groups[richest][: len(groups[richest]) - spare]
            groups[rank] = torch.cat([groups[rank], found])


def positions_of(owners: Tensor, items: Sequence[object] | Tensor, span: int) -> Tensor:
    """The owner of each of the first `span` positions of an order."""
    if not isinstance(items, (Tensor, range)) and not all(isinstance(item, Integral) for item in islice(items, 1000)):
        raise ValueError(
            "`partition='kept'` gives samples to members for good, and the sampler yields no indices of samples: use a "
            "DataLoader with a sampler of indices (no batch sampler of your own), or `partition='redrawn'`"
        )
    return owners[torch.as_tensor(items[:span], dtype=torch.int64)]
