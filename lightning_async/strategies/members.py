"""Who belongs to which member: by default each rank is one; with `inner` the ranks of a node are, or so many in a row.

ranks           0 1 2 3 | 4 5 6 7        inner="node" on two nodes of four devices, or inner_size=4
members         0       | 4              each goes by its first rank, which speaks for it

ranks           0 1 2 3 | 4 5            inner="node" on nodes of four and two devices: members of unlike size
members         0       | 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_async.strategies.knobs import check_word

Inner = Literal["node"]


def check_inner(inner: Inner | None, inner_size: int | None) -> None:
    """Raise for what cannot be meant."""
    if inner is not None:
        check_word("inner", inner, get_args(Inner))
    if inner is not None and inner_size is not None:
        raise ValueError(f"give `inner={inner!r}` (the ranks of a node) or `inner_size={inner_size}`, not both")
    if inner_size is not None and (not isinstance(inner_size, int) or isinstance(inner_size, bool) or inner_size < 1):
        raise ValueError(f"`inner_size` must be an integer of at least 1, or None, got {inner_size!r}")


def ranks_of_members(inner: Inner | None, inner_size: int | None, nodes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The ranks that step together, by members; `nodes`: where each rank is."""
    world, size = len(nodes), inner_size or 1
    if inner == "node":
        return tuple(tuple(r for r in range(world) if nodes[r] == node) for node in dict.fromkeys(nodes))
    if world % size:
        raise MisconfigurationException(
            f"`inner_size={size}` does not divide the {world} ranks of this run: start a multiple of it, choose "
            'another one, or take `inner="node"`, whose members may be of unlike size'
        )
    return tuple(tuple(range(first, first + size)) for first in range(0, world, size))


def sizes(members: Sequence[Sequence[int]]) -> str:
    """How many ranks each member has, for people; "": one."""
    found = [len(ranks) for ranks in members]
    if len(set(found)) > 1:
        return f" of {', '.join(map(str, found[:-1]))} and {found[-1]} ranks"
    return f" of {found[0]} ranks each" if found and found[0] > 1 else ""
