"""Every private name of Lightning that we touch is here, each with a reason; an unknown Lightning is refused.

Lightning 2.6 broadcasts a SIGTERM flag on the default group before EVERY batch, so all ranks go at the pace of the
slowest, whatever the strategy does, and a collective inside its signal handler blocks a rank that alone gets a SIGTERM.
Both are replaced for the time of a run. Running on with a name missing would mean silent lock-step: hence the refusal.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import lightning
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, Timer, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

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
    "fit_loop.epoch_loop.on_advance_end": "one rank alone would leave the loop right behind it",
    "fit_loop._iteration_based_training": "with `max_steps` it would lose the epoch behind one that was over",
}
"""What `Clock` and the pipeline replace or ask while it lasts."""
_NOT_SET = object()
T = TypeVar("T")


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


def log_every(trainer: Trainer) -> int:
    """`log_every_n_steps`; public, but declared nowhere."""
    return int(vars(trainer)["log_every_n_steps"])


def synchronises_batchnorm(trainer: Trainer) -> bool:
    """Whether the Trainer was asked for `sync_batchnorm`."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def first_batch(trainer: Trainer) -> Any:
    """The first batch of a training loader that is made for this alone; generators of its own stay as they are."""
    loader = trainer.fit_loop._data_source.dataloader()
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    parts = [part for one in combined.flattened for part in (one, getattr(one, "sampler", None))]
    found = [getattr(part, "generator", None) for part in parts]
    own = [generator for generator in found if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in own]
    batch, *_ = next(iter(combined))
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    return trainer.precision_plugin.convert_input(batch)


def ends_in_step(trainer: Trainer) -> bool:
    """Whether an optimizer step is due with this batch, as far as `accumulate_grad_batches` goes."""
    return not trainer.fit_loop._should_accumulate()


def fetch_late(trainer: Trainer) -> None:
    """Let the batch ahead be fetched by `look_ahead` alone: Lightning fetches it before anybody knows whether the epoch
    ends here, and what it fetched in vain is lost to a stream. A loader of known length is never fetched ahead."""
    fetcher = trainer.fit_loop._data_fetcher
    if type(fetcher) is _PrefetchDataFetcher:
        fetcher.__class__ = _FetchesLate


def look_ahead(trainer: Trainer) -> None:
    """The epoch goes on behind the batch under way, if its stream does: fetch what comes next, or say that it ended."""
    fetcher = trainer.fit_loop._data_fetcher
    if isinstance(fetcher, _FetchesLate):
        fetcher.look_ahead()
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = fetcher.done


class _FetchesLate(_PrefetchDataFetcher):
    """What is fetched ahead is fetched when a batch begins, not before it is handed out."""

    def __next__(self) -> Any:
        if self.batches:
            return self.batches.pop(0)
        if self.done:
            raise StopIteration
        return _DataFetcher.__next__(self)

    def look_ahead(self) -> None:
        if self.length is None and not self.batches and not self.done:
            with suppress(StopIteration):  # `done` from here on
                self.batches.append(_DataFetcher.__next__(self))


def skip_batch(fetcher: Any) -> None:
    """Fetch a batch in vain; what was fetched ahead is the next one. Lightning counts those before where it resumes."""
    ahead, fetched = getattr(fetcher, "batches", []), fetcher.fetched
    with suppress(StopIteration):
        ahead.append(_DataFetcher.__next__(fetcher))
    del ahead[:1]
    fetcher.fetched = fetched


def tell_epoch(trainer: Trainer, fit: dict[str, Any]) -> None:
    """The epoch that a checkpoint goes on with, before the loops are restored: the Trainer may make its loaders earlier
    (`estimated_stepping_batches`)."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    epoch.completed = epoch.processed = fit["epoch_progress"]["current"]["processed"]


def set_sampler_epoch(trainer: Trainer, loader: object) -> None:
    """As Lightning does behind its first `iter`: where a run goes on, workers have drawn an order by then."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    _set_sampler_epoch(loader, progress.processed)


def let_plateaus_step(trainer: Trainer) -> None:
    """At the end of an epoch that was gone on with, Lightning would leave them out: it may lack what they go by."""
    plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    if all(config.monitor in trainer.callback_metrics for config in plateaus):
        trainer.fit_loop._restarting = False


def skip_backward(trainer: Trainer, leash: Leash, skip: bool) -> None:
    """Let the loop leave out its own backward pass and `zero_grad`, for the time of the run."""
    leash.set(trainer.fit_loop.epoch_loop.automatic_optimization, "_skip_backward", skip)


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


def saves_every(callback: ModelCheckpoint) -> int:
    """After how many steps a ModelCheckpoint saves; 0 for one that does not go by steps."""
    return int(callback._every_n_train_steps or 0)


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


