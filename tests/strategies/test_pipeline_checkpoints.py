"""A checkpoint of a pipeline is an ordinary one, and a run goes on from it to the bit."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.strategies import compat
from lightning_async.transport.mail import Wait
from tests.strategies.piped import Piped, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.stores import AtTheEnd, Dies, DiesWriting, SavesTwice

SAVING = {"enable_checkpointing": True}
MISSING = "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"
BOTH = {"max_steps": 100}
"""Limits by epochs and by steps: Lightning takes that for training without epochs."""
UNSEEN = {"limit_val_batches": 0}


def _train(
    folder: str,
    devices: int,
    epochs: int,
    resume: str | None,
    module: dict[str, Any],
    every: int | None,
    options: dict[str, Any] | None = None,
) -> Any:
    for sentence in ("The dirpath has changed", MISSING):
        warnings.filterwarnings("ignore", sentence)
    lit = Piped(**module)
    saved = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=every)
    t = trainer(devices, **{"max_epochs": epochs, "callbacks": [saved], **SAVING, **(options or {})})
    t.fit(lit, loader(shuffle=True), loader(20), ckpt_path=resume)
    return weights(lit), lit.losses, (t.global_step, t.current_epoch, compat.log_step(t))


def _is_rest_of(whole: Any, rest: Any, batches: int) -> None:
    """Behind so many batches of the run that was not interrupted."""
    assert rest[0][1] == whole[0][1][batches:]
    assert [(end[0], end[2]) for end in rest] == [(end[0], end[2]) for end in whole]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("devices", "module", "limited"), [(2, {"optimizer": "adam"}, BOTH), (3, {"schedule": "step"}, BOTH | UNSEEN)]
)
def test_a_run_goes_on_to_the_bit(
    devices: int, module: dict[str, Any], limited: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(devices, _train, str(tmp_path / "a"), devices, 3, None, module, None)
    run(devices, _train, str(tmp_path / "b"), devices, 1, None, module, None)
    file = str(tmp_path / "b" / "epoch=0-step=8.ckpt")
    for name, options in {"by epochs": {}, "limited": limited}.items():
        _is_rest_of(whole, run(devices, _train, str(tmp_path / name), devices, 3, file, module, None, options), 8)


def _breaks_off(file: Path) -> None:
    trainer(2, max_steps=4, callbacks=[AtTheEnd(file)]).fit(Piped(), loader(shuffle=True), loader(20))


@pytest.mark.few(0)
@pytest.mark.parametrize("options", [{}, BOTH])
def test_a_run_that_broke_off_within_an_epoch_and_was_saved_at_its_end_goes_on_there(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Lightning calls the hooks of the epoch's end where a run stops by its steps, and counts it."""
    file = tmp_path / "end.ckpt"
    run(2, _breaks_off, file)
    whole = run(2, _train, str(tmp_path / "a"), 2, 2, None, {}, 4)
    _is_rest_of(whole, run(2, _train, str(tmp_path / "b"), 2, 2, str(file), {}, 4, options), 4)


@pytest.mark.few(0)
@pytest.mark.parametrize("step", [12, 16])
@pytest.mark.parametrize("options", [{}, BOTH | UNSEEN, {"max_epochs": -1, "max_steps": 24}])
def test_a_run_that_was_saved_by_its_steps_where_an_epoch_ends_goes_on_twice(
    options: dict[str, Any], step: int, tmp_path: Path
) -> None:
    """In the middle of the next epoch, and at its end."""

    def train(folder: str, file: Path | None) -> Any:
        return run(2, _train, str(tmp_path / folder), 2, 3, file and str(file), {}, 4, options)

    whole = train("whole", None)
    _is_rest_of(whole, train("once", next((tmp_path / "whole").glob("*step=8.ckpt"))), 8)
    _is_rest_of(whole, train("twice", next((tmp_path / "once").glob(f"*step={step}.ckpt"))), step)


