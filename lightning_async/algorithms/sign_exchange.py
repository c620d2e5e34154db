"""One round of sheets by mail, in which all come to the same bits.

    slices   rank 1 --sheet of slice 0--> rank 0, its server --mean of slice 0, packed again--> all
             2 (n-1)/n of a sheet out and in, however many ranks; what the second packing misses stays with the server
    gather   rank 1 --sheet of all--> everybody, who adds up in the order of ranks
             n-1 sheets out and in, but one way only and packed once: for few ranks

The number of a round travels as `version`: a peer may be a few rounds ahead, and its letters wait for theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.algorithms.press import Press, Rest, Source, Sum
from lightning_async.algorithms.sheets import Cut, Sheet, fingerprint
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Mail, Message, Wait

PART, MEAN = FIRST_FREE_KIND, FIRST_FREE_KIND + 1

Guard = Callable[[Mail, Sequence[int]], bool]
"""Called before each wait, with those that are missing. Raises where they will never come; True: look once more."""
Heard = Callable[[Letter], None]
"""Called with each letter that counts."""


class Exchange(ABC):
    """What both forms share: sheets that are kept, posts that wait for their slot, letters that came early.

    Args:
        press: Packs and unpacks.
        cuts: What is exchanged.
        me: This rank.
        members: All ranks.
        reuse: Whether a rank that sends nothing counts with what it sent last.
        like: A tensor where the model lives.
    """

    def __init__(
        self, press: Press, cuts: Sequence[Cut], me: int, members: Sequence[int], *, reuse: bool, like: Tensor
    ) -> None:
        self.cuts = cuts
        self._press, self.me, self.members, self._reuse, self._like = press, me, tuple(members), reuse, like
        self._unsent: dict[tuple[int, int], Message] = {}
        self._early: list[Letter] = []
        self._firing: tuple[int, ...] = self.members

    @abstractmethod
    def send(self, mail: Mail, number: int, source: Source, rest: Rest) -> None:
        """Pack this rank's part of a round and post what can be posted."""

    @abstractmethod
    def finish(self, mail: Mail, number: int, firing: Iterable[int], guard: Guard, heard: Heard) -> Wait[None]:
        """Return when this rank knows what all agreed on, given who sends in this round."""

    @abstractmethod
    def agreed(self) -> list[tuple[Source, Cut]]:
        """What all agreed on in the last round, in parts."""

    def pass_by(self) -> None:  # noqa: B027  # most have nothing to do
        """A round in which nobody sends."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the coming rounds need of the past ones, with everything that is not the mean's yet under `rest`, and
        under `cuts` a fingerprint of the sheets that it is of."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with sheets of the same fingerprint."""

    def take_over(self, other: Exchange) -> None:
        """Another one made the rounds so far, and letters that came to it early are for this one: a peer that has heard
        all of the last of those rounds is in the next one, while this rank still waits for a third."""
        self._early, other._early = other._early, []

    def _new(self, cut: Cut) -> Sheet:
        return cut.sheet(device=self._like.device)

    def _post(self, peer: int, kind: int, number: int, sheet: Sheet) -> None:
        self._unsent[peer, kind] = Message(kind, sheet.body, version=number)

    def _flush(self, mail: Mail) -> None:
        for peer, kind in list(self._unsent):
            if mail.post(peer, self._unsent[peer, kind]):
                del self._unsent[peer, kind]

    def _receive(
        self, mail: Mail, kind: int, number: int, into: Mapping[int, Sheet], guard: Guard, heard: Heard
    ) -> Wait[None]:
        """One sheet from each of these peers, copied; and all that was to be posted is posted."""
        missing = set(into)
        while True:
            self._flush(mail)
            for letter in self._letters(mail, kind, number):
                body = letter.message.body
                into[letter.peer].fill(body if body is not None else torch.empty(0, dtype=torch.uint8))
                heard(letter)
                mail.folded(letter)
                missing.discard(letter.peer)
            slow = sorted(missing | {peer for peer, _ in self._unsent})
            if not slow:
                return
            if not guard(mail, slow):
                yield f"rank {slow[0]} in round {number} of signs"

    def _letters(self, mail: Mail, kind: int, number: int) -> list[Letter]:
        mine: list[Letter] = []
        early: list[Letter] = []
        for letter in self._early + mail.take(kind):
            due = letter.message.kind == kind and letter.message.version == number
            (mine if due else early).append(letter)
        self._early = early
        return mine


