"""Which runs cannot be replayed, each with a reason: said as the run begins, kept in its logs, refused by `replay`.

A log has what a member was told, and a replay has none of the run's callbacks: who changes what is trained is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging

from lightning_async.strategies import compat

FED = {
    "both": "it trains on a shared data set and on a stream together",
    "several": "it trains on several loaders of numbered samples, and its log does not say which number is of which",
}
"""By what `Feeding.fed` and `StageRecording.fed` say."""


def reasons(trainer: Trainer, fed: str) -> Iterator[str]:
    """Why this run cannot be replayed, known before its first step; nothing: it can."""
    if fed in FED:
        yield FED[fed]
    for callback in compat.callbacks(trainer):
        if isinstance(callback, (BaseFinetuning, ModelPruning)):
            yield f"{type(callback).__name__} changes what is trained, and a replay leaves the run's callbacks out"
        elif isinstance(callback, StochasticWeightAveraging) and _ends_without_training(trainer, callback):
            yield "its last epoch takes BatchNorm's statistics, and trains nothing (StochasticWeightAveraging)"


def _ends_without_training(trainer: Trainer, swa: StochasticWeightAveraging) -> bool:
    return trainer.max_epochs != -1 and swa.pl_module_contains_batch_norm(trainer.lightning_module)
