"""`cyclic_delay` from a user's view: all ranks end equal, every sample is seen once, one rank alone trains as ever."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_async import CyclicDelayStrategy, SpeedFaults
from lightning_async.algorithms.shards import MOST, RUN
from lightning_async.arrival import Fate
from lightning_async.strategies.facts import knobs_of
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, Saves, held_out, samples, seed

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.001, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


class Net(Lit):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def _fit(devices: int, knobs: dict[str, Any], optimizer: str, slow: float) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    lit = Net(optimizer)
    faults = SpeedFaults(step_seconds=0.002, slow={devices - 1: slow})
    strategy = CyclicDelayStrategy(**knobs)
    t = trainer(devices, strategy=strategy, callbacks=[faults])
    t.fit(lit, loader(8), loader(40, shuffle=False))
    return {
        "weights": weights(lit),
        "seen": lit.seen,
        "val": float(t.callback_metrics["val"]),
        "samples": sum(a.samples for a in strategy.arrivals()),
        "shards": len(strategy.algorithm.exchanges),
        "state": len(t.optimizers[0].state),
    }


CASES: list[tuple[int, dict[str, Any], str]] = [
    (1, {"push": "gradient"}, "sgd"),
    (2, {"push": "gradient"}, "sgd"),
    (4, {}, "sgd"),
    (2, {"push": "gradient", "token": "strict"}, "sgd"),
    (3, {"push": "gradient", "token": "strict", "shards": 1, "max_accumulate": 2}, "adamw"),
    (4, {"push": "gradient", "max_accumulate": 1}, "adamw"),
    (3, {"max_accumulate": 4, "warm_up": 8}, "adamw"),
    (3, {"token": "strict", "compensation": "lr"}, "sgd"),
    (3, {"push": "gradient", "compensation": "dc"}, "sgd"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("devices", "knobs", "optimizer"), CASES)
def test_all_ranks_end_equal_and_what_was_computed_was_pushed_once(
    devices: int, knobs: dict[str, Any], optimizer: str
) -> None:
    ends = run(devices, _fit, devices, knobs, optimizer, 3.0)
    for end in ends:
        assert (end["weights"], end["val"]) == (ends[0]["weights"], ends[0]["val"])
        assert end["samples"] == end["shards"] * len(end["seen"])
        assert bool(end["state"]) == (knobs.get("push") != "gradient")  # else the rank's own optimizer takes no step
    seen = Counter(index for end in ends for index in end["seen"])
    assert len(seen) == 240
    assert set(seen.values()) == {2}


# -- alone: plain training, to the bit ---------------------------------------------------------------------------------


class Grouped(Lit):
    """Two groups, a learning rate and a momentum (or beta) that go by the step."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        first, *_, last = self.layer
        groups = [
            {"params": first.weight, "weight_decay": 0.1},
            {"params": [first.bias, *last.parameters()], "lr": 0.003},
        ]
        optimizer = OPTIMIZERS[self.optimizer](groups)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.002, 0.005], total_steps=200)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


def _alone(optimizer: str, strategy: Any, knobs: dict[str, Any], options: dict[str, Any]) -> list[float]:
    torch.manual_seed(1)
    lit = Grouped(optimizer)
    trainer(1, strategy=strategy or CyclicDelayStrategy(**knobs), **options).fit(
        lit, loader(shuffle=False), loader(40, shuffle=False)
    )
    return weights(lit)


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with|.*lr_scheduler.step|.*does not have many workers")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 3}],
    ids=["clipped", "accumulated"],
)
@pytest.mark.parametrize("push", ["gradient", "delta"])
def test_one_rank_is_plain_training_to_the_bit(push: str, optimizer: str, options: dict[str, Any]) -> None:
    (mine,) = run(1, _alone, optimizer, None, {"push": push}, options)
    (plain,) = run(1, _alone, optimizer, SingleDeviceStrategy("cpu"), {}, options)
    assert mine == plain


# -- fp16's gradient scaler --------------------------------------------------------------------------------------------


