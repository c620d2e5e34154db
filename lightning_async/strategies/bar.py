"""The progress bar's total: an epoch of claimed data has no length, but its end can be foreseen from the speeds."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

EVERY = 20  # batches between two forecasts, unless the first proves too low


def show_total(trainer: Trainer, total: int) -> None:
    """Tell the Trainer's bar, where it has one, how many batches this rank will probably train on in this epoch."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        bar.train_progress_bar.total = total
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, total=total)