class Told(Callback):
    """All ranks are told to end behind this batch of the first epoch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx + 1) == (0, self.batch):
            strategy = trainer.strategy
            os.kill(os.getpid(), signal.SIGTERM)
            strategy.together(_heard(strategy.office.flags))
            strategy.turns.place.halt = strategy.turns.batches


def _heard(flags: Any) -> Wait[None]:
    while not flags.terminating:
        yield "the run to be told to end"


def _told(folder: str, batch: int) -> None:
    saver = ModelCheckpoint(folder, save_on_exception=True, every_n_epochs=100)
    with pytest.raises(SIGTERMException):
        trainer(2, callbacks=[Told(batch), saver], **SAVING, **UNSEEN).fit(Piped(), loader(shuffle=True), loader(20))


@pytest.mark.few(0)
@pytest.mark.parametrize("batch", [8, 4])
def test_a_run_that_was_told_to_end_goes_on_behind_its_last_batch(batch: int, tmp_path: Path) -> None:
    """Which may be the last one of an epoch."""
    run(2, _told, str(tmp_path / "told"), batch)
    (file,) = (tmp_path / "told").iterdir()
    whole = run(2, _train, str(tmp_path / "a"), 2, 2, None, {}, batch, UNSEEN)
    _is_rest_of(whole, run(2, _train, str(tmp_path / "b"), 2, 2, str(file), {}, batch, UNSEEN), batch)


def _load(file: str) -> Any:
    warnings.filterwarnings("ignore", MISSING)
    lit = Piped()
    checkpoint = torch.load(file, weights_only=True)
    lit.load_state_dict(checkpoint["state_dict"])
    plain = L.Trainer(
        max_epochs=2, enable_progress_bar=False, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    plain.fit(lit, loader(), loader(20), ckpt_path=file)
    return weights(Piped.load_from_checkpoint(file)), plain.global_step


def test_plain_lightning_loads_it_and_goes_on_from_it(tmp_path: Path) -> None:
    ends = run(3, _train, str(tmp_path), 3, 1, None, {"optimizer": "sgd"}, None)
    ((loaded, steps),) = run(1, _load, str(tmp_path / "epoch=0-step=8.ckpt"))
    assert loaded == ends[0][0]
    assert steps == 16


def _two_then_three(file: str, devices: int) -> Any:
    warnings.filterwarnings("ignore", MISSING)
    lit = Piped()
    t = trainer(devices, max_epochs=2)
    t.fit(lit, loader(), loader(20), ckpt_path=file)
    warnings.filterwarnings("ignore", ".*it holds the weights alone")
    t.save_checkpoint(f"{file}.behind")
    return weights(lit)


@pytest.mark.few(0)
def test_another_number_of_stages_goes_on_from_it(tmp_path: Path) -> None:
    run(2, _train, str(tmp_path), 2, 1, None, {}, None)
    file = str(tmp_path / "epoch=0-step=8.ckpt")
    ends = run(3, _two_then_three, file, 3)
    assert ends[0] == ends[1] == ends[2]
    behind = torch.load(
        f"{file}.behind", weights_only=True
    )  # saved behind the fit, where each rank has the whole module
    assert "optimizer_states" not in behind
    assert weights(Piped.load_from_checkpoint(f"{file}.behind")) == ends[0]


def test_saves_in_mid_epoch_are_whole(tmp_path: Path) -> None:
    run(3, _train, str(tmp_path), 3, 1, None, {}, 3)
    assert {file.name for file in tmp_path.iterdir()} == {"epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt"}
    state = torch.load(tmp_path / "epoch=0-step=3.ckpt", weights_only=True)
    assert len(state["optimizer_states"][0]["state"]) == len(list(Piped().parameters()))
    fresh = Piped().state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in state["state_dict"].items())


@pytest.mark.few(0)
def test_a_run_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    """From the batch after the last one that was trained on, in the same order."""
    whole = run(2, _train, str(tmp_path / "a"), 2, 2, None, {}, 5)
    file = str(tmp_path / "a" / "epoch=0-step=5.ckpt")
    rest = run(2, _train, str(tmp_path / "b"), 2, 2, file, {}, 5)
    assert rest[0][1] == whole[0][1][5:]
    assert rest[0][0] == whole[0][0]


class SavesAt(Callback):
    """All save behind this batch of the first epoch."""

    def __init__(self, file: str, batch: int) -> None:
        self.file, self.batch = file, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx + 1) == (0, self.batch):
            trainer.save_checkpoint(self.file)


def _adds_up(devices: int, replicas: int, file: str, batch: int, resume: bool) -> Any:
    warnings.filterwarnings("ignore", MISSING)
    lit = Piped(schedule="step")
    callbacks = [] if resume else [SavesAt(file, batch)]
    t = trainer(devices, knobs={"replicas": replicas}, callbacks=callbacks, accumulate_grad_batches=4)
    t.fit(lit, loader(4, shuffle=True), loader(20), ckpt_path=file if resume else None)
    return weights(lit), lit.losses, t.global_step


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*not resumable")
@pytest.mark.parametrize(("devices", "replicas", "batch"), [(3, 1, 6), (4, 2, 3), (2, 1, 7), (3, 1, 4)])
def test_a_run_goes_on_between_two_updates(devices: int, replicas: int, batch: int, tmp_path: Path) -> None:
    """The gradients that were added up to the next one are in the file."""
    file = str(tmp_path / "x.ckpt")
    through = run(devices, _adds_up, devices, replicas, file, batch, False)
    pipes = torch.load(file, weights_only=True)["delayed_pipeline"]["gradients"]
    names = {name for name, _ in Piped().named_parameters()} if batch % 4 else set()
    assert [{*pipe["before"], *pipe["rest"]} for pipe in pipes] == [names] * replicas
    assert all(gradient.any() for pipe in pipes for part in pipe.values() for gradient in part.values())
    rest = run(devices, _adds_up, devices, replicas, file, batch, True)
    last = devices // replicas - 1
    assert rest[last][1] == through[last][1][batch:]
    assert [(end[0], end[2]) for end in rest] == [(end[0], end[2]) for end in through]


def _with_fewer(file: str, devices: int, batch: int) -> Any:
    return _adds_up(devices, 1, file, batch, True)


@pytest.mark.few(0)
def test_gradients_that_were_added_up_go_on_in_other_stages(tmp_path: Path) -> None:
    """Of two pipelines, in one of three stages: what a step takes is their mean."""
    file = str(tmp_path / "x.ckpt")
    run(4, _adds_up, 4, 2, file, 3, False)
    ends = run(3, _with_fewer, file, 3, 3)
    assert ends[0][0] == ends[1][0] == ends[2][0]
    assert ends[0][2] == ends[2][2]


class Raises(Callback):
    """Wishes to save what is there after an exception."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 4:
            raise KeyError("gone")

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        warnings.filterwarnings("ignore", ".*is not written")
        trainer.save_checkpoint("late.ckpt")


