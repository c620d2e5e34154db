"""What a step sends leaves beside the next batch's compute; where somebody waits for it, at the step's end."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import pytest

from lightning_async import AsyncGlobalStrategy, AsyncStrategy, CyclicDelayStrategy, GossipRingStrategy, SpeedFaults
from lightning_async.transport.gathering import Gathering
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

PLACES = ("wait", "on_train_batch_start", "batch_ended")


def _places(kind: type[AsyncStrategy], knobs: dict[str, Any]) -> Counter[str]:
    """Where links were told that there is something to send."""
    places: Counter[str] = Counter()
    tell = Gathering._tell

    def watched(self: Gathering) -> None:
        if self._stirred:
            places.update([frame.name for frame in traceback.extract_stack() if frame.name in PLACES][-1:])
        tell(self)

    Gathering._tell = watched  # type: ignore[method-assign]  # in a process of its own
    faults = SpeedFaults(step_seconds=0.005, slow={1: 2.0})
    one = trainer(2, strategy=kind(**knobs), callbacks=[faults], max_epochs=2)  # type: ignore[call-arg]
    one.fit(Lit(), loader(), loader(40, shuffle=False))
    return places


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (GossipRingStrategy, {}),
        (GossipRingStrategy, {"mode": "push_sum"}),
        (AsyncGlobalStrategy, {}),
        (CyclicDelayStrategy, {}),
    ],
)
def test_where_nobody_waits_it_leaves_as_a_batch_begins(kind: type[AsyncStrategy], knobs: dict[str, Any]) -> None:
    for places in run(2, _places, kind, knobs):
        assert places["on_train_batch_start"] > 0 == places["batch_ended"]


def test_in_lock_step_it_leaves_at_the_steps_end() -> None:
    for places in run(2, _places, GossipRingStrategy, {"mode": "sync"}):
        assert places["on_train_batch_start"] == 0 < places["batch_ended"] + places["wait"]
