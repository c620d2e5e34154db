"""What a pipeline of late gradients cannot do is refused before it starts, by a sentence with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_async.strategies.knobs import check_count, check_part, check_word

P = ParamSpec("P")
OF_MEETINGS = {
    "at_meeting": "there is one set of weights here, each stage's: leave it out",
    "balance": "all stages are given the same batches: leave it out",
    "buffers": "each stage has its own, and those of replicas become their mean wherever all rest: leave it out",
    "meet_every": "stages rest where the Trainer validates or saves: say that by `val_check_interval`, or by "
    "`ModelCheckpoint(every_n_train_steps=...)`",
    "meeting_timeout": "how long a stage may wait for one thing is `waiting_timeout` here",
    "saves": "a checkpoint is of all stages after one batch, at a rest: leave it out",
}
"""Knobs that only ranks that meet have, and why not a pipeline."""


def without_meetings(init: Callable[P, None]) -> Callable[P, None]:
    """The constructor, which refuses those knobs with a sentence, where Python's own would have no remedy."""

    @wraps(init)
    def told(*args: P.args, **knobs: P.kwargs) -> None:
        for knob in OF_MEETINGS.keys() & knobs.keys():
            raise TypeError(f"`{knob}` is for strategies whose ranks meet, and not for a pipeline: {OF_MEETINGS[knob]}")
        init(*args, **knobs)

    return told


def check_knobs(
    chosen: Mapping[str, tuple[Any, Sequence[str]]],
    *,
    split: Any,
    shrink: Any,
    anneal: object,
    replicas: object,
    baseline: str,
) -> None:
    """Raise `ValueError` for knobs that mean nothing. `chosen`: (value, what it may be) by name."""
    for knob, (value, allowed) in chosen.items():
        check_word(knob, value, allowed)
    numbers = isinstance(split, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in split)
    if not numbers and not (isinstance(split, str) and split in ("even", "auto")):
        raise ValueError(f"`split` must be 'even', 'auto' or a list of block numbers, got {split!r}")
    check_part("shrink", shrink)
    check_count("anneal", anneal)
    check_count("replicas", replicas)
    if baseline == "sync" and shrink != 1:
        raise ValueError(f"`shrink` must be 1 with baseline='sync', whose gradients are not late, got {shrink}")


def refuse_pipeline(trainer: Trainer, name: str, world: int, replicas: int) -> None:
    """Raise for what a pipeline of late gradients cannot do."""
    if world % replicas:
        raise MisconfigurationException(
            f"strategy={name!r}: {world} ranks cannot be divided among {replicas} replicas of the pipeline"
        )
    if replicas > 1 and world == replicas:
        raise MisconfigurationException(
            f"strategy={name!r}: {replicas} replicas on {world} ranks leave one stage for each; use strategy='ddp'"
        )
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"strategy={name!r}: with manual optimisation the module steps by itself, but here a stage steps when the "
            "gradient has come back to it; use automatic optimisation"
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise MisconfigurationException(
            f"strategy={name!r}: `precision={trainer.precision!r}` scales the loss on one stage and would have to skip "
            "a step on all of them; use 'bf16-mixed'"
        )


def refuse_schedulers(configs: list[LRSchedulerConfig], name: str) -> None:
    """Raise for learning rates that would go by what only the last stage sees in mid-epoch."""
    for config in configs:
        if config.interval == "step" and config.reduce_on_plateau:
            raise MisconfigurationException(
                f"strategy={name!r}: ReduceLROnPlateau with interval='step' goes by a metric that each rank sees "
                "differently between meetings, and the ranks' learning rates would differ; use interval='epoch'"
            )
