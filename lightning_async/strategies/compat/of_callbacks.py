"""What Lightning's own callbacks keep to themselves: when one saves, stops or averages, and when it last did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

from lightning_async.strategies.compat.leash import Leash


def saves_every(callback: ModelCheckpoint) -> int:
    """After how many steps a ModelCheckpoint saves; 0 for one that does not go by steps."""
    return int(callback._every_n_train_steps or 0)


def saves_after(callback: ModelCheckpoint) -> float:
    """After how many seconds a ModelCheckpoint saves; 0.0 for one that does not go by time."""
    interval = callback._train_time_interval
    return interval.total_seconds() if interval is not None else 0.0


@contextmanager
def saves_at_once(callback: ModelCheckpoint) -> Iterator[None]:
    """A ModelCheckpoint that goes by steps takes the step of the run, whichever it is, for one of its multiples."""
    every = callback._every_n_train_steps
    callback._every_n_train_steps = _Always(every)
    try:
        yield
    finally:
        callback._every_n_train_steps = every


class _Always(int):
    """The number itself, under which its state is saved too; but whatever is divided by it leaves no rest."""

    def __rmod__(self, steps: int) -> int:
        return 0


HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_exception")
"""In which callbacks save, or stop a run."""


def name_files_by(callback: ModelCheckpoint, leash: Leash, make: Callable[..., str]) -> None:
    """`make` makes up the names of files that a ModelCheckpoint is about to save; who asks it for a name in passing, on
    one rank perhaps, has its own."""
    own = callback.format_checkpoint_name
    saving = _while(callback, leash, "_get_metric_interpolated_filepath_name", "_save_last_checkpoint", "on_exception")

    def name(*arguments: object, **more: object) -> str:
        return make(*arguments, **more) if saving[0] else own(*arguments, **more)  # type: ignore[arg-type]

    leash.wrap(callback, "format_checkpoint_name", name)


def _while(callback: object, leash: Leash, *methods: str) -> list[int]:
    """How many calls of these methods are under way."""
    calls = [0]

    def counted(method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            calls[0] += 1
            try:
                return method(*arguments, **more)
            finally:
                calls[0] -= 1

        return call

    for method in methods:
        leash.wrap(callback, method, counted(getattr(callback, method)))
    return calls


def score_by(
    callback: ModelCheckpoint, leash: Leash, alike: Callable[[torch.Tensor | None], torch.Tensor | None]
) -> None:
    """What a ModelCheckpoint goes by is what `alike` makes of it, or of its absence, in each of its decisions."""

    def save(trainer: Trainer, candidates: dict[str, torch.Tensor]) -> None:
        name = str(callback.monitor)
        score = alike(candidates.get(name))
        others = {key: value for key, value in candidates.items() if key != name}
        original(trainer, others if score is None else {**others, name: score})

    original = leash.wrap(callback, "_save_monitor_checkpoint", save)


def looks_within(
    callback: ModelCheckpoint | EarlyStopping, leash: Leash, within: Callable[[], AbstractContextManager[None]]
) -> None:
    """Where a callback looks at the metrics, to save or to stop, it does so `within` this; who asks it for them in
    passing, on one rank perhaps, sees its own."""
    looking = _while(callback, leash, *HOOKS)

    def look(trainer: Trainer) -> object:
        with within() if looking[0] else nullcontext():
            return original(trainer)

    name = "_monitor_candidates" if isinstance(callback, ModelCheckpoint) else "_run_early_stopping_check"
    original = leash.wrap(callback, name, look)


def save_is_due(callback: ModelCheckpoint, now: float) -> bool:
    """Whether a ModelCheckpoint that goes by time is to save now."""
    interval, last = callback._train_time_interval, callback._last_time_checked
    return interval is not None and last is not None and now - last >= interval.total_seconds()


def last_save(callback: ModelCheckpoint) -> tuple[int, str]:
    """The step at which a ModelCheckpoint saved last, where it saves no second time; and the file."""
    return callback._last_global_step_saved, callback._last_checkpoint_saved


def set_last_save(callback: ModelCheckpoint, step: int, path: str) -> None:
    """It was there and then."""
    callback._last_global_step_saved, callback._last_checkpoint_saved = step, path


def time_is_up(timer: Timer) -> bool:
    """Whether a Timer that stops after a batch, not after an epoch, is to stop the run."""
    left = timer.time_remaining()
    return left is not None and left <= 0 and bool(timer._interval == "step")


def average_of(callback: WeightAveraging) -> AveragedModel | None:
    """The averaged model of a WeightAveraging; there is none outside of `fit`."""
    return callback._average_model


def average_of_epochs(callback: StochasticWeightAveraging) -> Module | None:
    """The copy of the module in which StochasticWeightAveraging averages; there is none before `setup`."""
    return callback._average_model


def averages_on(callback: StochasticWeightAveraging) -> torch.device | str | None:
    """The device to which it moves that copy as it begins; None: where the module is."""
    return callback._device


def swap_parts(
    callback: WeightAveraging,
    leash: Leash,
    in_part: Callable[[], AbstractContextManager[None]],
    part: Callable[[Module], Module],
    swapped: Callable[[], None],
) -> None:
    """Let a WeightAveraging exchange its average and the weights within a part of both, for the time of a run, and call
    `swapped` whenever they have changed places."""

    def within(exchange: Callable[[Module], None]) -> Callable[[Module], None]:
        def exchange_part(module: Module) -> None:
            with in_part():
                exchange(part(module))

        return exchange_part

    def exchange_and_say(module: Module) -> None:
        exchange(module)
        swapped()

    exchange = within(callback._swap_models)  # type: ignore[arg-type]
    leash.wrap(callback, "_swap_models", exchange_and_say)
    leash.wrap(callback, "_copy_average_to_current", within(callback._copy_average_to_current))  # type: ignore[arg-type]


def swap(callback: WeightAveraging, module: LightningModule) -> None:
    """Let its average and the weights change places, as around a validation."""
    callback._swap_models(module)


def averaged_until(callback: WeightAveraging) -> int:
    """The step of the run at which a WeightAveraging last averaged, or saved that it did."""
    return int(callback._latest_update_step)
