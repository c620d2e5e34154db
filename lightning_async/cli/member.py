"""One member of a recorded run in this process: its module, its data and its Trainer, as its process had them.

The first weights are rank 0's, as in the run: built from the seed that the log names, or loaded from a checkpoint. If
they are not those of the run, the log's first digest says so at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import Strategy

from lightning_async.cli.inputs import KINDS, PIPELINE, arguments_of, load, made
from lightning_async.pipeline.edge import LostStageError
from lightning_async.strategies.averages import Averages
from lightning_async.strategies.course import Course, WrongInput
from lightning_async.strategies.replayed import RecordedMeetings, seat, seated
from lightning_async.strategies.replayed_office import Place
from lightning_async.strategies.replayed_pipe import seat_stage
from lightning_async.strategies.replaying import Replaying
from lightning_async.transport.hall import Hall
from lightning_async.transport.log import Log
from lightning_async.transport.replay import ReplayCarrier, replay
from lightning_async.transport.stage import Program, Stage, Stop
from lightning_async.transport.world import seen_as

STEPS = ("on_train_batch_start", "training_step", "on_train_batch_end")
"""Hooks that may ask for the rank."""
Seated = tuple[Strategy, list[Callback]]
"""A strategy of a replay, and the callbacks that stand first among its Trainer's."""


def recompute(logs: dict[int, Log], arguments: argparse.Namespace, course: Course) -> None:
    """Run all members, or as many as are wanted; raises `Difference`, `Divergence` or `WrongInput`."""
    stage = Stage()
    hall = Hall(stage, set(logs))
    wanted = None if arguments.member is None else [arguments.member]

    def program(carrier: ReplayCarrier) -> Program:
        yield from ()  # it waits inside of Lightning
        log = logs[carrier.me]
        try:
            _fit(carrier, log, hall, arguments, course)
        except LostStageError:
            if log.finished or not log.over:
                raise
            raise Stop from None  # so it ended in the run

    replay(logs, dict.fromkeys(logs, program), stage=stage, wanted=wanted)
    course.short = stage.short


def _fit(carrier: ReplayCarrier, log: Log, hall: Hall, arguments: argparse.Namespace, course: Course) -> None:
    """What the member's process did."""
    header, begin = log.header, log.first("start")
    torch.set_num_threads(header["threads"])
    torch.manual_seed(header["torch_seed"])
    if header["seed"] is not None:
        seed_everything(header["seed"], workers=header.get("seeds_workers", False), verbose=False)
    module = made(arguments.module, LightningModule, **arguments_of(arguments.init))
    module.configure_callbacks = list  # callbacks are left out
    if arguments.ckpt and not begin["resumed"]:
        _load_weights(module, arguments.ckpt)
    try:
        strategy, callbacks = (_stage if header["strategy"] == PIPELINE else _replica)(carrier, log, hall, course)
    except (TypeError, ValueError) as error:
        raise WrongInput(f"the run's {header['strategy']} cannot be made again from its knobs: {error}") from None
    limits = {}
    if header["strategy"] == PIPELINE and begin.get("fed") == "stream":
        limits = {"limit_train_batches": header["limit"]}  # the stream is not drawn from behind it
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=callbacks,
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **limits,
        **header["trainer"],
    )
    if not begin["resumed"]:
        for counter in ("processed", "completed"):  # a further fit of a Trainer counts on
            setattr(trainer.fit_loop.epoch_progress.current, counter, begin["epoch"])
    whole = made(arguments.datamodule, LightningDataModule) if arguments.datamodule else None
    data = load(arguments.data) if arguments.data else None
    for source in filter(None, (module, whole)):
        _at_its_place(source, carrier)
    with seen_as(carrier.me, carrier.ranks):
        data = data() if callable(data) else data
    ckpt_path = arguments.ckpt if begin["resumed"] else None
    trainer.fit(module, train_dataloaders=data, datamodule=whole, ckpt_path=ckpt_path)


def _at_its_place(source: object, carrier: ReplayCarrier) -> None:
    """Whoever makes the data sees the member's rank, as its process did."""

    def seeing(make: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make)
        def make_there(*args: Any, **kwargs: Any) -> Any:
            with seen_as(carrier.me, carrier.ranks):
                return make(*args, **kwargs)

        return make_there

    for name in ("prepare_data", "setup", "train_dataloader", *STEPS):
        if not hasattr(source, name):
            continue
        setattr(source, name, seeing(getattr(source, name)))


def _replica(carrier: ReplayCarrier, log: Log, hall: Hall, course: Course) -> Seated:
    replaying = Replaying(carrier, log, course, hall)
    kind = seated(KINDS[log.header["strategy"]])
    strategy = kind(**log.header["knobs"], cluster_environment=Place(carrier.me, carrier.ranks))
    seat(strategy, replaying, carrier, hall, log.first("start"))
    return strategy, [RecordedMeetings(strategy, replaying, log), Averages(strategy)]


def _stage(carrier: ReplayCarrier, log: Log, hall: Hall, course: Course) -> Seated:
    return seat_stage(carrier, log, course, hall, Place(carrier.me, carrier.world))


def _load_weights(module: LightningModule, path: Path) -> None:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(found.get("state_dict", found))
    except (OSError, RuntimeError) as error:
        raise WrongInput(f"{path} cannot be loaded into the module: {error}") from None
