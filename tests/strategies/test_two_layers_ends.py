"""However one rank of a member ends, nobody hangs: with a death ends its member, with a failure or a signal the run."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AsyncGlobalStrategy, SpeedFaults
from lightning_async.algorithms import common_step
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.test_stops import SECONDS, Say, ended, until_training

TWO = {"inner_size": 2, "silence": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:Using `DistributedSampler` with")


class Does(Callback):
    """One rank does something after so many of its batches."""

    def __init__(self, rank: int, what: Any, after: int = 5) -> None:
        self.what, self.left = what, after if int(os.environ["RANK"]) == rank else -1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.what(trainer)


def die(trainer: L.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(trainer: L.Trainer) -> None:
    raise ValueError("the fifth batch is too much")


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def die_in_backward(trainer: L.Trainer) -> None:
    """When the first layer's gradient is there, the last of all."""
    next(trainer.lightning_module.parameters()).register_hook(lambda _: die(trainer))


def _dies(dead: int, folder: str, how: Any = die) -> dict[str, Any]:
    lit = Lit()
    saved = ModelCheckpoint(folder, filename="{epoch}")
    options = {"enable_checkpointing": True, "callbacks": [saved, SpeedFaults(step_seconds=0.004), Does(dead, how)]}
    t = trainer(4, knobs=TWO, **options)
    t.fit(lit, loader(), loader(40, shuffle=False))
    return {"weights": weights(lit), "seen": lit.seen, "members": t.strategy.office.size}


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dead", [1, 2, 3, 0])
def test_a_ranks_death_is_its_members_and_the_others_train_on_all_the_data(dead: int, tmp_path: Path) -> None:
    _check_the_others(dead, tmp_path, die)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dead", [1, 2])
def test_and_so_it_is_in_mid_backward_when_some_of_its_gradients_have_left(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_step, "BUCKET", 64)
    _check_the_others(dead, tmp_path, die_in_backward)


def _check_the_others(dead: int, tmp_path: Path, how: Any) -> None:
    with Forked(4, _dies, dead, str(tmp_path), how, store=True) as forked:
        results = forked.results(60)
    assert results[dead].kind == "gone"
    sibling = results[dead ^ 1]
    assert sibling.kind == "PeerFailedError"
    assert f"rank {dead} is dead" in sibling.error
    assert "of the same member stops with it" in sibling.error
    one, other = (results[r] for r in range(4) if r // 2 != dead // 2)
    assert one.kind is other.kind is None, (one, other)
    assert one.value["weights"] == other.value["weights"]
    seen = Counter(one.value["seen"] + other.value["seen"])
    assert all(seen[index] >= 1 for index in range(240))  # in the second epoch by themselves
    assert list(tmp_path.glob("*.ckpt"))


def _fails(rank: int, what: Any) -> int:
    t = trainer(4, knobs=TWO, callbacks=[SpeedFaults(step_seconds=0.004), Does(rank, what)], max_epochs=1000)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return t.current_epoch


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [2, 3])
def test_an_exception_on_a_sibling_or_a_speaker_stops_all_and_all_name_it(rank: int) -> None:
    with Forked(4, _fails, rank, fail) as forked:
        results = ended(forked)
    for number, result in enumerate(results):
        assert "the fifth batch is too much" in result.error
        assert result.kind == ("ValueError" if number == rank else "PeerFailedError")


class Law(Callback):
    """One rank's law for late contributions raises at the fifth question, in the thread of its service."""

    asked = 0

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank == 2:
            trainer.strategy.shrink = self.law  # type: ignore[attr-defined]

    def law(self, *arguments: Any) -> float:
        self.asked += 1
        if self.asked == 5:
            raise ValueError("the fifth arrival is too much")
        return 1.0


def _serves(knobs: dict[str, Any]) -> int:
    t = trainer(4, strategy=AsyncGlobalStrategy(**knobs), callbacks=[Law()], max_epochs=1000)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return t.current_epoch


@pytest.mark.few(1)
@pytest.mark.parametrize("knobs", [{"inner_size": 2}, {}], ids=["two layers", "one layer"])
def test_a_service_that_fails_on_one_rank_stops_all_and_all_name_it(knobs: dict[str, Any]) -> None:
    with Forked(4, _serves, knobs) as forked:
        results = ended(forked)
    for number, result in enumerate(results):
        assert "the service of member 2 failed: ValueError: the fifth arrival is too much" in result.error
        assert result.kind == ("RuntimeError" if number == 2 else "PeerFailedError")
    assert "ValueError: the fifth arrival is too much" in results[2].trace.splitlines(), "where, too"


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 3])
def test_should_stop_on_one_rank_stops_all(rank: int) -> None:
    assert len(set(run(4, _fails, rank, stop, timeout=SECONDS))) == 1


def _trains(folder: str, knobs: dict[str, Any]) -> int:
    t = trainer(4, knobs={**TWO, **knobs}, callbacks=[Say(folder), SpeedFaults(step_seconds=0.01)], max_epochs=1000)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return t.current_epoch


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_sigterm_to_any_rank_stops_all(rank: int, tmp_path: Path) -> None:
    with Forked(4, _trains, str(tmp_path), {}) as forked:
        until_training(tmp_path, 4)
        forked.signal(rank, signal.SIGTERM)
        assert [result.kind for result in ended(forked)] == ["SIGTERMException"] * 4


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
def test_a_frozen_sibling_is_waited_for_until_it_counts_as_dead(tmp_path: Path) -> None:
    with Forked(4, _trains, str(tmp_path), {"patience": 2.0}, store=True) as forked:
        until_training(tmp_path, 4)
        forked.signal(3, signal.SIGSTOP)
        sibling = forked.result(2, SECONDS)
        assert sibling.kind == "PeerFailedError"
        assert "rank 3 is dead" in sibling.error
        assert all(process.is_alive() for process in forked.processes[:2])
        forked.signal(0, signal.SIGTERM)
        assert [forked.result(rank, SECONDS).kind for rank in (0, 1)] == ["SIGTERMException"] * 2
