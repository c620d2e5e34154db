"""The bar has a total, though an epoch of claimed data has no length."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from tests.strategies.lit import Lit, loader, trainer


class Look(Callback):
    def __init__(self) -> None:
        self.totals: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        bar = trainer.progress_bar_callback
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
