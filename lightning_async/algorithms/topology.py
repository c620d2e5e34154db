"""Who talks to whom is a pure function of integers: my place among the members, and how often I have sent.

    ring           0 - 1 - 2 - 3 - 0           neighbours: the next and the previous member
    exponential    at my k-th message my partner is 2^(k mod log2 n) places on: one peer at a time, n members mix in
                   about log2 n messages

Members that died are simply not in the list, so the ring closes over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Topology = Literal["ring", "exponential"]
TOPOLOGIES: tuple[Topology, ...] = ("ring", "exponential")
RING_LIMIT = 16  # of members; beyond it the ring's spectral gap (O(1/n^2)) makes consensus slow


def hops(topology: Topology, n: int) -> list[int]:
    """The distances, in places, at which a member has partners, in the order of its turns."""
    if n < 2:
        return []
    if topology == "ring":
        return [1, n - 1] if n > 2 else [1]
    return [2**k for k in range((n - 1).bit_length())]


def partner(topology: Topology, members: Sequence[int], me: int, turn: int) -> int | None:
    """The member that `me` addresses at its `turn`-th message; None when it is alone."""
    distances = hops(topology, len(members))
    if not distances:
        return None
    return members[(members.index(me) + distances[turn % len(distances)]) % len(members)]


def onward(topology: Topology, members: Sequence[int], me: int) -> list[int]:
    """The edges that `me` initiates, each edge having one initiator: the member before it, going round once."""
    n, place = len(members), members.index(me)
    distances = sorted({min(d, n - d) for d in hops(topology, n)})
    return [members[(place + d) % n] for d in distances if 2 * d != n or place < d]


def neighbours(topology: Topology, members: Sequence[int], me: int) -> list[int]:
    """Every member that `me` shares an edge with, in order, without repetition."""
    n, place = len(members), members.index(me)
    distances = hops(topology, n)
    return sorted({members[(place + s * d) % n] for d in distances for s in (1, -1)} - {me})
