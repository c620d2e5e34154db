"""What a Trainer was told and declares nowhere."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer


def callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's list of callbacks; the attribute is public, but declared nowhere."""
    found: list[Callback] = vars(trainer)["callbacks"]
    return found


def fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a trial run of a few batches; public, but declared nowhere."""
    return bool(vars(trainer)["fast_dev_run"])


def log_every(trainer: Trainer) -> int:
    """`log_every_n_steps`; public, but declared nowhere."""
    return int(vars(trainer)["log_every_n_steps"])


def synchronises_batchnorm(trainer: Trainer) -> bool:
    """Whether the Trainer was asked for `sync_batchnorm`."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def wants_our_sampler(trainer: Trainer) -> bool:
    """Whether the user left the distribution of the training data to the strategy."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def reloads_with(trainer: Trainer, epoch: int) -> bool:
    """Whether a run that was not interrupted makes its training loaders anew for this epoch."""
    every = int(vars(trainer)["reload_dataloaders_every_n_epochs"])  # public, but declared nowhere
    return every > 0 and epoch % every == 0
