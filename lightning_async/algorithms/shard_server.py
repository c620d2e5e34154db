"""One shard at its owner: W moves by exactly gamma * Q * correction at each arrival, and the version counts arrivals.

    PUSH (correction, base k, what it counts)  -->  gamma by how late it is  -->  outer rule  -->  W, version + 1
                                               <--  ANSWER (W, version, by how much it counted)

It is a function of its arrivals alone: no clock, no thread, no mail. All that it is fits into one vector of bytes: that
is its mirror, and nearly all of its part of a checkpoint. An arrival that is not finite moves nothing and still gets
its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT, Shrink, no_shrink
from lightning_async.algorithms.outer import Outer
from lightning_async.algorithms.shards import MILLION, NOT_FINITE
from lightning_async.algorithms.weighting import (
    Attenuation,
    Bound,
    Law,
    bound_among,
    excess_rounds,
    excess_versions,
    normalised,
    paper,
)
from lightning_async.arrival import Arrival
from lightning_async.fresh import Lately
from lightning_async.transport.mail import Letter

OnLate = Literal["shrink", "drop", "wait"]


@dataclass(frozen=True)
class Rules:
    """How a shard treats arrivals, the same on all members.

    Attributes:
        attenuation: The law's name.
        law: What an excess of so many rounds is worth.
        max_delay: More versions of excess than so many are late (see `weighting`).
        on_late: Late arrivals are shrunk to what they would count at the bound, dropped, or made impossible by letting
            fast members wait.
        make_outer: Makes the merge rule, given the weights.
    """

    attenuation: Attenuation
    law: Law
    max_delay: Bound
    on_late: OnLate
    make_outer: Callable[[Tensor], Outer]


@dataclass
class ShardServer:
    """The weights of one shard, and what became of all that arrived.

    Attributes:
        rules: How arrivals are treated.
        weights: W.
        members: The ranks that live.
        version: How many arrivals there were.
        orphaned: The version at which it was begun anew from some member's weights, because nobody had its books; -1
            otherwise: then `pushed` is complete.
        bases: The version that each member started from.
        pausing: The members that push nothing until all have met.
        unheard: The members of which nothing has come since the shard was taken over. They pull before they push, so
            none of them can be late; and whether they are pausing, only the old owner may have known.
        pushed: The step of each member's last arrival.
        paces: Microseconds of each member's step.
        worths: What each member's last arrival weighed.
        counts: How many arrivals were folded, shrunk, dropped as late, or not finite.
        shrink: Who is asked before an arrival is merged, at that time.
        lately: Where it was moved lately, for a law that asks; it is no part of a mirror: an heir begins anew.
        outer: The merge rule.
    """

    rules: Rules
    weights: Tensor
    members: tuple[int, ...]
    version: int = 0
    orphaned: int = -1
    bases: dict[int, int] = field(default_factory=dict)
    pausing: dict[int, int] = field(default_factory=dict)
    unheard: set[int] = field(default_factory=set)
    pushed: dict[int, int] = field(default_factory=dict)
    paces: dict[int, int] = field(default_factory=dict)
    worths: dict[int, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("folded", "shrunk", "dropped", "refused"), 0))
    shrink: Callable[[], Shrink] = lambda: no_shrink
    lately: Lately = field(default_factory=Lately)
    outer: Outer = field(init=False)

    def __post_init__(self) -> None:
        self.outer = self.rules.make_outer(self.weights)
        self.bases = self.bases or dict.fromkeys(self.members, 0)

    # -- arrivals -----------------------------------------------------------------------------------------------------

    def must_wait(self, base: int) -> bool:
        """Whether an arrival has to wait for slower members, so that these do not become too late by it.

        Those that started from the oldest version never wait, so this ends. They may make each other n - 1 versions
        later, which is kept free for them.
        """
        bound = bound_among(len(self.members), self.rules.max_delay)
        if self.rules.on_late != "wait" or bound is None:
            return False
        away = self.unheard.union(self.pausing)
        slower = [k for member, k in self.bases.items() if k < base and member not in away]
        return bool(slower) and self.version + 1 - min(slower) > bound + len(self.members) - 1

    def arrive(self, letter: Letter, correction: Tensor, *, last: bool = False) -> int:
        """Merge a correction; millionths by which it counted beside one that is in time, or NOT_FINITE."""
        message, peer = letter.message, letter.peer
        said = self._merged(letter, correction) if message.weight else MILLION  # 0: a word that nothing is left
        self.pushed[peer] = message.step
        if message.echo > 0:
            self.paces[peer] = message.echo
        self.handed_out(peer)
        if last:
            self.pausing[peer] = self.version
        return said

    def _merged(self, letter: Letter, correction: Tensor) -> int:
        message = letter.message
        delay = max(0, self.version - message.version)
        said = NOT_FINITE
        if is_finite(correction):
            factor = self._factor(letter, delay, correction)
            if factor > 0:
                gamma = self._gamma(letter, delay) * factor
                self._merge(letter, correction, gamma)
                if self.lately.asked:
                    self.lately.add(correction, gamma)
            said = round(factor * MILLION)
        self._count(said)
        self.version += 1
        return said

    def handed_out(self, peer: int) -> None:
        """A member starts from these weights."""
        self.bases[peer] = self.version
        self.pausing.pop(peer, None)
        self.unheard.discard(peer)

    def newest(self, peer: int) -> int:
        """The step of a member's newest push in these weights; 0: none, -1: not known."""
        return self.pushed.get(peer, 0 if self.orphaned < 0 else -1)

    def hear(self, members: Iterable[int]) -> None:
        """Who lives."""
        self.members = tuple(members)
        maps: list[dict[int, Any]] = [self.bases, self.pausing, self.paces, self.worths]
        for known in maps:
            for gone in set(known).difference(self.members):
                del known[gone]

    @property
    def fastest(self) -> int:
        """Microseconds of the fastest member's step; 0: not known."""
        return min(self.paces.values(), default=0)

    def _merge(self, letter: Letter, correction: Tensor, gamma: float) -> None:
        self.outer.arrive(self.weights, correction, gamma, len(self.members))

    def _gamma(self, letter: Letter, delay: int) -> float:
        n, base = len(self.members), letter.message.version
        if self.rules.attenuation == "paper":
            bases = {**self.bases, letter.peer: base}
            return letter.message.weight / UNIT * paper(base, self.version, bases.values(), n)
        worth = letter.message.weight * self.rules.law(excess_rounds(delay, n))
        self.worths[letter.peer] = worth
        return normalised(worth, self.worths.values(), n)

    def _factor(self, letter: Letter, delay: int, correction: Tensor) -> float:
        factor, n = 1.0, len(self.members)
        excess, bound = excess_versions(delay, n), bound_among(n, self.rules.max_delay)
        if bound is not None and excess > bound:
            if self.rules.on_late == "drop":
                return 0.0
            factor = (bound + n) / (excess + n)
        if (shrink := self.shrink()) is not no_shrink:
            m = letter.message
            arrival = Arrival(letter.peer, m.version, m.version, m.version + delay, letter.seconds, m.samples)
            factor *= shrink(arrival, correction, partial(self.lately.cosine, correction))
        return factor

    def _count(self, said: int) -> None:
        word = {NOT_FINITE: "refused", 0: "dropped", MILLION: "folded"}.get(said, "shrunk")
        self.counts[word] += 1

    # -- all that it is -----------------------------------------------------------------------------------------------

    def image(self) -> Tensor:
        """It as bytes: numbers, then the weights and what the outer rule remembers."""
        maps: list[Mapping[int, int]] = [self.bases, self.pausing, self.pushed, self.paces]
        head = [self.version, self.orphaned, self.outer.count, len(self.worths), *(len(one) for one in maps)]
        rows = [number for one in maps for pair in sorted(one.items()) for number in pair]
        whole = torch.tensor([*head, *self.counts.values(), *rows, *self.worths], dtype=torch.int64)
        worths = torch.tensor(list(self.worths.values()), dtype=torch.float64)
        parts = (whole, worths, self.weights, *self.outer.tensors, *self._more())
        return torch.cat([part.view(torch.uint8) for part in parts])

    def _more(self) -> tuple[Tensor, ...]:
        """What stands behind all that in an image."""
        return ()

    def saved(self) -> Tensor:
        """Its part of a checkpoint: its image, and behind that where it was moved lately, if a law asks for that."""
        mean = self.lately.mean
        return self.image() if mean is None else torch.cat([self.image(), mean.view(torch.uint8)])

    def go_on(self, saved: Tensor) -> None:
        """Be what was saved. All go on."""
        mean = saved[self.become(saved) :].clone().view(self.weights.dtype)
        self.lately.go_on(mean if mean.numel() else None)
        self.pausing.clear()

    def become(self, image: Tensor) -> int:
        """Be what an image says; how many of its bytes that were."""
        head = integers(image, 0, 8 + len(self.counts))
        self.version, self.orphaned, self.outer.count = head[:3]
        self.counts = dict(zip(self.counts, head[8:], strict=True))
        at, maps = 8 * len(head), []
        for length in head[4:8]:
            numbers = integers(image, at, 2 * length)
            maps.append(dict(zip(numbers[::2], numbers[1::2], strict=True)))
            at += 16 * length
        self.bases, self.pausing, self.pushed, self.paces = maps
        ranks = integers(image, at, head[3])
        at += 8 * head[3]
        self.worths = dict(zip(ranks, image[at : at + 8 * head[3]].clone().view(torch.float64).tolist(), strict=True))
        at += 8 * head[3]
        for tensor in (self.weights, *self.outer.tensors):
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(image[at : at + size].clone().view(tensor.dtype))
            at += size
        return at


def version_of(image: Tensor) -> int:
    """The version that an image is of."""
    return integers(image, 0, 1)[0]


def integers(image: Tensor, at: int, count: int) -> list[int]:
    """So many numbers of an image, from this byte on."""
    found: list[int] = image[at : at + 8 * count].clone().view(torch.int64).tolist()
    return found


def is_finite(values: Tensor) -> bool:
    """In one pass and without a copy: a sum of values with a NaN or an infinity is none; one that only grew too large
    is looked at again, and the least and the greatest of values with a NaN are NaN."""
    if isfinite(values.sum().item()):
        return True
    least, greatest = torch.aminmax(values)
    return isfinite(least.item()) and isfinite(greatest.item())
