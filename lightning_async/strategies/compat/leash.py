"""What is replaced on a Trainer is put back behind the run; a Lightning that lacks one of those names is refused.

Lightning 2.6 broadcasts a SIGTERM flag on the default group before EVERY batch, so all ranks go at the pace of the
slowest, whatever the strategy does, and a collective inside its signal handler blocks a rank that alone gets a SIGTERM.
Running on with a name missing would mean silent lock-step: hence the refusal.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

PRIVATE = {
    "fit_loop.epoch_loop._broadcast_sigterm_tensor": "the broadcast before every batch",
    "_signal_connector._sigterm_notifier_fn": "the broadcast inside the signal handler",
    "_data_connector._requires_distributed_sampler": "the sampler of the training data is ours",
    "_run_stage": "an exception of a forked worker is seen nowhere else",
}
IN_A_FIT = {
    "_signal_connector._slurm_sigusr_handler_fn": "it would save in a signal handler, on one rank",
    "fit_loop.epoch_loop._should_check_val_epoch": "whether an epoch is one with validation",
    "fit_loop.epoch_loop._should_check_val_fx": "it would validate by one rank's clock",
    "fit_loop.epoch_loop._get_monitor_value": "each rank would reduce its learning rate by its own metric",
    "_logger_connector.on_epoch_end": "each rank would reduce its learning rate by its own metric",
    "fit_loop.epoch_loop.on_advance_end": "one rank alone would leave the loop right behind it",
    "fit_loop._iteration_based_training": "with `max_steps` it would lose the epoch behind one that was over",
}
"""What `Clock` and the pipeline replace or ask while it lasts; SLURM's handler in an evaluation too (`Unsaved`)."""
_NOT_SET = object()


@dataclass
class Leash:
    """What was replaced on one trainer, and how to put it back."""

    trainer: Trainer
    _saved: list[tuple[Any, str, Any]] = field(default_factory=list)

    def replace(self, path: str, value: Callable[..., Any]) -> Callable[..., Any]:
        """Replace a private attribute for the time of the run; returns what was there."""
        return self.wrap(*_resolve(self.trainer, path), value)

    def set(self, owner: Any, name: str, value: object) -> None:
        """Give an attribute another value for the time of the run."""
        self._saved.append((owner, name, vars(owner).get(name, _NOT_SET)))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, value: Callable[..., Any]) -> Callable[..., Any]:
        """Replace a method of one object for the time of the run; returns what was there."""
        original: Callable[..., Any] = getattr(owner, name)
        self.set(owner, name, value)
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
    reasons = PRIVATE | IN_A_FIT
    missing = [path for path in reasons if not _exists(trainer, path)]
    if missing:
        raise MisconfigurationException(
            f"lightning_async does not know Lightning {lightning.__version__}: it has no `Trainer.{missing[0]}` "
            f"({reasons[missing[0]]}), and training would silently run in lock-step. Install lightning>=2.6,<2.7, or a "
            "newer lightning_async."
        )


def requeue(trainer: Trainer, original: Callable[..., Any]) -> None:
    """What Lightning does in its handler of SLURM's signal: save, and ask for a new place in the queue."""
    original(signal.SIGUSR1, None)


def requeue_unsaved(trainer: Trainer, original: Callable[..., Any]) -> None:
    """The same, but for the save."""
    leash = Leash(trainer)
    leash.wrap(trainer, "save_checkpoint", lambda *_: None)
    try:
        requeue(trainer, original)
    finally:
        leash.restore()


def skip_backward(trainer: Trainer, leash: Leash, skip: bool) -> None:
    """Let the loop leave out its own backward pass and `zero_grad`, for the time of the run."""
    leash.set(trainer.fit_loop.epoch_loop.automatic_optimization, "_skip_backward", skip)


def go_on_skipping_backward(trainer: Trainer, skip: bool) -> None:
    """What `skip_backward` said holds on, whoever has set it otherwise."""
    trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = skip


def around_ends_of_batches(
    trainer: Trainer, leash: Leash, before: Callable[[], None], after: Callable[[], None]
) -> None:
    """Call `before` when all hooks of a batch are done, and `after` behind the validation that may follow it."""

    def on_advance_end(fetcher: Any) -> None:
        before()
        original(fetcher)
        after()

    original = leash.wrap(trainer.fit_loop.epoch_loop, "on_advance_end", on_advance_end)


def share_by_sampler(trainer: Trainer, leash: Leash) -> None:
    """Let Lightning put its sampler on the training data, as it does for other strategies."""
    connector = trainer._data_connector
    leash.replace(
        "_data_connector._requires_distributed_sampler",
        lambda loader: type(connector)._requires_distributed_sampler(connector, loader),
    )


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
