"""Who belongs to which member: by default each rank is one; with `inner` the ranks of a node are, or so many in a row.

ranks           0 1 2 3 | 4 5 6 7        inner="node" on two nodes of four devices, or inner_size=4
members         0       | 4              each goes by its first rank, which speaks for it
"""

from __future__ import annotations

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


def ranks_of_a_member(inner: Inner | None, inner_size: int | None, *, node: int, world: int) -> int:
    """How many ranks step together; `node`: how many a node has."""
    size = node if inner == "node" else inner_size or 1
    if world % size:
        raise MisconfigurationException(
            f"`inner_size={size}` does not divide the {world} ranks of this run: members are of one size, so start a "
            "multiple of it, or choose another one"
        )
    return size
