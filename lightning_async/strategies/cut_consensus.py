"""What the first rank gathers of a cut: what all say of their parts, and the sum of what these bring into consensus.

    rank 2    part complete    says so on the board; posts mass * weights and what was under way, piece by piece
    rank 0                     hears it; adds each piece up in double precision, in its writer's thread
    all there                  the consensus of the cut: (sum of mass * weights + under way) / (sum of masses)

The sum travels by links and not by files: the folder of a checkpoint need not be one that all ranks share. Nobody waits
for it: a slot that is taken is tried again behind the next batch.

A link keeps the memory in which something arrived. So the pieces of all others together are as long as one vector, or
16 MB each: the first rank holds no more of them at a time, however many ranks there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_async.algorithms.cut import Part, Sum
from lightning_async.strategies.cut_files import Record, said_of_data
from lightning_async.transport.mail import LONGEST, Carrier

PIECE = 1 << 24
"""Bytes that a piece has at least, if there are so many: each takes about two batches."""


class Gathering:
    """One cut, seen by the rank that began it.

    Args:
        number: The cut's number.
        steps: The run's step at which it was due.
        carrier: This rank's mail and board.

    Attributes:
        total: What has come so far.
        by_death: Whether it can become none because somebody died: then the next one may.
    """

    def __init__(self, number: int, steps: int, carrier: Carrier) -> None:
        self.number, self.steps = number, steps
        self.total = Sum()
        self.by_death = False
        self._carrier = carrier
        self._began = carrier.now()
        self._members = carrier.members()
        self._said: dict[int, dict[str, Any]] = {}
        self._added: set[int] = set()

    def add(self, rank: int, body: Tensor, mass: int, *, at: int = 0, numel: int | None = None) -> None:
        """A piece of what a part brings (`Sum.add`); in the writer's thread."""
        self.total.add(body, mass, at=at, numel=numel)
        if numel is None or at + body.numel() == numel:  # a link keeps their order
            self._added.add(rank)

    def hear(self) -> None:
        """What was said since."""
        for rank in self._members:
            if rank not in self._said and (word := self._carrier.decided(key(self.number, rank))) is not None:
                self._said[rank] = json.loads(word)
                self._carrier.forget(key(self.number, rank), gone=True)
                if rank == self._carrier.me:
                    self._members = tuple(self._said[rank]["members"])  # as they were when it recorded

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        members = {*self._members}
        return members <= self._said.keys() and members <= self._added

    @property
    def counts(self) -> dict[int, bytes]:
        """What each had trained on."""
        return {rank: bytes.fromhex(said["counts"]) for rank, said in self._said.items()}

    @property
    def data(self) -> list[Mapping[str, Any]]:
        """What each had completed of the epoch."""
        return [said["data"] for said in self._said.values()]

    @property
    def members(self) -> tuple[int, ...]:
        """Whose parts make it."""
        return self._members

    def why_not(self, limit: float) -> str:
        """Why it becomes none, in words; "" as long as it may."""
        here = self._carrier.members()
        for rank, said in self._said.items():
            self.by_death = bool(said["deaths"]) or tuple(said["members"]) != self._members
            if said["deaths"]:
                return f"rank {said['deaths'][0]} died before its marker reached rank {rank}"
            if self.by_death:
                return (
                    f"rank {rank} recorded it among ranks {said['members']}, and rank {self._carrier.me} among others"
                )
        missing = [rank for rank in self._members if rank not in self._said or rank not in self._added]
        for rank in missing:
            if rank not in here:
                self.by_death = True
                return f"rank {rank} died before its part was here"
        waited = self._carrier.now() - self._began
        if missing and waited > limit:
            return f"the part of rank {missing[0]} was not here after {waited:.0f} s (`meeting_timeout`)"
        return ""


def piece_of(nbytes: int, members: int) -> int:
    """Bytes of the longest piece of a vector that each of the others sends to the first."""
    return min(LONGEST, nbytes, max(PIECE, -(-nbytes // max(1, members - 1))))


def key(number: int, rank: int | None = None) -> str:
    """Where on the board something is said of a cut: by a rank of its part, or by the first of what becomes of it."""
    return f"cut/{number}" if rank is None else f"cut/{number}/{rank}"


def said_of(part: Part[Record]) -> bytes:
    """What a rank says of its part."""
    said: dict[str, Any] = {"members": part.members, "deaths": part.deaths}
    if not part.deaths:
        said |= {"counts": part.state.counts.hex(), "data": said_of_data(part.state)}
    return json.dumps(said).encode()
