"""Every private name of Lightning that we touch is here, each with a reason; an unknown Lightning is refused.

Lightning 2.6 broadcasts a SIGTERM flag on the default group before EVERY batch, so all ranks go at the pace of the
slowest, whatever the strategy does, and a collective inside its signal handler blocks a rank that alone gets a SIGTERM.
Both are replaced for the time of a run. Running on with a name missing would mean silent lock-step: hence the refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import AveragedModel

PRIVATE = {
    "fit_loop.epoch_loop._broadcast_sigterm_tensor": "the broadcast before every batch",
    "_signal_connector._sigterm_notifier_fn": "the broadcast inside the signal handler",
    "_data_connector._requires_distributed_sampler": "the sampler of the training data is ours",
    "_run_stage": "an exception of a forked worker is seen nowhere else",
}
_NOT_SET = object()


@dataclass
class Leash:
    """What was replaced on one trainer, and how to put it back."""

    trainer: Trainer
    _saved: list[tuple[Any, str, Any]] = field(default_factory=list)

    def replace(self, path: str, value: Callable[..., Any]) -> Callable[..., Any]:
        """Replace a private attribute for the time of the run; returns what was there."""
        owner, name = _resolve(self.trainer, path)
        self._saved.append((owner, name, vars(owner).get(name, _NOT_SET)))
        original: Callable[..., Any] = getattr(owner, name)
        setattr(owner, name, value)
        return original

    def restore(self) -> None:
        """Put everything back. Idempotent."""
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _NOT_SET:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def take_off(
    trainer: Trainer, *, poll: Callable[[], None], sigterm: Callable[[], None], failed: Callable[[BaseException], None]
) -> Leash:
    """Take the leash off: `poll` runs before every batch, `sigterm` in the signal handler, `failed` on an exception."""
    check(trainer)
    leash = Leash(trainer)

    def notify(signum: int, frame: FrameType | None) -> None:
        sigterm()

    def guarded() -> Any:
        try:
            return run_stage()
        except BaseException as exception:
            failed(exception)
            raise

    def needs_sampler(loader: object) -> bool:
        return not trainer.training and bool(requires(loader))

    leash.replace("fit_loop.epoch_loop._broadcast_sigterm_tensor", poll)
    leash.replace("_signal_connector._sigterm_notifier_fn", notify)
    run_stage = leash.replace("_run_stage", guarded)
    requires = leash.replace("_data_connector._requires_distributed_sampler", needs_sampler)
    return leash


def check(trainer: Trainer) -> None:
    """Refuse a Lightning that lacks one of the names."""
    missing = [path for path in PRIVATE if not _exists(trainer, path)]
    if missing:
        raise MisconfigurationException(
            f"lightning_async does not know Lightning {lightning.__version__}: it has no `Trainer.{missing[0]}` "
            f"({PRIVATE[missing[0]]}), and training would silently run in lock-step. Install lightning>=2.6,<2.7, or a "
            "newer lightning_async."
        )


def wants_our_sampler(trainer: Trainer) -> bool:
    """Whether the user left the distribution of the training data to the strategy."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def mark_sigterm(trainer: Trainer) -> None:
    """Lightning's loops read this flag at their ends."""
    trainer._signal_connector.received_sigterm = True


def callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's list of callbacks; the attribute is public, but declared nowhere."""
    found: list[Callback] = vars(trainer)["callbacks"]
    return found


def fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a trial run of a few batches; public, but declared nowhere."""
    return bool(vars(trainer)["fast_dev_run"])


def synchronises_batchnorm(trainer: Trainer) -> bool:
    """Whether the Trainer was asked for `sync_batchnorm`."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def saves_by_steps(callback: ModelCheckpoint) -> bool:
    """Whether a ModelCheckpoint is triggered by the steps of one rank."""
    return bool(callback._every_n_train_steps)


def saves_by_time(callback: ModelCheckpoint) -> bool:
    """Whether a ModelCheckpoint is triggered by the clock of one rank."""
    return callback._train_time_interval is not None


def average_of(callback: WeightAveraging) -> AveragedModel | None:
    """The averaged model of a WeightAveraging; there is none outside of `fit`."""
    return callback._average_model


def _resolve(trainer: Trainer, path: str) -> tuple[Any, str]:
    *owners, name = path.split(".")
    owner: Any = trainer
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def _exists(trainer: Trainer, path: str) -> bool:
    try:
        owner, name = _resolve(trainer, path)
    except AttributeError:
        return False
    return callable(getattr(owner, name, None))
