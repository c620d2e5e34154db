"""Rounds are what is honestly synchronous: numbered, over the members that live, with one outcome for everybody.

    agree:     each member writes its word on the board; a dead member's word becomes ABSENT, whoever notices first.
               First writer wins, so all read the same words, whatever they saw of the death. Each word carries the
               name of what its member is doing: where the names differ, all raise, in place of reading nonsense.
    exchange:  agree who is here -> slices to their owners -> owners' results to all -> agree that all have everything
               (if not, the members that are left start again); what is longer than a message may be, piece by piece

    member 0  --slice 1-->  member 1        owners reduce in the order of ranks, so all get the same bits
    member 0  <-result 1--  member 1        what is short goes whole to everybody: one way is sooner than two

Whoever says its word in a round has read all words of the one before: so those are forgotten then, by all.

Never through the default process group: two crossed all-reduces on one group return wrong sums without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_async.transport.mail import CONTRIBUTION, LONGEST, RESULT, Carrier, Letter, Message, Wait, founders

How = Literal["sum", "mean", "max", "gather"]
CHUNK = 65536
OWNERS = 8  # slices; more would cost links, not gain time
SHORT = 1 << 17  # bytes that each may send in one way: more than in two, but nobody waits for an owner between them
PRESENT, ABSENT = b"+", b"-"
END = b"\n"  # of the name in front of a word


@dataclass
class Rounds:
    """One member's view of the numbered rounds of a run. All members must call the same methods in the same order.

    Attributes:
        carrier: This member's mail and board.
        channel: Each channel counts its own rounds and has its own kinds of messages: 0 for the strategy, 1 for its
            algorithm (whose messages alone are recorded).
        longest: Bytes of the longest body that a link takes.
    """

    carrier: Carrier
    channel: int = 0
    longest: int = LONGEST
    _number: int = 0
    _present: tuple[int, ...] | None = None
    _early: list[Letter] = field(default_factory=list)
    _kept: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the rounds of this channel are called on the board."""
        return f"round{self.channel}"

    def barrier(self) -> Wait[tuple[int, ...]]:
        """Return, with the members that are here, when all of them have called it."""
        words = yield from self.agree(b"", what="barrier")
        return tuple(words)

    def agree(self, word: bytes, *, what: str = "agree") -> Wait[dict[int, bytes]]:
        """Every living member's word by rank: the same dictionary on every member.

        `what` names, in a word or two, what the word is for; if a member is here for something else, all raise.
        """
        self._number += 1
        key = f"{self.name}/{self._number}"
        carrier = self.carrier
        expected = founders(carrier) if self._present is None else self._present  # not who lives: that is seen unlike
        carrier.propose(f"{key}/{carrier.me}", PRESENT + what.encode() + END + word)
        words: dict[int, bytes] = {}
        for peer in expected:
            words[peer] = yield from self._word(key, peer, what)
        self._forget_all_but([f"{key}/{peer}" for peer in expected])
        here = {peer: w[1:].split(END, 1) for peer, w in words.items() if w[:1] == PRESENT}
        self._present = tuple(here)
        _check_not_crossed({peer: name.decode() for peer, (name, _) in here.items()})
        return {peer: said for peer, (_, said) in here.items()}

    def _forget_all_but(self, read: list[str]) -> None:
        """Each takes its own word of the round before off the board; who died leaves its last ones there."""
        for key in self._kept:
            self.carrier.forget(key, gone=key.endswith(f"/{self.carrier.me}"))
        self._kept = read

    def _word(self, key: str, peer: int, what: str) -> Wait[bytes]:
        """A peer's word, or ABSENT once it is declared dead; the board decides which came first."""
        carrier, place = self.carrier, f"{key}/{peer}"
        while (word := carrier.decided(place)) is None:
            if peer not in carrier.members():
                carrier.propose(place, ABSENT)
                if (word := carrier.decided(place)) is not None:  # at once, where that takes no time: in a hall
                    return word
            yield f"rank {peer} to come to {what!r} ({key})"
        return word

    def exchange(self, tensor: Tensor, how: How = "sum", weight: int = 1) -> Wait[tuple[list[Tensor], tuple[int, ...]]]:
        """Combine a flat tensor of every member; `weight` counts for `how="mean"`.

        Returns ([result], members), or for "gather" (one tensor for each member, members).
        """
        return (yield from self._exchange(f"exchange {how}", tensor, how, weight))

    def collect(self, tensor: Tensor, at: int) -> Wait[tuple[list[Tensor], tuple[int, ...]]]:
        """A flat tensor of every member, at one of them: the others send theirs, and get nothing."""
        return (yield from self._exchange(f"collect at {at}", tensor, "gather", 1, at=at))

    def _exchange(
        self, name: str, tensor: Tensor, how: How, weight: int, at: int | None = None
    ) -> Wait[tuple[list[Tensor], tuple[int, ...]]]:
        device, tensor = tensor.device, tensor.detach().contiguous().view(-1).cpu()
        what = f"{name} {str(tensor.dtype).removeprefix('torch.')}" + ("" if how == "gather" else f" {tensor.numel()}")
        size = max(1, self._longest_of(how) // tensor.element_size())
        while True:
            words = yield from self.agree(b"%d" % tensor.numel(), what=what)
            members, most = tuple(words), max(map(int, words.values()))
            gatherers = members if at is None else (at,)
            pieces: list[list[Tensor]] = []
            for begin in range(0, max(1, most), size):
                piece = tensor[begin : begin + size]
                result = yield from self._attempt(piece, how, weight, members, gatherers)
                done = yield from self.agree(b"1" if result is not None else b"0", what=f"{what}: done")
                if result is None or any(w != b"1" for w in done.values()):
                    break
                pieces.append(result)
            else:
                return [joined(parts).to(device) for parts in zip(*pieces, strict=True)], members

    def _longest_of(self, how: How) -> int:
        """Bytes of the longest piece of a tensor that can go in one attempt."""
        return self.longest

    def broadcast(self, tensor: Tensor, source: int) -> Wait[Tensor]:
        """The source's tensor, on every member."""
        mine = int(self.carrier.me == source)
        result, members = yield from self._exchange(f"broadcast from {source}", tensor, "mean", mine)
        if source not in members:
            raise RuntimeError(f"rank {source} is gone, its tensor cannot be broadcast")
        return result[0]

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(
        self, tensor: Tensor, how: How, weight: int, members: tuple[int, ...], gatherers: tuple[int, ...]
    ) -> Wait[list[Tensor] | None]:
        """All slices by way of their owners; None if a member was lost on the way."""
        me = self.carrier.me
        if how == "gather":
            parts = {r: tensor for r in gatherers if r in members and r != me}
            senders = members if me in gatherers else ()
            mine = yield from self._swap(CONTRIBUTION + 2 * self.channel, parts, senders, weight, members)
            return None if mine is None else [tensor.clone() if r == me else mine[r][0] for r in senders]
        if tensor.numel() * tensor.element_size() * (len(members) - 1) <= SHORT:
            return (yield from self._whole(tensor, how, weight, members))
        owners = members[:OWNERS]
        slices = dict(zip(owners, _cut(tensor, len(owners)), strict=True))
        outgoing = {owner: part for owner, part in slices.items() if owner != me}
        senders = members if me in owners else ()
        came = yield from self._swap(CONTRIBUTION + 2 * self.channel, outgoing, senders, weight, members)
        if came is None:
            return None
        results: dict[int, Tensor] = {}
        outgoing = {}
        if me in owners:
            came[me] = (slices[me], weight)
            results[me] = combined([came[r] for r in members], how)
            outgoing = {r: results[me] for r in members if r != me}
        finished = yield from self._swap(RESULT + 2 * self.channel, outgoing, owners, weight, members)
        if finished is None:
            return None
        results.update({owner: part for owner, (part, _) in finished.items()})
        return [torch.cat([results[owner] for owner in owners])]

    def _whole(self, tensor: Tensor, how: How, weight: int, members: tuple[int, ...]) -> Wait[list[Tensor] | None]:
        """Everybody's tensor to everybody, and each reduces all of it."""
        me = self.carrier.me
        parts = {r: tensor for r in members if r != me}
        came = yield from self._swap(CONTRIBUTION + 2 * self.channel, parts, members, weight, members)
        if came is None:
            return None
        came[me] = (tensor, weight)
        return [combined([came[r] for r in members], how)]

    def _swap(
        self,
        kind: int,
        outgoing: dict[int, Tensor],
        senders: Sequence[int],
        weight: int,
        members: Sequence[int],
    ) -> Wait[dict[int, tuple[Tensor, int]] | None]:
        """Post each peer its part, and collect one part from each sender.

        None if any member of the round died meanwhile: whose part is missing may live, and have given up because of it.
        """
        carrier, number = self.carrier, self._number
        came: dict[int, tuple[Tensor, int]] = {}
        waiting = {r for r in senders if r != carrier.me}
        outgoing = dict(outgoing)
        while outgoing or waiting - came.keys():
            for peer in list(outgoing):
                if carrier.post(peer, Message(kind, outgoing[peer], weight=weight, reference=number)):
                    del outgoing[peer]
            for letter in self._letters(kind, number):
                body = letter.message.body
                came[letter.peer] = (body.clone() if body is not None else torch.empty(0), letter.message.weight)
                carrier.folded(letter)
            missing = sorted(outgoing.keys() | (waiting - came.keys()))
            complete = set(members) <= set(carrier.members())
            if missing and not complete:
                return None
            if missing:
                yield f"rank {missing[0]}'s part in {self.name} {number}"
        return came

    def _letters(self, kind: int, number: int) -> list[Letter]:
        """This round's letters; those of a later round are kept, those of an abandoned one are given back unused."""
        mine, later = [], []
        for letter in self._early + self.carrier.take(kind):
            if letter.message.kind != kind or letter.message.reference > number:
                later.append(letter)
            elif letter.message.reference == number:
                mine.append(letter)
            else:
                self.carrier.folded(letter)
        self._early = later
        return mine


def _check_not_crossed(names: dict[int, str]) -> None:
    """Raise where members are at different things. All have read the same names, so all raise."""
    at: dict[str, list[str]] = {}
    for rank, name in names.items():
        at.setdefault(name, []).append(str(rank))
    if len(at) < 2:
        return
    who = [f"{_ranks(ranks)} at {name!r}" for name, ranks in at.items()]
    raise RuntimeError(
        f"the ranks are at different things: {', '.join(who)}. At a meeting all ranks must call the same things in the "
        "same order, with tensors of the same size and dtype: look for a call that only some ranks make, as under "
        "`if trainer.is_global_zero`"
    )


def _ranks(ranks: list[str]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(ranks)} are"


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """One tensor of its pieces."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _cut(tensor: Tensor, parts: int) -> list[Tensor]:
    size = -(-tensor.numel() // parts)
    return [tensor[i * size : (i + 1) * size] for i in range(parts)]


def combined(parts: list[tuple[Tensor, int]], how: How) -> Tensor:
    """Reduce in the order given. Means are taken in double precision: the mean of equal weights is those weights."""
    first = parts[0][0]
    if how == "max":
        return torch.stack([part for part, _ in parts]).amax(0) if first.numel() else first
    if how == "sum":
        total = first.clone()
        for part, _ in parts[1:]:
            total += part
        return total
    weights = sum(w for _, w in parts)
    mean = torch.empty_like(first)
    for at in range(0, first.numel(), CHUNK):  # in cache: a double of everything would cost its page faults
        here = slice(at, at + CHUNK)
        total = torch.zeros_like(first[here], dtype=torch.float64)
        for part, w in parts:
            if w:
                total.add_(part[here].to(torch.float64), alpha=w / weights)
        mean[here] = total
    return mean
