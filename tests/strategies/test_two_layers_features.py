"""What Lightning and callbacks do goes with members of several ranks: siblings stay equal, and all ranks end equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, WeightAveraging

from lightning_async import SpeedFaults
from lightning_async.callbacks import AdaptiveShrink, DelayStats, SpreadStats, TrafficStats
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run
from tests.strategies.test_two_layers import TWO, Plain, Watches

pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")


class ByStep(Lit):
    """Its learning rate goes by the run's steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Frozen(Lit):
    """Its optimizer has what is trained at the start."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr)


class Thaws(BaseFinetuning):
    """The first layer is trained from the second epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.layer[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.layer[0], optimizer)


SCENES: dict[str, tuple[Any, dict[str, Any]]] = {
    "steps": (ByStep, {"max_steps": 40, "max_epochs": 9, "val_check_interval": 7}),
    "clip": (ByStep, {"max_steps": 40, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2, "max_epochs": 9}),
    "bf16": (Plain, {"precision": "bf16-true"}),
    "stats": (Lit, {"callbacks": [DelayStats, TrafficStats, SpreadStats, AdaptiveShrink]}),
    "thaws": (Frozen, {"callbacks": [Thaws]}),
    "average": (Lit, {"callbacks": [lambda: WeightAveraging(use_buffers=False)]}),
    "workers": (Lit, {"workers": 2}),
}


def _scene(name: str) -> dict[str, Any]:
    make, options = SCENES[name]
    options = dict(options)
    workers = options.pop("workers", 0)
    watches = Watches()
    callbacks = [SpeedFaults(step_seconds=0.002, slow={2: 3.0, 3: 3.0}), *(c() for c in options.pop("callbacks", []))]
    t = trainer(4, knobs=TWO, callbacks=[*callbacks, watches], **options)
    t.fit(lit := make(), loader(num_workers=workers), loader(40, shuffle=False))
    return {
        "weights": weights(lit),
        "prints": watches.prints,
        "step": t.global_step,
        "val": float(t.callback_metrics["val"]),
    }


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork", "ignore:.*does not have many workers")
@pytest.mark.parametrize("name", SCENES)
def test_siblings_stay_equal(name: str) -> None:
    ends = run(4, _scene, name)
    assert ends[0]["prints"] == ends[1]["prints"]
    assert ends[2]["prints"] == ends[3]["prints"]
    assert len({tuple(end["weights"]) for end in ends}) == 1
    assert len({end["step"] for end in ends}) == 1
    if "max_steps" in SCENES[name][1]:
        assert ends[0]["step"] == 40
