"""A callback that saves or stops behind a batch by a count or a clock is asked at meetings, where all ranks ask theirs.

between     by one rank's count, alone: not asked, unless there is another way to save there (`cuts.py`)
a meeting   on all ranks, at the same end: of an epoch, or with a validation behind it, or of a batch only
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies import compat


def ask_at_meetings(
    leash: compat.Leash,
    callback: Callback,
    meeting: Callable[[], bool],
    ends: Callable[[], bool],
    passed: Callable[[int], bool],
    between: Callable[[Callback, Callable[[], object]], object] = lambda callback, ask: None,
) -> None:
    """The callback saves, or stops, with all ranks or not at all; `between` meetings, where that has another way.

    All must see the same end of a batch there: `ends` says whether that is an epoch's, or has a validation behind it.
    A meeting may come late, past a multiple of the steps after which the callback saves (`passed`): it saves there.
    """
    ask = callback.on_train_batch_end

    def on_train_batch_end(trainer: Trainer, *batch: Any, **more: Any) -> None:
        if not meeting():
            between(callback, lambda: ask(trainer, *batch, **more))
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last, progress.is_last_batch = progress.is_last_batch, ends()
        try:
            with _as_due(callback, passed):
                ask(trainer, *batch, **more)
        finally:
            progress.is_last_batch = last

    leash.wrap(callback, "on_train_batch_end", on_train_batch_end)


def _as_due(callback: Callback, passed: Callable[[int], bool]) -> AbstractContextManager[None]:
    """Lightning saves at a multiple, not past it."""
    if isinstance(callback, ModelCheckpoint) and (every := compat.saves_every(callback)) and passed(every):
        return compat.saves_at_once(callback)
    return nullcontext()
