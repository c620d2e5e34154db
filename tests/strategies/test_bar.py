"""The bar has a total, though an epoch of claimed data has no length."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run


class Look(Callback):
    def __init__(self) -> None:
        self.totals: list[Any] = []
        self.at: list[int] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        bar = trainer.progress_bar_callback
        self.at.append(trainer.fit_loop.epoch_loop.batch_idx + 1)
        if isinstance(bar, TQDMProgressBar):
            self.totals.append(bar.train_progress_bar.total)
        else:
            self.totals.append(bar.progress.tasks[bar.train_progress_bar_id].total)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_total_is_what_will_come(bar: type[Callback]) -> None:
    if bar is RichProgressBar:
        pytest.importorskip("rich")
    look = Look()
    t = trainer(1, enable_progress_bar=True, callbacks=[bar(), look])
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    assert set(look.totals) == {60}


class OnEachRank(TQDMProgressBar):
    """Lightning shows rank 0's alone; who asks for the others' sees totals there too."""

    def disable(self) -> None: ...


def _watched(knobs: dict[str, Any]) -> list[tuple[int, int]]:
    look = Look()
    faults = SpeedFaults(step_seconds=0.003, slow={1: 4.0})
    t = trainer(2, enable_progress_bar=True, callbacks=[OnEachRank(), look, faults], knobs=knobs)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return list(zip(look.at, look.totals, strict=True))


@pytest.mark.few(0)
@pytest.mark.parametrize("balance", ["equal", "incremental", "claim"])
def test_on_each_rank_the_total_is_what_will_come_there(balance: str) -> None:
    """Forecasts are never less than what was trained on, nor more than the epoch; at its end they are what came."""
    found = run(2, _watched, {"balance": balance})
    assert all(at <= total <= 60 for rank in found for at, total in rank)
    ends = [[one for one, (after, _) in zip(rank, [*rank[1:], (1, 0)], strict=True) if after == 1] for rank in found]
    assert all(at == total for rank in ends for at, total in rank)
    assert [sum(total for _, total in epoch) for epoch in zip(*ends, strict=True)] == [60, 60]
    if balance == "equal":
        assert {total for rank in found for _, total in rank} == {30}
