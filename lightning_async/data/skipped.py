"""What torchdata's loader skips to come back to a state is counted once: it counts that twice (0.11).

Over data without a state of their own (a webdataset) its iterator begins anew, draws as many batches as the state names
and gives them to nobody. It adds each of them to a count that it began with the same number:

    state          4 batches yielded                        4
    iterator       skips 4                                  4 + 4, where 4 is right
    next state     behind 1 more                            9, and a run that goes on from there leaves 4 out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

YIELDED, SNAPSHOT, STEP, SINCE = "_num_yielded", "_snapshot", "_snapshot_step", "_steps_since_snapshot"


def count_once(iterator: Iterator[Any], state: object) -> None:
    """Put right what a new iterator, which came back to this state, says of its place. Others are left alone."""
    told, since = _told(state)
    if told and getattr(iterator, YIELDED, None) == 2 * told + since:
        setattr(iterator, YIELDED, told + since)
        snapshot = getattr(iterator, SNAPSHOT, None)
        if isinstance(snapshot, dict) and STEP in snapshot:
            snapshot[STEP] -= told


def _told(state: object) -> tuple[int, int]:
    """How many batches such a state names, and how many came behind them."""
    if not isinstance(state, Mapping):
        return 0, 0
    if isinstance(state.get(SNAPSHOT), Mapping):
        return int(state[SNAPSHOT].get(STEP, 0)), int(state.get(SINCE, 0))
    return int(state.get(YIELDED, 0)), 0
