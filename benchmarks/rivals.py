"""The ways to average gradients or weights that stand beside the signs, each by its name; on CPUs too.

    "ddp"  "ddp, bf16"  "ddp, PowerSGD 2"  "ddp, signs"  "post-local SGD"  "none"  "lazy_sign"  "lazy_sign, periodic"

Lightning registers communication hooks on GPUs alone; here they are registered wherever the module is wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lightning_async import GossipRingStrategy, LazySignStrategy
from lightning_async.callbacks import SignGradients

PERIOD = 8
"""Steps between two averages of local SGD."""
ONE_BUCKET = 2000
"""PyTorch's hooks start collectives in callbacks, which gloo may run in another order on each rank; with one bucket
there is one order only. (With several, PowerSGD ends in a mismatch of sizes.)"""
SIGNS: Mapping[str, dict[str, Any]] = {
    "lazy_sign": {},
    "lazy_sign, periodic": {"rule": "periodic", "max_skip": 3},
    "lazy_sign, accumulate": {"rule": "accumulate", "max_skip": 3, "history": 3},
}
POST_LOCAL = "post-local SGD"
VARIANTS = (
    "none",
    "ddp",
    "ddp, bf16",
    "ddp, PowerSGD 1",
    "ddp, PowerSGD 2",
    "ddp, PowerSGD 4",
    "ddp, signs",
    POST_LOCAL,
    *SIGNS,
)


class PostLocalSGD(DDPStrategy):
    """`ddp` for `start` steps, then every rank by itself, and the mean of all weights behind every `PERIOD`-th step."""

    def __init__(self, start: int, **knobs: Any) -> None:
        self._state = PostLocalSGDState(None, None, start, post_local_gradient_allreduce=False)  # type: ignore[no-untyped-call]
        super().__init__(
            ddp_comm_state=self._state,
            ddp_comm_hook=post_localSGD_hook,
            model_averaging_period=PERIOD,
            **knobs,
        )

    def configure_ddp(self) -> None:
        """The module is wrapped; on GPUs Lightning has registered the hook."""
        super().configure_ddp()
        if self.root_device.type != "cuda":
            model: Any = self.model
            model.register_comm_hook(self._state, post_localSGD_hook)


class Hook(Callback):
    """Registers a communication hook of PyTorch's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is wrapped by now."""
        model: Any = trainer.strategy.model
        if self._name == "bf16":
            # by another name: `ddp` refuses this one without NCCL, though gloo adds up bfloat16 as well
            model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
        else:
            rank = int(self._name.rpartition(" ")[2])
            state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook)


def built(variant: str, start: int) -> tuple[Any, list[Callback]]:
    """What a trainer takes for a variant; `start`: the steps of post-local SGD that are `ddp`'s."""
    if variant in SIGNS:
        return LazySignStrategy(**SIGNS[variant]), []
    if variant == "none":
        return GossipRingStrategy(mode="none", balance="equal"), []
    if variant == POST_LOCAL:
        return PostLocalSGD(start), []
    if variant == "ddp":
        return DDPStrategy(), []
    if variant == "ddp, signs":
        return DDPStrategy(), [SignGradients()]
    return DDPStrategy(bucket_cap_mb=ONE_BUCKET), [Hook(variant.partition(", ")[2])]
