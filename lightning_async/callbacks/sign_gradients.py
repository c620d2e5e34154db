"""`ddp` with signs on the wire: registers the communication hook, on CPUs too, where Lightning registers none."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lightning_async.algorithms.sign_memory import refusal, warning
from lightning_async.algorithms.signs import BLOCK
from lightning_async.callbacks.once import stands_once
from lightning_async.hooks import FIRST, SignState, sign_hook


class SignGradients(Callback):
    """Sends gradients as signs and scales with error feedback, under `strategy="ddp"`.

    It goes by one optimizer, and without a gradient scaler (16-mixed). Where a parameter has no gradient on any rank,
    what was held back of it is lost. What a rank has not sent yet is not in the checkpoint, which one rank writes: a
    resumed run begins without it.

    Args:
        block: Numbers of a block, which has one scale.
        min_size: Parameters with fewer numbers travel whole.
        first: So many steps travel whole at first, at least 2.
    """

    def __init__(self, *, block: int = BLOCK, min_size: int = 1024, first: int = FIRST) -> None:
        self._knobs: dict[str, Any] = {"block": block, "min_size": min_size, "first": first}
        SignState(**self._knobs)  # tells what is wrong with them
        self.state: SignState | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """One hook, one callback."""
        stands_once(trainer, self, "a module has one communication hook")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is wrapped: register the hook."""
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise MisconfigurationException(
                "`SignGradients` needs strategy='ddp', whose module has communication hooks; with one device there is "
                "nothing to send, and strategy='lazy_sign' sends signs by itself"
            )
        who, remedy = "`SignGradients`", "use strategy='lazy_sign', which sends the signs of updates"
        if words := refusal(trainer.optimizers, trainer.precision, who=who, remedy=remedy):
            raise MisconfigurationException(words)
        if words := warning(trainer.optimizers, who=who, remedy=remedy):
            rank_zero_warn(words)
        self.state = SignState(**self._knobs)
        model.register_comm_hook(self.state, sign_hook)
