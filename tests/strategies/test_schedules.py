"""A plateau by step is asked at meetings: all ranks reduce together, by the mean of what they measured."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run


class Plateau(Lit):
    """Reduces tenfold whenever the metric was not better than before; rank 1's metric grows, the mean stays."""

    def __init__(self, monitor: str, frequency: int) -> None:
        super().__init__()
        self.monitor, self.frequency, self.rates = monitor, frequency, [0.01]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        sign = 1.0 if self.trainer.global_rank else -1.0
        self.log("own", torch.tensor(5.0 + sign * self.trainer.global_step))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        if rate != self.rates[-1]:
            self.rates.append(rate)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        config = {"scheduler": plateau, "interval": "step", "monitor": self.monitor, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


def reduces(monitor: str, frequency: int, options: dict[str, Any]) -> tuple[list[float], int]:
    lit = Plateau(monitor, frequency)
    t: L.Trainer = trainer(2, callbacks=[SpeedFaults(step_seconds=0.004, slow={1: 4.0})], **options)
    t.fit(lit, loader(), loader(40, shuffle=False))
    (config,) = t.lr_scheduler_configs
    assert config.frequency == frequency, "the user's number is put back"
    return lit.rates, config.scheduler.state_dict()["last_epoch"]


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")
@pytest.mark.parametrize(("frequency", "asked"), [(10, 4), (20, 2), (1, 4)])
def test_it_is_asked_once_a_meeting_and_all_ranks_reduce_together(frequency: int, asked: int) -> None:
    options = {"max_steps": 45, "max_epochs": -1, "val_check_interval": 10, "check_val_every_n_epoch": None}
    (first, often), (second, as_often) = run(2, reduces, "own", frequency, options)
    assert first[-1] == second[-1]
    assert often == as_often
    assert often == asked if frequency > 1 else often >= asked, "a frequency of 1: at every meeting there is"
    assert first[-1] == pytest.approx(0.01 * 0.1 ** (often - 1)), "the first asking has nothing to compare with"


def test_a_metric_that_nobody_has_is_said_and_not_asked_for() -> None:
    options = {"max_steps": 20, "max_epochs": -1, "knobs": {"meet_every": 20}, "limit_val_batches": 0}
    with pytest.warns(UserWarning, match="found no metric 'own' at a meeting"):
        trainer_of_one(options)


def trainer_of_one(options: dict[str, Any]) -> None:
    trainer(1, **options).fit(Plateau("own", 1), loader(), loader(40, shuffle=False))
