"""Shards: consecutive parts of the flat vector, cut at multiples of 16 elements, and what is said of them by mail.

    | shard 0 ....... | shard 1 ....... | shard 2 ... |         shard b's first owner: member b * n // shards

A shard and its generation make a *place*. A shard gets a new generation when another member takes it over: what is for
or from an older one is then out of date, whoever still believes in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_async.transport.mail import FIRST_FREE_KIND

CUT = 16
"""Elements: shards begin where cache lines and the replica's parameters may begin."""
MANY = 8
"""Shards by default, at most: more owners share the load, and each exchange is in more pieces."""
MOST = 2**16
RUN = 2**20
"""Generations of one beginning are never those of another."""

PUSH = FIRST_FREE_KIND
"""To the owner: a correction. version: the base's; echo: microseconds of a step; samples; weight: what it counts."""
LAST = FIRST_FREE_KIND + 1
"""The same, and then nothing until the members have met."""
PULL = FIRST_FREE_KIND + 2
"""To the owner: give me the weights, to the bit."""
ANSWER = FIRST_FREE_KIND + 3
"""From the owner: weights. version: theirs; echo: the request's step; step: microseconds of the fastest member's step;
weight: millionths by which the push counted, or a word below. To a PULL, samples: the step of the newest own push in
these weights (-1: not known); weight: all up to this version are in them, if that is not known."""
MIRROR, MIRRORED = FIRST_FREE_KIND + 4, FIRST_FREE_KIND + 5
"""From the owner to the next member: all that the shard is. And back: it is here."""
NEWS = FIRST_FREE_KIND + 6
"""Body: who lives. From the member to its own service: also, as version, where mirrors go. From others: of a death."""
TAKE = FIRST_FREE_KIND + 7
"""From the member to its own service: this shard is ours now. body, version: the newest weights that the member had."""
RETIRE = FIRST_FREE_KIND + 8
"""From the member to its own service: older places of this shard are nobody's any more. reference: its place now."""
SHOW, SHOWN, PUT = FIRST_FREE_KIND + 9, FIRST_FREE_KIND + 10, FIRST_FREE_KIND + 11
"""From the member to its own service: what are our shards? body: the places that are asked for, also of one that was
retired since; none: all that it owns. The answer. And: they are this (a run that goes on). Its reference: a place of
the generation in which it owns these and no others; 0: it owns those that it has."""
TOKEN, BID = FIRST_FREE_KIND + 12, FIRST_FREE_KIND + 13
"""From the owner: it is your turn; or, with the weight ANOTHERS, the shard is here now. And to it: a batch has ended
without it; body: who is heard. With the weight 1: it is its turn, but it has nothing to push and waits for another
shard."""
RATES = FIRST_FREE_KIND + 14
"""From the member to its own service: the optimizer's numbers are these now."""
SERVED = (PUSH, LAST, PULL, MIRROR, MIRRORED, NEWS, TAKE, RETIRE, SHOW, PUT)

NAMES = {PUSH: "push", LAST: "push", PULL: "pull", ANSWER: "answer", MIRROR: "mirror", MIRRORED: "mirror"}
"""What kinds that travel are called where people read them."""

NOT_HERE, NOT_FINITE = -1, -2
"""Words in the place of a factor: this member does not own that; it was refused."""
ANOTHERS = -3
"""A word in a TOKEN: the turn is another's."""
SOUGHT = -4
"""A word in an ANSWER of the own service, which nobody asked for: others look for this place here."""
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the flat vector.

    Attributes:
        number: Which one.
        begin: Its first element.
        end: The one behind its last.
    """

    number: int
    begin: int
    end: int

    @property
    def part(self) -> slice:
        """It, of a flat vector."""
        return slice(self.begin, self.end)


def cut(numel: int, shards: int) -> list[Shard]:
    """`numel` elements in so many shards, or in fewer where there are not 16 for each; equal but for the last."""
    blocks = -(-numel // CUT)
    count = max(1, min(shards, blocks))
    edges = [min(numel, CUT * (blocks * b // count)) for b in range(count)] + [numel]
    return [Shard(b, edges[b], edges[b + 1]) for b in range(count)]


def first_owner(shard: int, shards: int, world: int) -> int:
    """Who owns a shard at the start."""
    return shard * world // shards


def place(shard: int, generation: int) -> int:
    """A shard's generation as one integer."""
    return generation * MOST + shard


def shard_of(at: int) -> int:
    """The shard of a place."""
    return at % MOST


def same_generation(number: int, at: int) -> int:
    """The place of another shard in the generation of this place."""
    return at - shard_of(at) + number


def before(at: int) -> int:
    """The place of the same shard one generation before."""
    return at - MOST


def succeeds(at: int, older: int) -> bool:
    """Whether a place is a later one of the same shard, since the same beginning."""
    return shard_of(at) == shard_of(older) and at > older and at // MOST // RUN == older // MOST // RUN
