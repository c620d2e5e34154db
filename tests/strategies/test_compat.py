"""Private names of Lightning: each exists, each is put back, and one that vanished is refused, not passed over."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_async.strategies import compat
from lightning_async.strategies.writer import Writer
from tests.strategies.lit import Lit, loader, trainer


@pytest.fixture
def t() -> L.Trainer:
    return trainer(1)


@pytest.mark.parametrize("path", compat.PRIVATE)
def test_each_private_name_exists(t: L.Trainer, path: str) -> None:
    owner: Any = t
    for part in path.split("."):
        owner = getattr(owner, part)
    assert callable(owner)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
        (_SignalConnector, "_sigterm_notifier_fn"),
        (_DataConnector, "_requires_distributed_sampler"),
        (L.Trainer, "_run_stage"),
        (_SignalConnector, "_slurm_sigusr_handler_fn"),
        (_TrainingEpochLoop, "_should_check_val_epoch"),
        (_TrainingEpochLoop, "_should_check_val_fx"),
        (_TrainingEpochLoop, "on_advance_end"),
        (_FitLoop, "_iteration_based_training"),
    ],
)
def test_a_name_that_vanished_is_refused(t: L.Trainer, owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(MisconfigurationException, match=f"does not know Lightning {L.__version__}.*{name}"):
        compat.check(t)


def test_what_a_checkpoint_would_hold_and_when_one_was_saved_last(t: L.Trainer) -> None:
    lit = Lit()
    lit.trainer = t
    t.strategy.connect(lit)
    assert compat.dump(t).keys() >= {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"}
    callback = ModelCheckpoint()
    assert compat.last_save(callback) == (0, "")
    compat.set_last_save(callback, 5, "x")
    assert (callback._last_global_step_saved, callback._last_checkpoint_saved) == (5, "x")


def test_a_late_writers_thread_does_what_it_is_given_and_keeps_what_goes_wrong() -> None:
    io = AsyncCheckpointIO()
    assert compat.in_its_thread(io, lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        compat.in_its_thread(io, lambda: 1 // 0).result()
    assert isinstance(compat.late_error(io), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        io.teardown()
    with pytest.raises(ValueError, match="does not write later"):
        compat.in_its_thread(object(), lambda: 3)


def test_a_late_writer_writes_in_the_thread_that_it_is_given_until_its_teardown() -> None:
    written, io = Event(), AsyncCheckpointIO(TorchCheckpointIO())
    compat.let_write(object(), Writer(lambda: 30.0))
    compat.let_write(io, mine := Writer(lambda: 30.0))
    compat.let_write(io, Writer(lambda: 30.0))
    assert io._executor is mine
    begun = compat.in_its_thread(io, partial(_notes, written, "x.ckpt"))
    while not compat.being_written(io):
        assert not begun.done()
    assert compat.being_written(io) == "x.ckpt"
    written.set()
    io.save_checkpoint({"a": torch.ones(2)}, "y.ckpt")
    io.teardown()
    assert torch.load("y.ckpt")["a"].tolist() == [1, 1]
    assert io._executor is None
    assert compat.being_written(io) == compat.being_written(object()) == ""


def test_it_does_so_too_where_something_was_saved_before_and_behind_that() -> None:
    """Between two fits the user saves: Lightning makes a thread of its own for it."""
    there, written = Event(), list[str]()

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            there.wait(30.0)
            written.append(path)

    io = AsyncCheckpointIO(Slow())
    io.save_checkpoint({}, "between")
    compat.let_write(io, mine := Writer(lambda: 30.0))
    assert io._executor is mine
    io.save_checkpoint({}, "second fit")
    assert not written
    there.set()
    io.teardown()
    assert written == ["between", "second fit"]


def _notes(written: Event, path: str) -> None:
    written.wait(30.0)


def test_what_is_read_exists(t: L.Trainer) -> None:
    assert t._logger_connector._callback_metrics == {}
    assert t._logger_connector._first_loop_iter is None
    assert not t.fit_loop._should_reload_train_dl
    assert AsyncCheckpointIO()._executor is None
    assert AsyncCheckpointIO()._error is None
    assert AsyncCheckpointIO()._checkpoint_io is None
    assert callable(AsyncCheckpointIO()._ensure_setup)
    assert compat.lightnings(t.strategy) == []
    optimizer = t.strategy.optimizers = [torch.optim.SGD(Lit().parameters(), 0.1)]
    assert [one.optimizer for one in compat.lightnings(t.strategy)] == optimizer


def test_the_batch_ahead_is_fetched_late(t: L.Trainer) -> None:
    drawn: list[int] = []

    def draw() -> Any:
        for k in range(3):
            drawn.append(k)
            yield k

    fetcher: Any = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader(draw(), "max_size_cycle"))
    t.fit_loop._data_fetcher = fetcher
    iter(fetcher)
    compat.look_ahead(t)
    assert drawn == [0], "left alone until it is asked to fetch late"
    compat.fetch_late(t)
    for k in range(3):
        assert next(fetcher)[0] == k
        assert drawn == list(range(k + 1))
        compat.look_ahead(t)
        assert t.fit_loop.epoch_loop.batch_progress.is_last_batch is (k == 2)
    with pytest.raises(StopIteration):
        next(fetcher)


@pytest.mark.parametrize("endless", [True, False])
def test_a_batch_is_skipped_whether_one_is_fetched_ahead_or_none(t: L.Trainer, endless: bool) -> None:
    fetcher: Any = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader((k for k in range(4)) if endless else list(range(4)), "max_size_cycle"))
    iter(fetcher)
    before = fetcher.fetched
    for _ in range(2):
        compat.skip_batch(fetcher)
    assert fetcher.fetched == before
    assert [next(fetcher)[0] for _ in range(2)] == [2, 3]
    compat.skip_batch(fetcher)
    with pytest.raises(StopIteration):
        next(fetcher)


def test_the_epoch_to_go_on_with_is_told_to_the_loops_and_to_a_sampler(t: L.Trainer) -> None:
    sampler: Any = DistributedSampler(range(4), num_replicas=2, rank=0)
    compat.tell_epoch(t, {"epoch_progress": {"current": {"processed": 3}}})
    assert t.current_epoch == 3
    compat.set_sampler_epoch(t, DataLoader(range(4), sampler=sampler))
    assert sampler.epoch == 3


def test_plateaus_step_where_what_they_go_by_is_there(t: L.Trainer) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    t.strategy.lr_scheduler_configs = [LRSchedulerConfig(plateau, reduce_on_plateau=True, monitor="val")]
    t.fit_loop._restarting = True
    compat.let_plateaus_step(t)
    assert t.fit_loop.restarting
    t.callback_metrics["val"] = torch.ones(())
    compat.let_plateaus_step(t)
    assert not t.fit_loop.restarting


def test_everything_is_put_back(t: L.Trainer) -> None:
    before = {path: _get(t, path) for path in compat.PRIVATE}
    leash = compat.take_off(t, poll=lambda: None, sigterm=lambda: None, failed=lambda e: None)
    assert all(_get(t, path) != before[path] for path in compat.PRIVATE)
    leash.restore()
    leash.restore()
    assert {path: _get(t, path) for path in compat.PRIVATE} == before


def test_the_signal_handler_only_sets_a_flag(t: L.Trainer) -> None:
    calls: list[str] = []
    leash = compat.take_off(t, poll=lambda: None, sigterm=lambda: calls.append("term"), failed=lambda e: None)
    _get(t, "_signal_connector._sigterm_notifier_fn")(signal.SIGTERM, None)
    leash.restore()
    assert calls == ["term"]


def test_files_are_named_by_another_and_names_in_passing_are_not(
    t: L.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place in which a ModelCheckpoint of Lightning's makes up the name of a file that it saves."""
    monkeypatch.setattr(t, "save_checkpoint", lambda *_: None)
    saves = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    leash = compat.take_off(t, poll=lambda: None, sigterm=lambda: None, failed=lambda e: None)
    compat.name_files_by(saves, leash, lambda *_, **__: f"{tmp_path}/other")
    passing = saves.format_checkpoint_name({"epoch": torch.tensor(0)})
    assert passing.startswith(f"{tmp_path}/epoch=0")
    assert saves._get_metric_interpolated_filepath_name({}, t) == f"{tmp_path}/other"
    saves._save_last_checkpoint(t, {})
    assert saves.last_model_path == f"{tmp_path}/other"
    leash.restore()
    assert saves.format_checkpoint_name({"epoch": torch.tensor(0)}) == passing
    assert not {"on_exception", "_save_last_checkpoint"} & vars(saves).keys()