class Gather(Exchange):
    """Everybody hears everybody."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        (self._cut,) = self.cuts
        self._parts = {member: self._new(self._cut) for member in self.members}

    def send(self, mail: Mail, number: int, source: Source, rest: Rest) -> None:
        """Pack one sheet for all."""
        self._press.pack(source, rest, self._parts[self.me])
        for peer in from_here(self.me, self.members):
            self._post(peer, PART, number, self._parts[self.me])
        self._flush(mail)

    def finish(self, mail: Mail, number: int, firing: Iterable[int], guard: Guard, heard: Heard) -> Wait[None]:
        """Collect the sheets of those who send."""
        self._firing = tuple(sorted(firing))
        into = {peer: self._parts[peer] for peer in self._firing if peer != self.me}
        yield from self._receive(mail, PART, number, into, guard, heard)

    def agreed(self) -> list[tuple[Source, Cut]]:
        """The sum of all sheets over the number of ranks."""
        counted = self.members if self._reuse else self._firing
        return [(Sum([self._parts[m] for m in counted], 1 / len(self.members)), self._cut)]

    def state_dict(self) -> dict[str, Any]:
        """The last sheets, where they are used again."""
        parts = {m: self._parts[m].body.cpu().clone() for m in self.members if self._reuse}
        return {"cuts": fingerprint(self.cuts), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for member, body in state["parts"].items():
            self._parts[member].fill(body)


class Slices(Exchange):
    """Each rank is the server of its slice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._of = dict(zip(self.members, self.cuts, strict=True))
        self._mine = self._of[self.me]
        self._servers = [m for m in self.members if self._of[m].nbytes]
        self._out = {m: self._new(self._of[m]) for m in self._servers if m != self.me}
        self._parts = {m: self._new(self._mine) for m in self.members}
        self._means = {m: self._new(self._of[m]) for m in self._servers}
        blocks = self._mine.blocks
        first, last = (blocks[0].start, blocks[-1].stop) if blocks else (0, 0)
        self._rest = Rest(self._like.new_zeros(last - first), base=first)

    def send(self, mail: Mail, number: int, source: Source, rest: Rest) -> None:
        """Pack slice after slice; what is packed travels while the next is."""
        means = self._press.means(source, rest, self.cuts)
        for server in [*from_here(self.me, self.members), self.me]:
            if server in self._servers:
                sheet = self._parts[self.me] if server == self.me else self._out[server]
                self._press.pack(source, rest, sheet, means)
                if server != self.me:
                    self._post(server, PART, number, sheet)
                self._flush(mail)

    def finish(self, mail: Mail, number: int, firing: Iterable[int], guard: Guard, heard: Heard) -> Wait[None]:
        """Serve this rank's slice, then collect all others."""
        self._firing = tuple(sorted(firing))
        if self.me in self._servers:
            into = {peer: self._parts[peer] for peer in self._firing if peer != self.me}
            yield from self._receive(mail, PART, number, into, guard, heard)
            self._press.pack(self._sum(), self._rest, self._means[self.me])
            for peer in from_here(self.me, self.members):
                self._post(peer, MEAN, number, self._means[self.me])
        means = {peer: self._means[peer] for peer in self._servers if peer != self.me}
        yield from self._receive(mail, MEAN, number, means, guard, _nothing)

    def agreed(self) -> list[tuple[Source, Cut]]:
        """The servers' sheets."""
        return [(Sum([self._means[server]]), self._of[server]) for server in self._servers]

    def pass_by(self) -> None:
        """The last means count once more, and the server remembers by how much they are not the mean."""
        if self._reuse and self.me in self._servers:
            self._press.add(self._sum(), self._mine, self._rest)
            self._press.add(Sum([self._means[self.me]], -1.0), self._mine, self._rest)

    def state_dict(self) -> dict[str, Any]:
        """What the server's packing missed, and where they are used again the last sheets."""
        return {
            "cuts": fingerprint(self.cuts),
            "base": self._rest.base,
            "rest": self._rest.vector.cpu().clone(),
            "parts": {m: sheet.body.cpu().clone() for m, sheet in self._parts.items() if self._reuse},
            "means": {m: sheet.body.cpu().clone() for m, sheet in self._means.items() if self._reuse},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._rest.vector.copy_(state["rest"])
        for name, sheets in (("parts", self._parts), ("means", self._means)):
            for member, body in state[name].items():
                sheets[member].fill(body)

    def _sum(self) -> Sum:
        counted = self.members if self._reuse else self._firing
        return Sum([self._parts[m] for m in counted], 1 / len(self.members))


def from_here(me: int, members: Sequence[int]) -> list[int]:
    """The peers in the order of the ring from `me` on, so that not all write to the same one first."""
    at = members.index(me)
    return [*members[at + 1 :], *members[:at]]


def _nothing(letter: Letter) -> None:
    """A server's word is no contribution."""
