"""`cyclic_delay` from a user's view: all ranks end equal, every sample is seen once, one rank alone trains as ever."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_async import CyclicDelayStrategy, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, Saves, held_out, samples, seed
from tests.strategies.test_async_global import Faulty

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
    (1, {}, "sgd"),
    (2, {}, "sgd"),
    (4, {}, "sgd"),
    (2, {"token": "strict"}, "sgd"),
    (3, {"token": "strict", "shards": 1, "max_accumulate": 2}, "adamw"),
    (4, {"max_accumulate": 1}, "adamw"),
]


@pytest.mark.parametrize(("devices", "knobs", "optimizer"), CASES)
def test_all_ranks_end_equal_and_what_was_computed_was_pushed_once(
    devices: int, knobs: dict[str, Any], optimizer: str
) -> None:
    ends = run(devices, _fit, devices, knobs, optimizer, 3.0)
    for end in ends:
        assert (end["weights"], end["val"]) == (ends[0]["weights"], ends[0]["val"])
        assert end["samples"] == end["shards"] * len(end["seen"])
        assert not end["state"]  # the rank's own optimizer has taken no step
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


def _alone(optimizer: str, strategy: Any, options: dict[str, Any]) -> list[float]:
    torch.manual_seed(1)
    lit = Grouped(optimizer)
    trainer(1, strategy=strategy or CyclicDelayStrategy(), **options).fit(
        lit, loader(shuffle=False), loader(40, shuffle=False)
    )
    return weights(lit)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with|.*lr_scheduler.step|.*does not have many workers")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 3}],
    ids=["clipped", "accumulated"],
)
def test_one_rank_is_plain_training_to_the_bit(optimizer: str, options: dict[str, Any]) -> None:
    (mine,) = run(1, _alone, optimizer, None, options)
    (plain,) = run(1, _alone, optimizer, SingleDeviceStrategy("cpu"), options)
    assert mine == plain


# -- a run that goes on ------------------------------------------------------------------------------------------------


class GoesOn(Draws):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def _through(n: int, knobs: dict[str, Any], path: str, where: str, resume: bool) -> Any:
    seed()
    lit, save = GoesOn(), Saves(path, where, epoch=int(where == "batch"), batch=4)
    strategy = CyclicDelayStrategy(balance="equal", **knobs)
    t = trainer(n, strategy=strategy, max_epochs=3, callbacks=[save])
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return lit.losses if resume else lit.losses[save.losses :], weights(lit), strategy.steps


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")
@pytest.mark.parametrize("where", ["batch", "epoch"])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(where: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    ((losses, *end),) = run(1, _through, 1, {}, path, where, False)
    assert len(losses) > 5
    assert run(1, _through, 1, {}, path, where, True) == [(losses, *end)]


# -- faults ------------------------------------------------------------------------------------------------------------


def _with_a_death(knobs: dict[str, Any]) -> Any:
    lit = Net()
    strategy = CyclicDelayStrategy(silence=0.3, mirror_every=2, patience=2.0, **knobs)
    callbacks = [SpeedFaults(step_seconds=0.03), Faulty(2, 6, lambda module: os.kill(os.getpid(), signal.SIGKILL))]
    trainer(3, strategy=strategy, callbacks=callbacks, max_epochs=1).fit(lit, loader(2), loader(40, shuffle=False))
    return weights(lit)


@pytest.mark.parametrize("knobs", [{}, {"token": "strict"}], ids=str)
def test_a_death_is_survived(knobs: dict[str, Any]) -> None:
    with Forked(3, _with_a_death, knobs, store=True) as forked:
        results = forked.results(60)
    assert [r.kind for r in results] == [None, None, "gone"], results
    assert results[0].value == results[1].value


# -- input -------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"token": "wait"}, "`token` must be one of 'skip', 'strict', got 'wait'"),
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
            With(torch.optim.Adam),
            {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
            "use precision='bf16-mixed'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(module: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer(1, strategy=CyclicDelayStrategy(), **options).fit(module, loader(), loader(40, shuffle=False))