class Overflows(Grouped):
    """The last rank's gradients of three batches are not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return loss * float("inf") if last and batch_idx in (3, 5, 6) else loss


def _scaled(n: int, plain: bool, growth: int, knobs: dict[str, Any], options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    lit = Overflows("adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=growth)
    knobs = {"push": "gradient", "balance": "equal", **knobs}
    strategy: Any = SingleDeviceStrategy("cpu") if plain else CyclicDelayStrategy(**knobs)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    t = trainer(n, strategy=strategy, plugins=plugins, **options)
    t.fit(lit, loader(shuffle=False), loader(40, shuffle=False))
    if plain:
        return weights(lit), scaler.get_scale()
    pushed = sum(a.samples for a in strategy.arrivals()) / len(strategy.algorithm.exchanges)
    return weights(lit), scaler.get_scale(), strategy.skipped_steps, pushed, len(lit.seen)


SCALED = "ignore:Using `DistributedSampler` with|.*lr_scheduler.step|.*does not have many workers"


@pytest.mark.few(0)
@pytest.mark.filterwarnings(SCALED)
@pytest.mark.parametrize("push", ["gradient", "delta"])
@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}],
    ids=["clipped", "accumulated"],
)
def test_with_fp16s_scaler_one_rank_is_plain_training_to_the_bit(push: str, options: dict[str, Any]) -> None:
    (mine,) = run(1, _scaled, 1, False, 4, {"push": push}, options)
    (plain,) = run(1, _scaled, 1, True, 4, {}, options)
    assert mine[:2] == plain
    assert mine[2] > 3  # also where the scale has grown too large


@pytest.mark.few(1)
@pytest.mark.filterwarnings(SCALED)
@pytest.mark.parametrize("token", ["skip", "strict"])
def test_what_the_scaler_skips_is_not_pushed_but_counted(token: str) -> None:
    first, second = run(2, _scaled, 2, False, 1000, {"token": token}, {"max_epochs": 1})
    assert first[0] == second[0]
    assert all(map(math.isfinite, first[0]))
    assert (first[2], second[2]) == (0, 3)
    assert (first[3], second[3]) == (first[4], second[4] - 3 * 4)


# -- a run that goes on ------------------------------------------------------------------------------------------------


class GoesOn(Draws):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def _through(n: int, knobs: dict[str, Any], path: str, where: str, resume: bool, precision: Any = "32-true") -> Any:
    seed()
    lit, save = GoesOn(), Saves(path, where, epoch=int(where == "batch"), batch=4)
    strategy = CyclicDelayStrategy(balance="equal", **knobs)
    t = trainer(n, strategy=strategy, max_epochs=3, callbacks=[save], precision=precision)
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return lit.losses if resume else lit.losses[save.losses :], weights(lit), strategy.steps


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")
@pytest.mark.parametrize(("where", "precision"), [("batch", "32-true"), ("epoch", "32-true"), ("batch", "bf16-true")])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(where: str, precision: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    ((losses, *end),) = run(1, _through, 1, {}, path, where, False, precision)
    assert len(losses) > 5
    assert run(1, _through, 1, {}, path, where, True, precision) == [(losses, *end)]


def _with_others(n: int, path: str, push: str, resume: bool) -> Any:
    """Saved by some, gone on with by others; the versions of the shards right after the start."""
    seed()
    seen: list[list[int]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *batch: Any) -> None:
            seen.append([exchange.version for exchange in trainer.strategy.algorithm.exchanges])

    callbacks = [Look()] if resume else [Look(), Saves(path, "epoch", epoch=0)]
    t = trainer(n, strategy=CyclicDelayStrategy(push=push), max_epochs=2, callbacks=callbacks)  # type: ignore[arg-type]
    lit = GoesOn()
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0], weights(lit)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("push", ["gradient", "delta"])
def test_with_other_ranks_the_shards_are_cut_anew(push: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert [versions for versions, _ in run(2, _with_others, 2, path, push, False)] == [[0, 0]] * 2
    ends = run(3, _with_others, 3, path, push, True)
    assert all(versions == ends[0][0] for versions, _ in ends)
    assert len(ends[0][0]) == 3
    assert ends[0][0][0] > 5
    assert all(end == ends[0][1] for _, end in ends)


# -- faults ------------------------------------------------------------------------------------------------------------


def _hit(fault: str, seconds: float) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


class Struck(Callback):
    """From its fifth step on, a rank is struck when it has a token in hand, before it pushes; all note what goes on."""

    def __init__(self, rank: int, fault: str) -> None:
        self.rank, self.fault, self.noted = rank, fault, list[tuple[float, ...]]()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        mine = int(os.environ["RANK"]) == self.rank and not self.noted  # the first batch
        for exchange in trainer.strategy.algorithm.exchanges if mine else ():
            exchange.give = partial(self._give, trainer.strategy, exchange, exchange.give)

    def _give(self, strategy: Any, exchange: Any, give: Any, *arguments: Any, **named: Any) -> None:
        fault = self.fault if exchange.has_token and strategy.steps >= 5 else ""
        if fault:
            self.fault = ""
            _hit(fault, 1.5)
        give(*arguments, **named)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.noted.append((time.monotonic(), *(exchange.step for exchange in trainer.strategy.algorithm.exchanges)))


def _struck(rank: int, fault: str, knobs: dict[str, Any]) -> Any:
    lit, struck = Net(), Struck(rank, fault)
    strategy = CyclicDelayStrategy(silence=0.5, mirror_every=1, **knobs)
    callbacks = [SpeedFaults(step_seconds=0.05), struck]
    trainer(3, strategy=strategy, callbacks=callbacks, max_epochs=1).fit(lit, loader(2), loader(40, shuffle=False))
    arrivals = strategy.arrivals()
    folded = sum(a.samples for a in arrivals if a.fate is Fate.FOLDED)
    lost = sum(a.fate is Fate.LOST for a in arrivals)
    exchanges = strategy.algorithm.exchanges
    heirs = sum(exchange.place // MOST % RUN - 1 for exchange in exchanges)  # of a busy machine more than of the fault
    return weights(lit), struck.noted, folded == len(exchanges) * len(lit.seen), lost <= heirs


def _longest(times: list[float]) -> float:
    return max(b - a for a, b in pairwise(times))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("knobs", "fault", "rank"),
    [
        ({"push": "gradient"}, "kill", 0),
        ({"push": "gradient", "max_accumulate": 2}, "kill", 2),
        ({}, "kill", 1),
        ({"push": "gradient"}, "freeze", 2),
        ({"push": "gradient", "max_accumulate": 2}, "freeze", 0),
        ({}, "freeze", 1),
    ],
)
def test_a_holder_is_killed_or_frozen_and_the_others_push_on_within_3_seconds(
    knobs: dict[str, Any], fault: str, rank: int
) -> None:
    with Forked(3, _struck, rank, fault, knobs, store=True) as forked:
        results = forked.results(60)
    living = [r for r in range(3) if r != rank or fault == "freeze"]
    assert (results[rank].kind == "gone") == (fault == "kill")
    assert [results[r].kind for r in living] == [None] * len(living), results
    ends = [results[r].value for r in living]
    assert all(end[0] == ends[0][0] for end in ends)
    for r, (_, noted, applied, few_lost) in zip(living, ends, strict=True):
        noted = noted[:25]  # later who has no more data may wait for those of the dead
        assert applied  # every sample that it computed, on every shard
        assert few_lost  # at every takeover the one push that was in no mirror
        if r == rank:
            assert _longest([row[0] for row in noted]) > 1.4
        else:
            assert _longest([row[0] for row in noted]) < 3
            for shard in range(1, 4):
                news = [b[0] for a, b in pairwise(noted) if b[shard] > a[shard]]
                assert _longest([noted[0][0], *news, noted[-1][0]]) < 3


@pytest.mark.few(0)
def test_under_strict_a_death_is_survived() -> None:
    with Forked(3, _struck, 2, "kill", {"push": "gradient", "token": "strict"}, store=True) as forked:
        results = forked.results(60)
    assert [r.kind for r in results] == [None, None, "gone"], results
    assert results[0].value[0] == results[1].value[0]


def test_a_replay_is_told_every_knob() -> None:
    knobs: dict[str, Any] = {"push": "gradient", "scale": "delay", "strength": 2.0, "max_accumulate": 3, "warm_up": 5}
    knobs |= {"compensation": "lr", "compensation_strength": 0.25, "token": "strict", "shards": 2, "mirror_every": 7}
    told = knobs_of(CyclicDelayStrategy(**knobs, max_delay=9))
    assert {name: told[name] for name in knobs} == knobs
    assert told["max_delay"] == 9


# -- input -------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"token": "wait"}, "`token` must be one of 'skip', 'strict', got 'wait'"),
    ({"push": "weights"}, "`push` must be one of 'gradient', 'delta', got 'weights'"),
    ({"compensation": True}, "`compensation` must be one of 'none', 'lr', 'dc', got True"),
    ({"compensation_strength": 1.0}, "`compensation_strength` has no meaning with compensation='none'"),
    (
        {"compensation": "dc", "compensation_strength": -1, "push": "gradient"},
        "`compensation_strength` must be a number of at least 0, got -1",
    ),
    ({"compensation": "dc"}, "compensation='dc' is for gradients"),
    ({"warm_up": 5}, "`warm_up` needs a `max_accumulate` to grow to"),
    ({"warm_up": 1.5, "max_accumulate": 2}, "`warm_up` must be an integer of at least 0, got 1.5"),
    ({"scale": "max"}, "`scale` must be one of 'sum', 'mean', 'delay', got 'max'"),
    ({"strength": 1.0}, "`strength` has no meaning with scale='sum'"),
    ({"scale": "delay", "strength": -1}, "`strength` must be a number of at least 0, got -1"),
    ({"max_accumulate": 0}, "`max_accumulate` must be an integer of at least 1, or None for no bound, got 0"),
    ({"max_delay": True}, "`max_delay` must be an integer of at least 1, or None .*, got True"),
    ({"shards": 2.5}, "`shards` must be an integer of at least 1, or None .*, got 2.5"),
    ({"mirror_every": 0}, "`mirror_every` must be an integer of at least 1"),
    ({"balance": "fair"}, "`balance` must be .*, got 'fair'"),
]


@pytest.mark.parametrize(("knobs", "sentence"), WRONG)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CyclicDelayStrategy(**knobs)


class With(Lit):
    def __init__(self, *kinds: Any, **options: Any) -> None:
        super().__init__()
        self.kinds, self.options = kinds, options
        self.automatic_optimization = len(kinds) == 1

    def configure_optimizers(self) -> Any:
        return [kind(self.parameters(), **self.options) for kind in self.kinds]


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (With(torch.optim.Adafactor), {}, "Adafactor moves two halves in another way than the whole"),
        (With(torch.optim.RMSprop), {}, "knows how to .* SGD, Adam or AdamW .* got RMSprop"),
        (With(torch.optim.SGD, torch.optim.Adam), {}, "steps by one optimizer, and there are 2"),
        (With(torch.optim.LBFGS), {}, "LBFGS evaluates the closure several times"),
        (
            With(torch.optim.Adam, fused=True),
            {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
            "with fused=True Adam takes fp16's scale out .* leave out `fused`",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(module: Any, options: dict[str, Any], sentence: str) -> None:
    strategy = CyclicDelayStrategy(push="gradient")
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer(1, strategy=strategy, **options).fit(module, loader(), loader(40, shuffle=False))


# -- unlike batches ----------------------------------------------------------------------------------------------------


class Counting(Lit):
    """Each rank moves a number of its own, by as much for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.batches = torch.nn.Parameter(torch.zeros(2)), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return -self.moved[self.global_rank]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.moved], 1.0)


def _unlike(push: str) -> tuple[int, list[float]]:
    torch.manual_seed(0)
    lit, rank = Counting(), int(os.environ["RANK"])
    for name, parameter in lit.named_parameters():
        parameter.requires_grad_(name == "moved")
    strategy = CyclicDelayStrategy(push=push)  # type: ignore[arg-type]
    trainer(2, strategy=strategy, max_epochs=1, callbacks=[SpeedFaults(step_seconds=0.002)]).fit(
        lit, loader(2 + 4 * rank), loader(40, shuffle=False)
    )
    return lit.batches, lit.moved.tolist()


@pytest.mark.few(1)
@pytest.mark.parametrize("push", ["gradient", "delta"])
def test_a_sample_counts_the_same_in_batches_of_unlike_size(push: str) -> None:
    """Two ranks with batches of 2 and 6: a usual one has 4, and counts a half. (The last one counts as a whole one.)"""
    (first, moved), (second, same) = run(2, _unlike, push)
    assert 0 <= 2 * first + 6 * second - 240 <= 1 + 5
    assert moved == same
    assert moved == pytest.approx([first * 2 / 4 / 2, second * 6 / 4 / 2], rel=1e-5)