def last_save(callback: ModelCheckpoint) -> tuple[int, str]:
    """The step at which a ModelCheckpoint saved last, where it saves no second time; and the file."""
    return callback._last_global_step_saved, callback._last_checkpoint_saved


def set_last_save(callback: ModelCheckpoint, step: int, path: str) -> None:
    """It was there and then."""
    callback._last_global_step_saved, callback._last_checkpoint_saved = step, path


def lightnings(strategy: Strategy) -> list[LightningOptimizer]:
    """The optimizers as the module gets them of `self.optimizers()`: objects of their own, that pass on what they are
    asked."""
    return strategy._lightning_optimizers


def dump(trainer: Trainer) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` would give the strategy now, hooks included. Nothing is copied."""
    found: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return found


def save_is_due(callback: ModelCheckpoint, now: float) -> bool:
    """Whether a ModelCheckpoint that goes by time is to save now."""
    interval, last = callback._train_time_interval, callback._last_time_checked
    return interval is not None and last is not None and now - last >= interval.total_seconds()


def time_is_up(timer: Timer) -> bool:
    """Whether a Timer that stops after a batch, not after an epoch, is to stop the run."""
    left = timer.time_remaining()
    return left is not None and left <= 0 and bool(timer._interval == "step")


# -- the loop's counts ------------------------------------------------------------------------------------------------


def set_global_step(trainer: Trainer, steps: int) -> None:
    """Make `trainer.global_step` this number."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    else:
        progress = loop.manual_optimization.optim_step_progress.total
    progress.ready = progress.completed = steps


def log_step(trainer: Trainer) -> int:
    """The step under which loggers get what is logged."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_log_step(trainer: Trainer, step: int) -> None:
    """Log under this step from here on."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def count_log_step(fit: dict[str, Any]) -> None:
    """Of a saved loop over epochs: its last batch stepped, which Lightning notes behind the hooks of the batch."""
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning logs the batch under way."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def log(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    """Give the loggers numbers under this step."""
    trainer._logger_connector.log_metrics(metrics, step)  # type: ignore[arg-type]


def last_metric(trainer: Trainer, name: str) -> Tensor | None:
    """A metric as it was computed last. (To read `callback_metrics` would compute some, and so wait for all ranks.)"""
    found: Tensor | None = trainer._logger_connector._callback_metrics.get(name)
    return found


def val_seconds(trainer: Trainer) -> float | None:
    """The time between validations, if that is how the Trainer was told to validate."""
    seconds: float | None = getattr(trainer, "_val_check_time_interval", None)
    return seconds


@contextmanager
def without_val_seconds(trainer: Trainer) -> Iterator[None]:
    """A Trainer that was not told so."""
    seconds, vars(trainer)["_val_check_time_interval"] = val_seconds(trainer), None
    try:
        yield
    finally:
        vars(trainer)["_val_check_time_interval"] = seconds


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `min_epochs` and `min_steps` are done."""
    return bool(trainer.fit_loop._can_stop_early)


def validates_in_this_epoch(trainer: Trainer) -> bool:
    """Whether Lightning validates in this epoch at all."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_epoch())


def validate(trainer: Trainer) -> None:
    """Run a validation as the loop does after a batch."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    trainer.validating = True
    first = connector._first_loop_iter
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


@contextmanager
def within_epoch(trainer: Trainer) -> Iterator[None]:
    """Whoever is at the end of its epoch stands where the others are: behind a batch.

    Metrics that are read now are those of steps, since those of the epoch would be combined over ranks still in it; and
    what is saved now is resumed in mid-epoch, as on the others.
    """
    connector, epochs = trainer._logger_connector, trainer.fit_loop.epoch_progress
    counts: list[Any] = [epochs.current, epochs.total]
    first, connector._first_loop_iter = connector._first_loop_iter, False
    for count in counts:
        count.processed -= 1
    yield  # who leaves by an exception stays there: what is saved of that is resumed with the others
    for count in counts:
        count.processed += 1
    connector._first_loop_iter = first


@contextmanager
def behind_epoch(trainer: Trainer) -> Iterator[None]:
    """The epoch is not counted as completed yet, as in the hooks at its end: what is saved there goes on with the next
    one."""
    epochs = trainer.fit_loop.epoch_progress
    for count in (epochs.current, epochs.total):
        count.completed -= 1
    try:
        yield
    finally:
        for count in (epochs.current, epochs.total):
            count.completed += 1


def reloads(trainer: Trainer) -> bool:
    """Whether the training loaders are about to be made anew."""
    return bool(trainer.fit_loop._should_reload_train_dl)


def reloads_with(trainer: Trainer, epoch: int) -> bool:
    """Whether a run that was not interrupted makes its training loaders anew for this epoch."""
    every = int(vars(trainer)["reload_dataloaders_every_n_epochs"])  # public, but declared nowhere
    return every > 0 and epoch % every == 0


def is_in_mid_epoch(trainer: Trainer) -> bool:
    """Whether a fit goes on in the middle of an epoch that a checkpoint had begun."""
    loop = trainer.fit_loop
    current: Any = loop.epoch_progress.current
    return bool(loop.restarting and not current.ready == current.started == current.processed)


@contextmanager
def within_batch(trainer: Trainer) -> Iterator[None]:
    """The last batch is not counted as completed yet, as in the hooks at its end."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    for count in (batches.current, batches.total):
        count.completed -= 1
    try:
        yield
    finally:
        for count in (batches.current, batches.total):
            count.completed += 1


def requeue(trainer: Trainer, original: Callable[..., Any]) -> None:
    """What Lightning does in its handler of SLURM's signal: save, and ask for a new place in the queue."""
    original(signal.SIGUSR1, None)


def average_of(callback: WeightAveraging) -> AveragedModel | None:
    """The averaged model of a WeightAveraging; there is none outside of `fit`."""
    return callback._average_model


def average_of_epochs(callback: StochasticWeightAveraging) -> Module | None:
    """The copy of the module in which StochasticWeightAveraging averages; there is none before `setup`."""
    return callback._average_model


def go_on_skipping_backward(trainer: Trainer, skip: bool) -> None:
    """What `skip_backward` said holds on, whoever has set it otherwise."""
    trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = skip


def swap_parts(
    callback: WeightAveraging,
    leash: Leash,
    in_part: Callable[[], AbstractContextManager[None]],
    part: Callable[[Module], Module],
) -> None:
    """Let a WeightAveraging exchange its average and the weights within a part of both, for the time of a run."""

    def within(exchange: Callable[[Module], None]) -> Callable[[Module], None]:
        def exchange_part(module: Module) -> None:
            with in_part():
                exchange(part(module))

        return exchange_part

    leash.wrap(callback, "_swap_models", within(callback._swap_models))  # type: ignore[arg-type]
    leash.wrap(callback, "_copy_average_to_current", within(callback._copy_average_to_current))  # type: ignore[arg-type]


def averaged_until(callback: WeightAveraging) -> int:
    """The step of the run at which a WeightAveraging last averaged, or saved that it did."""
    return int(callback._latest_update_step)


# -- checkpoints that are written later -------------------------------------------------------------------------------


def writes_later(io: object) -> bool:
    """Whether this CheckpointIO returns before its files are written."""
    return _later(io) is not None


def behind_writes(io: object, job: Callable[[], object]) -> None:
    """Do this behind what a CheckpointIO has still to write: in its own thread if it has one, else now."""
    later = _later(io)
    if later is None or later._executor is None:
        job()
    else:
        later._executor.submit(job)


def in_its_thread(io: object, job: Callable[[], T]) -> Future[T]:
    """Have a late writer's own thread do this, in its turn; what goes wrong in it is that writer's error."""
    later = _later(io)
    if later is None:
        raise ValueError(f"{io!r} does not write later: it has no thread")

    def guarded() -> T:
        try:
            return job()
        except BaseException as error:
            later._error = error
            raise

    later._ensure_setup()
    assert later._executor is not None  # as of now
    return later._executor.submit(guarded)


def late_error(io: object) -> BaseException | None:
    """Why a CheckpointIO that writes later could not; it keeps that for ever."""
    later = _later(io)
    return None if later is None else later._error


def write_when(io: object, ready: Callable[[], bool], write: Callable[[], object]) -> None:
    """What `write` has a late writer write is written if `ready` says so, which is asked in the writer's own thread."""
    later = _later(io)
    if later is None:
        raise ValueError(f"{io!r} does not write later: write now")
    later._ensure_setup()
    executor = later._executor
    later._executor = _Gate(executor, ready)  # type: ignore[assignment]  # for this call: `submit` is all it asks for
    try:
        write()
    finally:
        later._executor = executor


@dataclass(frozen=True)
class _Gate:
    executor: Any
    ready: Callable[[], bool]

    def submit(self, job: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        return self.executor.submit(lambda: self.ready() and job(*args, **kwargs))


def with_inner(io: Any, kind: type[object], other: Callable[[], Any]) -> Any:
    """This CheckpointIO with another one in the place of a `kind`, also inside of Lightning's wrappers."""
    if type(io) is kind:
        return other()
    if isinstance(io, _WrappingCheckpointIO):
        io._checkpoint_io = with_inner(io.checkpoint_io, kind, other)
    return io


def _later(io: object) -> AsyncCheckpointIO | None:
    while io is not None:
        if isinstance(io, AsyncCheckpointIO):
            return io
        io = getattr(io, "checkpoint_io", None)
    return None


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
