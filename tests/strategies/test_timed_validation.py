"""`val_check_interval` as a time: all stages of a pipeline go by rank 0's clock. And where nothing is trained on."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_async import AsyncGlobalStrategy, GossipRingStrategy, LazySignStrategy
from tests.strategies import lit, piped
from tests.strategies.ranks import run

TIMES: dict[str, Any] = {
    "timedelta": timedelta(seconds=1000),
    "text": "00:00:16:40",
    "dictionary": {"minutes": 16, "seconds": 40},
}
DUE = 5, 17
"""Batches, of 24."""


class Clocks(Callback):
    """Rank 0's says so behind two batches, those of the others behind each."""

    def __init__(self) -> None:
        self.batches = 0
        self.validated: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.batches += 1
        if trainer.global_rank > 0 or self.batches in DUE:
            trainer._last_val_time -= 1000.0

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append((self.batches, trainer.current_epoch))


def _timed(devices: int, time: Any, knobs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    module, clocks = piped.Piped(), Clocks()
    t = piped.trainer(devices, knobs=knobs, callbacks=[clocks], val_check_interval=time, **options)
    t.fit(module, piped.loader(), piped.loader(20))
    return {"validated": clocks.validated, "end": piped.weights(module)}


@pytest.mark.few(1)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize(
    ("devices", "knobs", "options"),
    [
        (3, {}, {"max_epochs": 3}),
        (2, {"baseline": "sync"}, {"max_epochs": 3, "accumulate_grad_batches": 2}),
        (4, {"replicas": 2}, {"max_epochs": 6}),
        (1, {}, {"max_epochs": 3}),
    ],
    ids=["stages", "accumulated", "replicas", "one stage"],
)
def test_the_stages_validate_together_by_the_clock_of_rank_0(
    devices: int, knobs: dict[str, Any], options: dict[str, Any], time: str
) -> None:
    first, *others = run(devices, _timed, devices, TIMES[time], knobs, options)
    assert all(other == first for other in others)
    late = 0 if devices == 1 else 2 * devices + 1
    assert len(first["validated"]) == len(DUE)
    for (batches, _), at in zip(first["validated"], DUE, strict=True):
        assert at <= batches <= at + late


@pytest.mark.few(0)
def test_no_stage_validates_in_an_epoch_that_has_no_validation() -> None:
    """Rank 0's clock speaks first in the first epoch, of 8 batches; it is heard in the second."""
    first, *others = run(3, _timed, 3, TIMES["text"], {}, {"max_epochs": 3, "check_val_every_n_epoch": 2})
    assert all(other == first for other in others)
    assert [epoch for _, epoch in first["validated"]] == [1]


def _untrained(strategy: Any) -> tuple[int, str]:
    t = lit.trainer(2, strategy=strategy(), limit_train_batches=0, val_check_interval="00:00:00:01")
    t.fit(lit.Lit(), lit.loader(), lit.loader(40, shuffle=False))
    return t.global_step, t.state.status.value


@pytest.mark.few(1)
@pytest.mark.parametrize("strategy", [GossipRingStrategy, AsyncGlobalStrategy, LazySignStrategy])
def test_a_fit_without_batches_is_over_at_once(strategy: Any) -> None:
    assert run(2, _untrained, strategy) == [(0, "finished")] * 2
