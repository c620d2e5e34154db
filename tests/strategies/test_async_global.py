"""`async_global` from a user's view: all ranks end equal, every sample is seen once, faults cost nobody time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_async import AsyncGlobalStrategy, SpeedFaults
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.shard_service import ShardService
from lightning_async.algorithms.shards import MOST, RUN
from lightning_async.arrival import Fate
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, Saves, files_of, held_out, look_when_put_back, samples, seed


def _fit(devices: int, knobs: dict[str, Any], slow: float) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    lit = Lit()
    faults = SpeedFaults(step_seconds=0.002, slow={devices - 1: slow})
    strategy = AsyncGlobalStrategy(**knobs)
    t = trainer(devices, strategy=strategy, callbacks=[faults])
    t.fit(lit, loader(8), loader(40, shuffle=False))
    return {
        "weights": weights(lit),
        "seen": lit.seen,
        "val": float(t.callback_metrics["val"]),
        "train": float(t.callback_metrics["train_epoch"]),
        "arrivals": len(strategy.arrivals()),
    }


CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (3, {"local_steps": 2, "wire": "bf16", "shards": 2}),
    (3, {"local_steps": "epoch", "outer_momentum": 0.5, "outer_lr": 0.7}),
    (2, {"mode": "sync", "pace": 4}),
    (3, {"mode": "sync", "local_steps": "epoch", "balance": "incremental"}),
    (2, {"wire": "sign"}),
    (2, {"attenuation": "paper", "accuracy_weight": "train"}),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("devices", "knobs"), CASES)
def test_all_ranks_end_equal_and_every_sample_is_seen_once(devices: int, knobs: dict[str, Any]) -> None:
    in_step = knobs.get("mode") == "sync" and knobs.get("local_steps") != "epoch"
    ends = run(devices, _fit, devices, knobs, 1.0 if in_step else 3.0)
    for end in ends[1:]:
        for key in ("weights", "val", "train"):
            assert end[key] == ends[0][key]
    seen = Counter(index for end in ends for index in end["seen"])
    assert set(seen.values()) == {2}
    assert len(seen) == 240
    if knobs.get("mode") != "sync":
        assert all(end["arrivals"] for end in ends)


# -- faults ------------------------------------------------------------------------------------------------------------


class Faulty(Callback):
    """At this batch, once, something happens to one rank."""

    def __init__(self, rank: int, batch: int, what: Callable[[Any], object]) -> None:
        self.rank, self.batch, self.what = rank, batch, what

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (int(os.environ["RANK"]), trainer.current_epoch, batch_idx) == (self.rank, 0, self.batch):
            self.what(module)


def _die(module: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(module: Any) -> None:
    with subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


def _spoil(module: Any) -> None:
    module.layer[0].weight.data[0, 0] = float("nan")


FAULTS: dict[str, Callable[[Any], None]] = {"die": _die, "freeze": _freeze, "spoil": _spoil}


def _with_fault(fault: str, rank: int) -> dict[str, Any]:
    lit = Lit()
    lit.layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))  # BatchNorm would keep a NaN for ever
    strategy = AsyncGlobalStrategy(local_steps=1, shards=1, silence=0.3, attenuation="none", mirror_every=2)
    callbacks = [SpeedFaults(step_seconds=0.04), Faulty(rank, 6, FAULTS[fault])]
    t = trainer(3, strategy=strategy, callbacks=callbacks, max_epochs=1)
    t.fit(lit, loader(2), loader(40, shuffle=False))
    algorithm = strategy.algorithm
    assert isinstance(algorithm, AsyncGlobal)
    fates = Counter(arrival.fate.value for arrival in strategy.arrivals())
    takeovers = algorithm.owners.place(0) // MOST % RUN - 1
    mine = {"owner": algorithm.owners.owner(0), "takeovers": takeovers}
    return {"weights": weights(lit), "fates": fates, "seen": lit.seen, **mine}


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_death_costs_the_arrivals_since_the_last_mirror(rank: int) -> None:
    with Forked(3, _with_fault, "die", rank, store=True) as forked:
        results = forked.results(60)
    assert results[rank].kind == "gone"
    living = [r.value for r in results if r.kind is None]
    assert len(living) == 2, results
    assert living[0]["weights"] == living[1]["weights"]
    assert {end["owner"] for end in living} == ({1} if rank == 0 else {0})
    assert sum(end["fates"]["lost"] for end in living) <= 6


def test_the_shard_of_a_frozen_rank_is_taken_over_and_it_finds_that_out() -> None:
    with Forked(3, _with_fault, "freeze", 0, store=True) as forked:  # the store must not freeze with it
        ends = forked.values()
    assert len({end["owner"] for end in ends}) == 1  # rank 1, unless that was silent too, on a busy machine
    assert ends[0]["takeovers"] >= 1
    assert len({tuple(end["weights"]) for end in ends}) == 1
    assert sum(end["fates"]["lost"] for end in ends) <= 2 * ends[0]["takeovers"]
    assert len(Counter(index for end in ends for index in end["seen"])) == 240


def _in_mid_reply(how: str, rank: int) -> dict[str, Any]:
    """Rank `rank` is struck when a push of another is merged and its answer has not left."""
    merge, merged = ShardService._merge, list[int]()

    def struck(self: ShardService, owned: Any, letter: Any) -> Any:
        answers = merge(self, owned, letter)
        merged.append(letter.peer)
        if self._me == rank and letter.peer != rank and len(set(merged)) > 1:
            ShardService._merge = merge  # type: ignore[method-assign]
            FAULTS[how](None)
        return answers

    ShardService._merge = struck  # type: ignore[method-assign]
    strategy = AsyncGlobalStrategy(silence=0.3, attenuation="none", mirror_every=4)
    t = trainer(3, strategy=strategy, callbacks=[SpeedFaults(step_seconds=0.04)], max_epochs=1)
    t.fit(lit := Lit(), loader(2), loader(10, shuffle=False))
    arrivals = strategy.arrivals()
    owners = strategy.algorithm.owners  # type: ignore[union-attr]
    return {
        "weights": weights(lit),
        "lost": sum(a.fate is Fate.LOST for a in arrivals),
        "takeovers": [owners.place(shard) // MOST % RUN - 1 for shard in range(3)],
        "peers": Counter(a.owner for a in arrivals),
    }


@pytest.mark.few(1)
@pytest.mark.parametrize(("how", "rank"), [("die", 1), ("freeze", 2)])
def test_an_owner_in_mid_reply_is_killed_or_stopped(how: str, rank: int) -> None:
    with Forked(3, _in_mid_reply, how, rank, store=True) as forked:
        results = forked.results(60)
    ends = [r.value for r in results if r.kind is None]
    assert [r.kind for r in results].count("gone") == (how == "die")
    assert len(ends) == 3 - (how == "die"), results
    assert all(end["weights"] == ends[0]["weights"] for end in ends)
    takeovers = [max(end["takeovers"][shard] for end in ends) for shard in range(3)]
    assert takeovers[rank] >= (how == "die")  # a second of silence may pass unnoticed on a busy machine
    assert sum(end["lost"] for end in ends) <= 4 * sum(takeovers)  # where others are silent, too
    assert all(end["peers"][({0, 1, 2} - {rank}).pop()] for end in ends)


@pytest.mark.few(0)
def test_what_is_not_finite_is_refused_and_its_rank_gets_the_weights() -> None:
    ends = run(3, _with_fault, "spoil", 1)
    assert all(torch.isfinite(torch.tensor(end["weights"])).all() for end in ends)
    assert [bool(end["fates"]["refused"]) for end in ends] == [False, True, False]


# -- a run that goes on ------------------------------------------------------------------------------------------------


def _through(n: int, knobs: dict[str, Any], path: str, where: str, resume: bool, precision: Any = "32-true") -> Any:
    seed()
    lit, save = Draws(), Saves(path, where, epoch=int(where == "batch"), batch=4)
    strategy = AsyncGlobalStrategy(balance="equal", **knobs)
    t = trainer(n, strategy=strategy, max_epochs=3, callbacks=[save], precision=precision)
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return lit.losses if resume else lit.losses[save.losses :], weights(lit), strategy.steps


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")
@pytest.mark.parametrize(
    ("n", "knobs", "where"),
    [
        (1, {"local_steps": 3}, "batch"),
        (1, {"attenuation": "paper", "wire": "bf16"}, "validation"),
        (2, {"mode": "sync", "pace": 2, "outer_momentum": 0.5}, "epoch"),
    ],
)
def test_a_resumed_run_continues_as_if_it_had_not_stopped(
    n: int, knobs: dict[str, Any], where: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "x.ckpt")
    through = run(n, _through, n, knobs, path, where, False)
    resumed = run(n, _through, n, knobs, path, where, True)
    for one, other in zip(through, resumed, strict=True):
        assert len(one[0]) > 5
        assert one == other


def test_a_resumed_run_with_masters_of_bf16_weights_continues_too(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    through, resumed = (
        run(1, _through, 1, {"local_steps": 3}, path, "batch", resume, "bf16-true")[0] for resume in (False, True)
    )
    assert len(through[0]) > 5
    assert through == resumed


def _weighed(path: str, resume: bool) -> list[float]:
    """What a push counts by accuracy: right when all is restored, or else when it was saved."""
    strategy, save, seen = AsyncGlobalStrategy(accuracy_weight="val"), Saves(path, "epoch", epoch=0), list[float]()
    t = trainer(1, strategy=strategy, max_epochs=2, callbacks=[] if resume else [save])
    look_when_put_back(t, lambda _: seen.append(strategy.quality.now()))
    t.fit(Draws(), samples(), held_out(), ckpt_path=path if resume else None)
    (own,) = files_of(Path(path)).values()
    return [*seen, own["parts"]["quality"]["newest"]]


def test_until_its_metric_is_logged_again_a_run_that_goes_on_weighs_by_the_last_value(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    ((fresh, _),) = run(1, _weighed, path, False)
    ((begun, saved),) = run(1, _weighed, path, True)
    assert fresh == 1
    assert begun == saved != 1


def _with_others(n: int, path: str, resume: bool) -> Any:
    """Saved by some, gone on with by others; the versions of the shards right after the start."""
    seed()
    seen: list[list[int]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *batch: Any) -> None:
            seen.append([exchange.version for exchange in trainer.strategy.algorithm.exchanges])

    strategy = AsyncGlobalStrategy(outer_momentum=0.5, outer_lr=0.5)
    callbacks = [Look()] if resume else [Look(), Saves(path, "epoch", epoch=0)]
    t = trainer(n, strategy=strategy, max_epochs=2, callbacks=callbacks)
    lit = Draws()
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0], weights(lit)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
def test_with_other_ranks_the_shards_are_cut_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert [versions for versions, _ in run(2, _with_others, 2, path, False)] == [[0, 0]] * 2
    ends = run(3, _with_others, 3, path, True)
    assert all(versions == ends[0][0] for versions, _ in ends)
    assert len(ends[0][0]) == 3
    assert ends[0][0][0] > 5
    assert all(end == ends[0][1] for _, end in ends)


# -- input -------------------------------------------------------------------------------------------------------------


def _fit_with(**knobs: Any) -> str:
    t = trainer(1, strategy=AsyncGlobalStrategy(local_steps=4, **knobs), max_epochs=2)
    try:
        t.fit(Lit(), loader(8), loader(40, shuffle=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.few(0)
def test_a_metric_that_nobody_logs_is_told_after_the_first_meeting() -> None:
    (said,) = run(1, partial(_fit_with, accuracy_weight="accuracy"))
    assert said.startswith("MisconfigurationException: accuracy_weight='accuracy': no metric of this name was logged")
    assert "(logged: metric, train, train_epoch, train_step, val)" in said
    assert run(1, partial(_fit_with, accuracy_weight="val")) == [""]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mode": "ring"}, "`mode` must be one of 'async', 'sync', got 'ring'"),
    (
        {"mode": "sync", "balance": "claim"},
        "`balance` must be 'equal' with mode='sync'.*, got 'claim': with local_steps='epoch'",
    ),
    ({"mode": "sync", "local_steps": 0}, "`local_steps` must be an integer of at least 1, 'speed' or 'epoch', got 0"),
    ({"mode": "sync", "wire": "sign"}, "wire='sign' has no meaning with mode='sync'"),
    ({"mode": "sync", "wire": "fp64"}, "`wire` must be 'fp32', 'bf16' or 'sign', got 'fp64'"),
    ({"accuracy_weight": ""}, "`accuracy_weight` must be 'off', 'train' or the name of a logged metric, got ''"),
    ({"accuracy_weight": True}, "`accuracy_weight` must be 'off', 'train' or the name of a logged metric, got True"),
    ({"balance": "fair"}, "`balance` must be .*, got 'fair'"),
    ({"outer": "sum", "outer_momentum": 0.9}, "`outer_momentum` has no meaning with outer='sum', got 0.9"),
    ({"on_late": "wait", "max_delay": None}, "on_late='wait' needs a `max_delay`"),
    ({"shards": 2.5}, "`shards` must be an integer of at least 1, or None .*, got 2.5"),
]


@pytest.mark.parametrize(("knobs", "sentence"), WRONG)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AsyncGlobalStrategy(**knobs)