def test_a_checkpoint_goes_by_another_score(t: L.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "save_checkpoint", lambda *_: None)
    saves = ModelCheckpoint(tmp_path, monitor="loss", filename="{loss:.1f}")
    leash = compat.take_off(t, poll=lambda: None, sigterm=lambda: None, failed=lambda e: None)
    compat.score_by(saves, leash, lambda score: score + 1)
    saves._save_topk_checkpoint(t, {"loss": torch.tensor(2.0)})
    assert saves.best_model_score == 3.0
    assert saves.best_model_path == f"{tmp_path}/loss=3.0.ckpt"
    leash.restore()
    assert "_save_monitor_checkpoint" not in vars(saves)


@pytest.mark.parametrize("make", [partial(ModelCheckpoint, mode="max"), partial(EarlyStopping, mode="max")])
def test_a_callback_looks_at_a_metric_that_is_shown(
    t: L.Trainer, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = make(monitor="loss")
    leash, metrics = compat.Leash(t), t.callback_metrics
    metrics["loss"] = torch.tensor(3.0)
    seen: list[Any] = []

    def asked(*_: Any) -> None:
        if isinstance(callback, ModelCheckpoint):
            seen.append(callback._monitor_candidates(t)["loss"])
        else:
            callback._run_early_stopping_check(t)
            seen.append(callback.best_score)

    monkeypatch.setattr(callback, "on_validation_end", asked)
    compat.looks_within(callback, leash, lambda: compat.metric_shown(t, "loss", torch.tensor(2.0)))
    callback.on_validation_end(t, t.lightning_module)
    assert seen == [2.0]
    if isinstance(callback, ModelCheckpoint):
        assert callback._monitor_candidates(t)["loss"] == 3.0, "in passing"
    assert metrics == {"loss": 3.0}
    with compat.metric_shown(t, "other", torch.tensor(1.0)):
        assert "other" in metrics
    assert "other" not in metrics
    leash.restore()
    assert not {"_monitor_candidates", "_run_early_stopping_check"} & vars(callback).keys()


def test_a_metric_of_an_earlier_epoch_is_known_as_such(t: L.Trainer) -> None:
    results = t.fit_loop.epoch_loop._results
    assert not compat.is_of_before(t, "loss"), "it is nothing that training logs"
    results.log("training_step", "loss", torch.tensor(1.0), on_step=True, on_epoch=True, batch_size=1)
    names = ("loss", "loss_step", "loss_epoch")
    assert not any(compat.is_of_before(t, name) for name in names)
    results.reset()
    assert all(compat.is_of_before(t, name) for name in names)


def test_plateaus_go_by_another_value_where_there_is_one(t: L.Trainer) -> None:
    t.callback_metrics.update({"loss": torch.tensor(3.0), "other": torch.tensor(4.0)})
    leash, values = compat.Leash(t), {"loss": torch.tensor(2.0)}
    compat.plateaus_go_by(t, leash, values)
    look = t.fit_loop.epoch_loop._get_monitor_value
    assert (look("loss"), look("other"), look("none")) == (2.0, 4.0, None)
    leash.restore()
    assert t.fit_loop.epoch_loop._get_monitor_value("loss") == 3.0


def test_the_other_private_attributes_exist(t: L.Trainer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = ModelCheckpoint(every_n_train_steps=3)
    assert compat.saves_every(checkpoint) == 3
    key = checkpoint.state_key
    with compat.saves_at_once(checkpoint):
        assert 7 % checkpoint._every_n_train_steps == 0
        assert checkpoint.state_key == key
    assert 7 % checkpoint._every_n_train_steps == 1
    assert not compat.save_is_due(checkpoint, 1e9)
    assert compat.saves_after(checkpoint) == 0.0
    hourly = ModelCheckpoint(train_time_interval=timedelta(hours=1))
    hourly.on_train_start(t, t.lightning_module)
    assert compat.save_is_due(hourly, time.monotonic() + 3601)
    assert not compat.save_is_due(hourly, time.monotonic() + 3599)
    assert compat.saves_after(hourly) == 3600.0
    timer = Timer(duration={"seconds": 0})
    assert compat.time_is_up(timer)
    assert not compat.time_is_up(Timer(duration={"seconds": 0}, interval="epoch"))
    assert not compat.time_is_up(Timer(duration={"hours": 1}))
    assert compat.log_every(t) == t.log_every_n_steps
    compat.set_log_step(t, 7)
    assert compat.log_step(t) == 7
    saved = t.fit_loop.state_dict()
    compat.count_log_step(saved)
    t.fit_loop.load_state_dict(saved)
    assert compat.log_step(t) == 8
    assert compat.logs_now(t)  # outside of a loop always
    compat.log(t, {"a": 1.0}, 7)
    assert compat.wants_our_sampler(t)
    assert not compat.synchronises_batchnorm(t)
    assert not compat.fast_dev_run(t)
    assert compat.callbacks(t) is t.callbacks
    average = WeightAveraging()
    assert compat.average_of(average) is None
    assert compat.averaged_until(average) == 0
    average.setup(t, Lit(), "fit")
    assert compat.average_of(average) is not None


def test_a_callback_exchanges_its_average_and_the_weights_within_a_part_of_both(t: L.Trainer) -> None:
    leash, average, lit = compat.Leash(t), WeightAveraging(), Lit()
    inside: list[bool] = []
    said: list[str] = []
    average.setup(t, lit, "fit")
    model = compat.average_of(average)
    assert model is not None

    @contextmanager
    def in_part() -> Iterator[None]:
        inside.append(True)
        whole, model.module = model.module, model.module.layer[0]
        yield
        model.module = whole

    with torch.no_grad():
        for p in model.module.parameters():
            p.zero_()
    compat.swap_parts(average, leash, in_part, lambda module: module.layer[0], lambda: said.append("swapped"))  # type: ignore[arg-type, return-value]
    first, last = lit.layer[0].weight.clone(), lit.layer[-1].weight.clone()
    average.on_validation_epoch_start(t, lit)
    assert not lit.layer[0].weight.any()
    for _ in range(2):
        compat.swap(average, lit)
    assert not lit.layer[0].weight.any()
    average.on_train_end(t, lit)
    assert torch.equal(lit.layer[0].weight, first)
    assert torch.equal(lit.layer[-1].weight, last)
    assert inside == [True] * 4
    assert said == ["swapped"] * 3
    leash.restore()
    average.on_train_end(t, lit)
    assert not lit.layer[-1].weight.any()


def test_where_stochastic_averages_are(t: L.Trainer) -> None:
    swa, lit = StochasticWeightAveraging(0.1), Lit()
    assert compat.average_of_epochs(swa) is None
    assert [compat.averages_on(StochasticWeightAveraging(0.1, device=d)) for d in (None, "meta")] == [None, "meta"]
    swa.setup(t, lit, "fit")
    assert isinstance(compat.average_of_epochs(swa), Lit)
    compat.go_on_skipping_backward(t, True)
    assert t.fit_loop._skip_backward is True
    swa.on_train_epoch_end(t)
    assert t.fit_loop.epoch_loop.automatic_optimization._skip_backward is False


def test_what_a_pipeline_takes_of_the_loop(t: L.Trainer) -> None:
    leash, calls = compat.Leash(t), []
    loop = t.fit_loop.epoch_loop
    assert loop.automatic_optimization._skip_backward is False
    compat.skip_backward(t, leash, True)
    assert t.fit_loop._skip_backward is True
    compat.around_ends_of_batches(t, leash, lambda: calls.append("before"), lambda: calls.append("after"))
    assert callable(loop.on_advance_end)
    compat.share_by_sampler(t, leash)
    assert callable(_get(t, "_data_connector._requires_distributed_sampler"))
    assert compat.ends_in_step(t)
    leash.restore()
    assert t.fit_loop._skip_backward is False
    assert "on_advance_end" not in vars(loop)


def _get(t: L.Trainer, path: str) -> Any:
    owner: Any = t
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def test_when_a_trainer_validates_by_time() -> None:
    asked: list[float] = []

    class Asks(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for ago in (19.0, 21.0):
                trainer._last_val_time = time.monotonic() - ago
                asked.append(compat.is_time_to_validate(trainer))
            with compat.with_val_seconds(trainer, None):
                asked.append(compat.is_time_to_validate(trainer))
            assert compat.val_seconds(trainer) == 20.0

    t = trainer(1, val_check_interval=timedelta(seconds=20), callbacks=[Asks()], strategy="auto", max_steps=1)
    t.fit(Lit(), loader(), loader(8, shuffle=False))
    assert asked == [False, True, False]
    assert not compat.is_time_to_validate(trainer(1))


def test_a_place_in_the_queue_is_asked_for_without_a_save(t: L.Trainer) -> None:
    saved: list[str] = []
    t.save_checkpoint = saved.append  # type: ignore[method-assign, assignment]
    asked: list[int] = []

    def handler(number: int, frame: None) -> None:
        t.save_checkpoint("here")
        asked.append(number)

    compat.requeue_unsaved(t, handler)
    assert (saved, asked) == ([], [signal.SIGUSR1])
    compat.requeue(t, handler)
    assert (saved, asked) == (["here"], [signal.SIGUSR1] * 2)
