"""What no count foresees stops all within a moment: a rank's wish, a signal, the clock of the first that lives."""

from __future__ import annotations

import itertools
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import SpeedFaults
from lightning_async.strategies.wishes import Requeue
from lightning_async.transport.rounds import Rounds
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer
from tests.strategies.ranks import Forked, run

SECONDS = 0.004  # a step
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def test_a_request_that_a_rank_hears_behind_the_answer_is_the_one_that_was_answered() -> None:
    quick, slow = Requeue(), Requeue()
    quick.hear()
    assert (quick.wanted, slow.wanted) == (True, False)
    for one in (quick, slow):
        one.answer()
    slow.hear()
    assert (quick.wanted, slow.wanted) == (False, False)
    slow.hear()
    assert (quick.wanted, slow.wanted) == (False, True), "another one"
    for one in (quick, slow):
        one.answer()
    quick.hear()
    assert (quick.wanted, slow.wanted) == (False, False)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from zip(range(240), INPUTS, TARGETS, strict=True)


class Wishes(L.Callback):
    """At its tenth batch one rank does something; remembers how long all went on, and whether they were stopped."""

    def __init__(self, rank: int, do: Any) -> None:
        self.rank, self.do, self.batches = rank, do, 0
        self.asked: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        self.asked.append(trainer.should_stop)
        if trainer.global_rank == self.rank and self.batches == 10:
            self.do(trainer)


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def terminate(trainer: L.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def wished(mode: str, rank: int, do: Any, folder: Path) -> dict[str, Any]:
    wishes, lit = Wishes(rank, do), Lit()
    saver = ModelCheckpoint(folder, filename="last", save_on_exception=True, every_n_epochs=100)
    callbacks = [wishes, saver, SpeedFaults(step_seconds=SECONDS)]
    t = trainer(2, knobs={"mode": mode}, callbacks=callbacks, max_steps=10**6, max_epochs=-1, enable_checkpointing=True)
    try:
        t.fit(lit, DataLoader(Endless(), batch_size=4))
        how = "stopped"
    except SIGTERMException:
        how = "terminated"
    end = torch.cat([p.detach().flatten() for p in lit.parameters()]).tolist()
    return {"how": how, "batches": wishes.batches, "steps": t.global_step, "end": end, "asked": wishes.asked}


@pytest.mark.few(2)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", ["sync", "pairwise"])
def test_one_rank_that_is_told_to_stop_stops_all(mode: str, rank: int, tmp_path: Path) -> None:
    found = run(2, wished, mode, rank, stop, tmp_path)
    assert [one["how"] for one in found] == ["stopped"] * 2
    assert found[0]["end"] == found[1]["end"]
    assert found[0]["steps"] == found[1]["steps"] < 10**4, "long before the steps that it was to take"
    if mode == "sync":
        assert found[0]["batches"] == found[1]["batches"]
    for one in found:
        assert not any(one["asked"][:-1]), "until the meeting it is a wish, and the rank trains on"


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_in_step_that_are_told_to_end_meet_and_save(rank: int, tmp_path: Path) -> None:
    found = run(2, wished, "sync", rank, terminate, tmp_path)
    assert [one["how"] for one in found] == ["terminated"] * 2
    assert found[0]["batches"] == found[1]["batches"]
    assert found[0]["end"] == found[1]["end"]
    assert len(list(tmp_path.glob("*.ranks/*rank*"))) == 2


def long_batches(rank: int, folder: Path) -> dict[str, Any]:
    """Told to end in its second batch, far from the first point, which is appointed before any speed is known."""
    lit, batches = Lit(), []

    class Ends(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            batches.append(trainer.global_step)
            if trainer.global_rank == rank and len(batches) == 2:
                terminate(trainer)

    saver = ModelCheckpoint(folder, filename="last", save_on_exception=True, every_n_epochs=100)
    t = trainer(
        2,
        callbacks=[Ends(), saver, SpeedFaults(step_seconds=0.5)],
        knobs={"meet_every": 30 * 2 * 4},
        max_epochs=-1,
        enable_checkpointing=True,
    )
    with pytest.raises(SIGTERMException):
        t.fit(lit, DataLoader(Endless(), batch_size=4))
    end = torch.cat([p.detach().flatten() for p in lit.parameters()]).tolist()
    return {"batches": len(batches), "end": end}


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
def test_in_the_first_stretch_ranks_with_long_batches_end_within_grace(rank: int, tmp_path: Path) -> None:
    found = run(2, long_batches, rank, tmp_path)
    assert found[0]["end"] == found[1]["end"], "at a meeting"
    assert all(one["batches"] < 20 for one in found), "grace is 20 batches long"
    assert len(list(tmp_path.glob("*.ranks/*rank*"))) == 2


ONCE = ("on_fit_start", "on_train_start")
EPOCHS = {
    "on_fit_start": 0,
    "on_train_start": 0,
    "on_train_epoch_start": 2,
    "on_train_batch_end": 1,
    "on_validation_start": 1,
    "on_validation_batch_start": 1,
    "on_validation_batch_end": 1,
    "on_validation_epoch_end": 1,
    "on_validation_end": 1,
    "on_train_epoch_end": 2,
}
"""The epochs that were begun when the run stops, if one rank is told so in this hook."""


class Told(L.Callback):
    """In this hook one rank is told to stop, the second time that all have met there; remembers where it validated."""

    def __init__(self, hook: str, rank: int) -> None:
        self.rank, self.asked = rank, 0
        self.second = hook not in ONCE
        self.validated: list[int] = []
        self._validated = hook == "on_validation_epoch_end"
        setattr(self, hook, self._told)

    def _told(self, trainer: L.Trainer, *_: Any) -> None:
        if self._validated:
            self.validated.append(trainer.global_step)
        self.asked += trainer.strategy.meeting and not trainer.sanity_checking  # type: ignore[attr-defined]
        trainer.should_stop = trainer.should_stop or (trainer.global_rank == self.rank and self.asked > self.second)

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validated.append(trainer.global_step)


def met(hook: str, rank: int, lengths: list[int]) -> dict[str, Any]:
    told, lit = Told(hook, rank), Lit()
    options = {"val_check_interval": 8, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    t = trainer(2, callbacks=[told, SpeedFaults(step_seconds=0.001, slow={1: 3.0})], max_epochs=6, **options)
    t.fit(lit, DataLoader(Some(lengths), batch_size=4), loader(40, shuffle=False))
    end = torch.cat([p.detach().flatten() for p in lit.parameters()]).tolist()
    return {"steps": t.global_step, "epoch": t.current_epoch, "end": end, "validated": told.validated}


def at_all_hooks(rank: int, lengths: list[int]) -> dict[str, dict[str, Any]]:
    return {hook: met(hook, rank, lengths) for hook in EPOCHS}


class Some(IterableDataset[Any]):
    """So many samples on each rank."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Any:
        return zip(range(self.lengths[int(os.environ["RANK"])]), INPUTS, TARGETS, strict=False)


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lengths", [[240, 240], [240, 16]], ids=["both train", "rank 1 waits"])
def test_what_tells_one_rank_at_a_meeting_stops_all(rank: int, lengths: list[int]) -> None:
    """At every hook, on a rank that trains and on one that waits for the others' meetings."""
    first, second = run(2, at_all_hooks, rank, lengths)
    for hook, epochs in EPOCHS.items():
        assert first[hook] == second[hook], hook
        late = hook == "on_train_batch_end" and rank == 1 and lengths[1] < lengths[0]  # of a rank that waits, its own
        assert first[hook]["epoch"] == epochs + late, hook
        if hook in ONCE:
            assert first[hook]["steps"] == 0


def asked(hook: str | None) -> list[list[str]]:
    """What all agreed on at each meeting of two epochs, with four meetings in each; every other one validates."""
    met: list[list[str]] = [[]]
    agree = Rounds.agree

    def noted(rounds: Rounds, word: bytes, *, what: str, **options: Any) -> Any:
        if what == "roll call":
            met.append([])
        met[-1].append(what)
        return agree(rounds, word, what=what, **options)

    Rounds.agree = noted  # type: ignore[method-assign,assignment]
    try:
        options = {"val_check_interval": 8, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
        knobs = {"meet_every": 4 * 2 * 4}
        t = trainer(2, knobs=knobs, max_epochs=2, **options)
        t.fit(Lit(), DataLoader(Some([64, 64]), batch_size=4), loader(40, shuffle=False))
    finally:
        Rounds.agree = agree  # type: ignore[method-assign]
    return met[2:]  # the first are all together before they train


def test_to_ask_who_stops_costs_no_agreement_of_its_own_in_mid_epoch() -> None:
    first, second = run(2, asked, None)
    assert first == second
    assert len(first) >= 8
    assert [meeting.count("who is told to stop") for meeting in first] == [1] * len(first)
    ends = [meeting for meeting in first if "what is trained" in meeting]
    assert len(ends) == 1, "at the end of the first epoch: what is trained may change as the next one starts"
    assert all(meeting[-1] == "who is told to stop" for meeting in first if meeting not in ends)


def early(folder: Path) -> dict[str, Any]:
    """All are told to stop, long before they may; and one is dry in every epoch."""
    stops = L.pytorch.callbacks.EarlyStopping("val", patience=1, min_delta=1e9)
    t = trainer(2, callbacks=[stops], min_epochs=3, max_epochs=6)
    t.fit(Lit(), DataLoader(Some([40, 12]), batch_size=4), loader(40, shuffle=False))
    return {"steps": t.global_step, "epoch": t.current_epoch}


def test_a_dry_rank_stops_no_sooner_than_the_others_may(tmp_path: Path) -> None:
    first, second = run(2, early, tmp_path)
    assert first == second
    assert first["epoch"] == 3


def uneven() -> str:
    class Short(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return zip(range(240 if os.environ["RANK"] == "1" else 40), INPUTS, TARGETS, strict=False)

    with pytest.raises(RuntimeError) as said:
        trainer(2, knobs={"mode": "sync"}, max_epochs=1).fit(Lit(), DataLoader(Short(), batch_size=4))
    return str(said.value)


def test_ranks_in_step_do_not_wait_for_one_whose_stream_has_ended() -> None:
    begin = time.monotonic()
    said = run(2, uneven)
    assert all("rank 0 has no more batches in this epoch" in words for words in said)
    assert time.monotonic() - begin < 30


class Dry(L.Callback):
    """Remembers the batches of its rank, and at which steps of the run it validated and saved."""

    def __init__(self) -> None:
        self.batches = 0
        self.validated: list[int] = []
        self.saved: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validated.append(trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved.append(trainer.global_step)


def by_time(folder: Path, kind: str) -> dict[str, Any]:
    """The first rank, whose clock speaks for all, has four batches; the other one so many as take much longer."""
    dry, lengths = Dry(), [16, 4 * 4000]
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, train_time_interval=timedelta(seconds=0.2))
    kinds: dict[str, Any] = {
        "max_time": {"max_time": {"seconds": 1}},
        "train_time_interval": {"callbacks": [saver], "enable_checkpointing": True, "max_steps": 60},
        "val_check_interval": {"val_check_interval": timedelta(seconds=0.2), "max_steps": 60},
    }
    options = {"num_sanity_val_steps": 0, "max_epochs": 1, "limit_val_batches": 1, **kinds[kind]}
    callbacks = [*options.pop("callbacks", []), dry, SpeedFaults(step_seconds=0.02)]
    t = trainer(2, callbacks=callbacks, **options)
    t.fit(Lit(), DataLoader(Long(lengths), batch_size=4), loader(40, shuffle=False))
    return {"batches": dry.batches, "steps": t.global_step, "validated": dry.validated, "saved": dry.saved}


class Long(IterableDataset[Any]):
    """So many samples on each rank, again and again the same."""

    def __init__(self, lengths: list[int]) -> None:
        self.length = lengths[int(os.environ["RANK"])]

    def __iter__(self) -> Any:
        return itertools.islice(iter(Endless()), self.length)


@pytest.mark.few(0)
@pytest.mark.parametrize("kind", ["max_time", "train_time_interval", "val_check_interval"])
def test_the_clock_of_the_first_rank_counts_while_it_waits_for_the_others(kind: str, tmp_path: Path) -> None:
    first, second = run(2, by_time, tmp_path, kind)
    for name in ("steps", "validated", "saved"):
        assert first[name] == second[name], name
    assert first["batches"] == 4
    if kind == "max_time":
        assert 4 < second["batches"] < 4000, "more than a minute"
    else:
        done = first["saved" if kind == "train_time_interval" else "validated"]
        assert min(done) < 60, "before the end of the run"


def timed(folder: Path) -> dict[str, Any]:
    class Dies(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_rank == 0 and trainer.global_step >= 5:
                os.kill(os.getpid(), signal.SIGKILL)

    lit, begin = Lit(), time.monotonic()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10**6, save_last=True)
    t = trainer(
        3,
        knobs={"silence": 0.5, "patience": 4.0},
        callbacks=[Dies(), SpeedFaults(step_seconds=0.01), saver],
        max_epochs=-1,
        max_time={"seconds": 3},
        enable_checkpointing=True,
    )
    t.fit(lit, DataLoader(Endless(), batch_size=4))
    end = torch.cat([p.detach().flatten() for p in lit.parameters()]).tolist()
    return {"end": end, "steps": t.global_step, "seconds": time.monotonic() - begin}


@pytest.mark.few(0)
def test_where_the_first_rank_dies_the_next_ones_clock_stops_the_run(tmp_path: Path) -> None:
    with Forked(3, timed, tmp_path, store=True) as forked:
        dead, *living = forked.results(60)
    assert dead.kind == "gone"
    assert [one.kind for one in living] == [None, None], living
    first, second = (one.value for one in living)
    assert (first["end"], first["steps"]) == (second["end"], second["steps"])
    assert first["steps"] > 5
    assert first["seconds"] < 3 + 20, "on a busy machine; a hang would take half an hour"