def _fails(folder: str) -> None:
    os.chdir(folder)
    trainer(2, callbacks=[Raises()]).fit(Piped(), loader(), loader(20))


def test_a_part_is_not_saved_as_a_whole(tmp_path: Path) -> None:
    with Forked(2, _fails, str(tmp_path)) as forked:
        results = forked.results(20.0)
    assert [r.kind for r in results] == ["PeerFailedError", "KeyError"]
    assert "rank 1 stopped: KeyError: 'gone'" in results[0].error
    assert not list(tmp_path.iterdir())


class SavesAlone(Callback):
    """As under `if trainer.is_global_zero`, which a checkpoint of a pipeline cannot be under."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == self.batch:
            trainer.save_checkpoint("alone.ckpt")


def _saves_alone(folder: str, rank: int, batch: int) -> None:
    os.chdir(folder)
    trainer(3, callbacks=[SavesAlone(rank, batch)]).fit(Piped(), loader(), loader(20))


@pytest.mark.few(2)
@pytest.mark.parametrize(("rank", "batch"), [(0, 2), (1, 2), (2, 2), (0, 7)])
def test_a_rank_that_saves_alone_stops_the_run_at_once(rank: int, batch: int, tmp_path: Path) -> None:
    """In mid-epoch its neighbours hear that it rests; at the end of an epoch they rest too, but for something else."""
    with Forked(3, _saves_alone, str(tmp_path), rank, batch) as forked:
        results = forked.results(20.0)
    assert all(r.kind in ("LostStageError", "PeerFailedError", "RuntimeError") for r in results), results
    sentence = "the ranks are at different things" if batch == 7 else "stop, save and validate after the same ones"
    assert any(sentence in r.error for r in results), results
    assert not list(tmp_path.iterdir())


# -- a save that is cut short ------------------------------------------------------------------------------------------


class DiesBringing(Callback):
    """The process is killed in a save, when it has brought the weights of its stage, and is waited for no less."""

    def __init__(self, *, at: int) -> None:
        self.at, self.armed = at, False

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        if self.armed and self.at >= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(folder: str, dead: int, kind: Any, resume: bool) -> list[float]:
    dies = kind(at=0 if os.environ["RANK"] == str(dead) else -1)
    own: dict[str, Any] = {"callbacks": [dies]} if kind is DiesBringing else {"callbacks": [], "plugins": [dies]}

    def arm() -> None:
        dies.armed = True

    own["callbacks"].append(SavesTwice(f"{folder}/x.ckpt", arm))
    lit = Piped()
    t = trainer(2, max_epochs=2, **own)
    t.fit(lit, loader(shuffle=True), loader(20), ckpt_path=f"{folder}/x.ckpt" if resume else None)
    return weights(lit)


@pytest.mark.few(0)
@pytest.mark.parametrize(("dead", "kind"), [(1, DiesBringing), (0, DiesWriting), (0, Dies)])
def test_a_kill_in_a_save_leaves_the_checkpoint_of_before(dead: int, kind: Any, tmp_path: Path) -> None:
    """Whoever it hits: while a stage brings its part, before the file is written, and in the middle of that."""
    with Forked(2, _killed, str(tmp_path), dead, kind, False, store=True) as forked:
        forked.processes[dead].join(30)  # the other is killed with it
        assert forked.processes[dead].exitcode == -signal.SIGKILL
    assert any(tmp_path.glob("x.ckpt.*.part")) is (kind is DiesWriting)
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["epoch"] == 0
    on = run(2, _killed, str(tmp_path), -1, kind, True)
    assert on == run(2, _killed, str(tmp_path), -1, kind, False)
