"""On tick t, stage s of K runs batch t - s forward and batch t - 2(K - 1) + s backward; everything follows from this.

    K = 3        tick 1    2    3    4     5     6     7     8    (4 batches)
    stage 0           F1   F2   F3   F4    B1    B2    B3    B4
    stage 1                F1   F2   B1F3  B2F4  B3    B4
    stage 2 (last)              F1B1 F2B2  F3B3  F4B4

A batch comes back to a stage 2(K - 1 - s) ticks after it went through: that is the delay of its gradient there. The
pipe fills once; nothing in it waits for a backward pass to come all the way. Seen from one stage there are no ticks,
only turns: in turn n it runs batch n forward and batch n - delay backward; `turns` of each stage are its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Order = Literal["update_first", "forward_first"]
"""Whether a stage before the last applies the gradient that is due before it runs the next batch forward, or after."""
Pass = Literal["F", "B"]


class Work(NamedTuple):
    """One pass of one batch through one stage."""

    tick: int
    stage: int
    direction: Pass
    batch: int


def delay(stage: int, stages: int) -> int:
    """Ticks between a batch's forward and backward pass through a stage; 0 for the last one."""
    return 2 * (stages - 1 - stage)


def ticks(stages: int, batches: int) -> int:
    """How many ticks a run takes: the pipe fills and empties once."""
    return batches + 2 * (stages - 1) if batches else 0


def schedule(stages: int, batches: int, *, order: Order = "update_first") -> Iterator[Work]:
    """The whole run, tick by tick, first stage to last. What is passed on in a tick is there in the next."""
    check(stages, order)
    for tick in range(1, ticks(stages, batches) + 1):
        for stage in range(stages):
            forward = Work(tick, stage, "F", tick - stage)
            backward = Work(tick, stage, "B", tick - 2 * (stages - 1) + stage)
            pair = (backward, forward) if updates_first(stage, stages, order) else (forward, backward)
            yield from (work for work in pair if 1 <= work.batch <= batches)


def turns(stage: int, stages: int, batches: int, *, order: Order = "update_first") -> Iterator[tuple[Pass, int]]:
    """What one stage does, in its order."""
    for batch in range(1, batches + 1):
        back = due(batch, delay(stage, stages))
        if back and updates_first(stage, stages, order):
            yield "B", back
        yield "F", batch
        if back and not updates_first(stage, stages, order):
            yield "B", back
    yield from (("B", batch) for batch in drain(batches, delay(stage, stages)))


def due(batch: int, delay: int, since: int = 0) -> int:
    """The batch that runs backward in the turn of `batch`; 0 while the pipe fills, from the batch `since` on."""
    return batch - delay if batch - delay > since else 0


def drain(batch: int, delay: int, since: int = 0) -> range:
    """The batches that are left to run backward after the turn of `batch`, when no more come."""
    return range(max(batch - delay, since) + 1, batch + 1)


def updates_first(stage: int, stages: int, order: Order) -> bool:
    """The last stage has the gradient of a batch right after its forward pass, so its order is always the same."""
    return order == "update_first" and stage < stages - 1


def check(stages: int, order: Order) -> None:
    """Raise `ValueError` for knobs that mean nothing."""
    if stages < 1:
        raise ValueError(f"there must be at least 1 stage, got {stages}")
    if order not in ("update_first", "forward_first"):
        raise ValueError(f"`order` must be 'update_first' or 'forward_first', got {order!r}")
