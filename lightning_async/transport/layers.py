"""Two layers: between members only their speakers are seen, and what is combined over all ranks goes through them.

    ranks       0 1 2 3 | 4 5 6 7          inside: to the speaker      between: speakers alone      inside: back to all
    speakers    0       | 4                0 <- 1, 2, 3                0 <-> 4                      0 -> 1, 2, 3

A member goes by its speaker's number. So whoever knows only members (an algorithm, the shares of the data, the run's
progress) works as if its siblings were ranks that died before the run began.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_async.transport.mail import LONGEST, Carrier, Wait
from lightning_async.transport.rounds import How, Rounds, combined
from lightning_async.transport.siblings import Siblings


class Speakers:
    """A carrier on which only the speakers are members; all else of it is as it is.

    Args:
        carrier: This rank's mail and board.
        speakers: The first rank of each member.
    """

    def __init__(self, carrier: Carrier, speakers: Iterable[int]) -> None:
        self._carrier, self.speakers = carrier, tuple(speakers)

    @property
    def world(self) -> int:
        """How many members the run began with."""
        return len(self.speakers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def members(self) -> tuple[int, ...]:
        """Those not declared dead. A speaker without one of its siblings leaves, so none of these is half a member."""
        return tuple(rank for rank in self._carrier.members() if rank in self.speakers)

    def live(self) -> tuple[int, ...]:
        """Those heard of lately."""
        return tuple(rank for rank in self._carrier.live() if rank in self.speakers)


class LayeredRounds(Rounds):
    """Rounds of all ranks, whose tensors go between members once.

    Words go over the board, as ever. What is gathered is everybody's own, and goes by the speakers too: else each rank
    would need a link to all others.

    Args:
        carrier: This rank's mail and board.
        siblings: The ranks of its member.
        speakers: The first rank of each member.
        longest: Bytes of the longest body that a link takes.
    """

    def __init__(self, carrier: Carrier, siblings: Siblings, speakers: Iterable[int], longest: int = LONGEST) -> None:
        super().__init__(carrier, longest=longest)
        self._siblings, self._speakers = siblings, frozenset(speakers)

    def _longest_of(self, how: How) -> int:
        """What is gathered travels between members as one body of all siblings' pieces, of the largest member's too."""
        if how != "gather":
            return self.longest
        siblings = self.carrier.world - len(self._speakers) + 1  # of a member, at most
        return (self.longest - HEAD * (1 + 2 * siblings)) // siblings

    def _attempt(
        self, tensor: Tensor, how: How, weight: int, members: tuple[int, ...], gatherers: tuple[int, ...]
    ) -> Wait[list[Tensor] | None]:
        if how == "gather" and gatherers != members:
            return (yield from super()._attempt(tensor, how, weight, members, gatherers))
        if how == "gather":
            return (yield from self._gathered(tensor, members))
        siblings, result = self._siblings, None
        parts = yield from siblings.collect(tensor, weight)
        if siblings.speaks:
            weight = sum(each for _, each in parts)
            speakers = tuple(rank for rank in members if rank in self._speakers)
            mine = combined(parts, how) if weight or how != "mean" else tensor
            result = yield from super()._attempt(mine, how, weight, speakers, speakers)
        done = yield from siblings.word("whether a round is done", result is not None)
        return [(yield from siblings.spread(result[0] if result else None))] if done else None

    def _gathered(self, tensor: Tensor, members: tuple[int, ...]) -> Wait[list[Tensor] | None]:
        """Everybody's tensor, in the order of ranks; they may be of unlike length. None: nobody has that of one whose
        speaker died; it will be missing in the next attempt."""
        siblings, packed = self._siblings, None
        parts = yield from siblings.collect(tensor, 1)
        if siblings.speaks:
            mine = _packed({rank: part for rank, (part, _) in zip(siblings.ranks, parts, strict=True)})
            speakers = tuple(rank for rank in members if rank in self._speakers)
            found = yield from super()._attempt(mine, "gather", 1, speakers, speakers)
            packed = None if found is None else torch.cat(found)
        done = yield from siblings.word("whether a round is done", packed is not None)
        if not done:
            return None
        of_all = _unpacked((yield from siblings.spread(packed)), tensor.dtype)
        return [of_all[rank] for rank in members] if of_all.keys() >= set(members) else None


def _packed(parts: dict[int, Tensor]) -> Tensor:
    """As bytes: how many there are, then whose and how many bytes each, then these."""
    sizes = [(rank, part.nbytes) for rank, part in parts.items()]
    head = torch.tensor([len(sizes), *(number for size in sizes for number in size)])
    return torch.cat([part.contiguous().view(torch.uint8) for part in (head, *parts.values())])


def _unpacked(whole: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
    """What was packed, of any number of members one behind the other."""
    found, at = dict[int, Tensor](), 0
    while at < whole.numel():
        count = int(whole[at : at + HEAD].clone().view(torch.int64))
        sizes = whole[at + HEAD : at + HEAD + 2 * count * HEAD].clone().view(torch.int64).view(count, 2).tolist()
        at += HEAD + 2 * count * HEAD
        for rank, size in sizes:
            found[rank] = whole[at : at + size].clone().view(dtype)
            at += size
    return found


HEAD = 8
"""Bytes of a number."""
