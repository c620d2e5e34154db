"""A law in a run: what is late is shrunk by it, with Adam by its learning rate; its state is kept."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_async import AdaptiveShrink, CyclicDelayStrategy, LazySignStrategy, SpeedFaults
from lightning_async.algorithms.algorithm import no_shrink
from lightning_async.algorithms.gossip import Alone
from lightning_async.algorithms.shrink import Stability
from lightning_async.arrival import Arrival
from lightning_async.callbacks.adaptive_shrink import _Kept
from lightning_async.fresh import Fresh, nothing_fresh
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from tests.strategies import piped
from tests.strategies.lit import ByHand, Lit, loader, trainer
from tests.strategies.ranks import run


class Late(Alone):
    """Every gradient is 3 steps late, as in a stage of a pipeline."""

    shrinks = "gradients"

    def healthy_delay(self, n: int) -> int:
        return 0

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        yield from ()
        arrival = Arrival(0, step, step - 3, step, 0.0)
        self.factor = self.shrink(arrival, torch.ones(2), nothing_fresh)
        return []


class Rates(Callback):
    """The learning rate that each step is taken with, and the one that is left behind."""

    def __init__(self) -> None:
        self.used: list[float] = []
        self.left: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(lambda *a: None)
        step = optimizer.step

        def watched(closure: Any = None) -> Any:
            def then_look() -> Any:
                loss = closure()
                self.used.append(optimizer.param_groups[0]["lr"])
                return loss

            return step(then_look)

        optimizer.step = watched

    def on_train_batch_end(self, trainer: Any, *batch: Any) -> None:
        self.left.append(trainer.optimizers[0].param_groups[0]["lr"])


class Adam(Lit):
    def configure_optimizers(self) -> Any:
        adam = torch.optim.AdamW(self.parameters(), 0.01)
        return [adam], [{"scheduler": torch.optim.lr_scheduler.StepLR(adam, 10, 0.5), "interval": "step"}]


def _late(module: str) -> tuple[list[float], list[float], list[str], float]:
    rates = Rates()
    shrink = AdaptiveShrink("constant", beta=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = trainer(1, callbacks=[shrink, rates], max_epochs=1, limit_train_batches=25)
        t.strategy.algorithm = Late()  # type: ignore[attr-defined]
        t.fit(Adam() if module == "Adam" else Lit(), loader(), loader(40))
    said = [str(warning.message) for warning in caught if "AdaptiveShrink" in str(warning.message)]
    return rates.used, rates.left, said, t.strategy.algorithm.factor  # type: ignore[attr-defined]


def test_with_adam_it_acts_through_the_learning_rate_and_says_so() -> None:
    ((used, left, said, factor),) = run(1, _late, "Adam")
    schedule = [0.01 * 0.5 ** (step // 10) for step in range(26)]
    assert used == pytest.approx([rate * 0.125 for rate in schedule[:-1]])
    assert left == pytest.approx(schedule[1:])  # it was put back before the schedule looked at it
    assert said == [
        "AdaptiveShrink: AdamW takes the same steps whatever its gradients are multiplied by, so the factors multiply "
        "its learning rate"
    ]
    assert factor == 1.0  # and not a second time


def test_with_sgd_it_is_the_factor() -> None:
    ((used, left, said, factor),) = run(1, _late, "Lit")
    assert set(used) == set(left) == {0.01}
    assert said == []
    assert factor == 0.125


def _saved_and_resumed(folder: str, n: int, world_then: int) -> dict[str, Any]:
    shrink = AdaptiveShrink("relative")
    faults = SpeedFaults(step_seconds=0.002, slow={n - 1: 4.0})
    saved = ModelCheckpoint(folder, filename="it")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        more = {"knobs": {"period": 1}, "max_epochs": 2 - (n == world_then)}
        t = trainer(n, enable_checkpointing=True, callbacks=[shrink, faults, saved], **more)
        path = f"{folder}/it.ckpt" if n != world_then else None
        before: dict[str, Any] = {}

        class Look(Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                before.update(before or _Kept(shrink).state_dict())

        t.callbacks.append(Look())  # type: ignore[attr-defined]
        t.fit(Lit(), loader(), loader(40, shuffle=False), ckpt_path=path)
    said = [str(warning.message) for warning in caught if "AdaptiveShrink" in str(warning.message)]
    return {"began": before, "ended": _Kept(shrink).state_dict(), "said": said, "left": t.strategy.shrink is no_shrink}  # type: ignore[attr-defined]


@pytest.mark.few(0)
def test_its_state_is_saved_and_another_world_begins_anew(tmp_path: Path) -> None:
    first = run(2, _saved_and_resumed, str(tmp_path), 2, 2)
    assert all(end["left"] for end in first)
    assert all(len(delays) > 5 for end in first for delays in (law["delays"] for law in end["ended"]["laws"].values()))
    (file,) = tmp_path.glob("it.ckpt.ranks/*.rank1.ckpt")
    state = torch.load(file, weights_only=True)["parts"]["shrink"]
    assert state == first[1]["ended"]
    others = run(3, _saved_and_resumed, str(tmp_path), 3, 2)
    said = "AdaptiveShrink: its state was saved with law='relative' by 2 ranks, and this is 'relative' with 3: the law "
    assert [end["began"]["laws"] for end in others] == [{}] * 3
    assert [end["said"] for end in others] == [[f"{said}begins anew"], [], []]  # once for all


def test_a_state_of_the_same_goes_on() -> None:
    one, other = AdaptiveShrink("relative"), AdaptiveShrink("relative")
    one._healthy = other._healthy = 0
    for delay in range(40):
        one.factor(Arrival(3, 0, 0, delay % 5, 0.0), torch.ones(1), nothing_fresh)
    _Kept(other).load_state_dict(_Kept(one).state_dict())
    late = Arrival(3, 0, 0, 50, 0.0)
    assert other.factor(late, torch.ones(1), nothing_fresh) == one.factor(late, torch.ones(1), nothing_fresh) < 1


def test_alignment_without_something_fresh_says_so() -> None:
    shrink = AdaptiveShrink("alignment")
    shrink._healthy = 0
    with pytest.warns(
        UserWarning, match="law='alignment' compares with what is fresh, and here is nothing .*; use law='stability'"
    ):
        assert shrink.factor(Arrival(0, 0, 0, 9, 0.0), torch.ones(1), nothing_fresh) == 1


def _two_laws() -> None:
    def mine(arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
        return 0.5

    t = trainer(1, callbacks=[AdaptiveShrink()])
    t.strategy.shrink = mine  # type: ignore[attr-defined]
    with pytest.raises(MisconfigurationException, match="the strategy's `shrink` is set already"):
        t.fit(Lit(), loader(), loader(40))


def test_two_laws() -> None:
    run(1, _two_laws)


class Plain(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def _served(optimizer: str, push: Any) -> None:
    t = trainer(1, strategy=CyclicDelayStrategy(push=push), callbacks=[AdaptiveShrink()], max_epochs=1)
    t.fit(Plain() if optimizer == "adam" else Lit(), loader(), loader(40, shuffle=False))


def _refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Adam takes .* steps on the server: use push='delta', or SGD"):
        _served("adam", "gradient")


@pytest.mark.few(0)
def test_what_a_server_steps_by_adam_cannot_be_shrunk() -> None:
    run(1, _refused)
    run(1, _served, "adam", "delta")
    run(1, _served, "sgd", "gradient")


def _in_step() -> None:
    shrink = AdaptiveShrink()
    first = os.environ["RANK"] == "0"
    t = trainer(2, strategy=LazySignStrategy(), callbacks=[shrink], max_epochs=1)
    with (
        pytest.warns(UserWarning, match="AdaptiveShrink has nothing to say .* leave it out$")
        if first
        else nullcontext()
    ):
        t.fit(Lit(), loader(), loader(40, shuffle=False))
    assert t.strategy.shrink is no_shrink  # type: ignore[attr-defined]
    assert shrink.figures == {}


def test_where_nothing_is_asked_for_it_says_so() -> None:
    run(2, _in_step)


def _without_a_loss() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(1, callbacks=[AdaptiveShrink("stability")], max_epochs=1).fit(ByHand(), loader(), loader(40))
    return [str(warning.message) for warning in caught if "AdaptiveShrink" in str(warning.message)]


def test_stability_without_a_loss_says_so_once() -> None:
    (said,) = run(1, _without_a_loss)
    assert said == [
        "AdaptiveShrink: law='stability' goes by the loss here, and `training_step` returns none: return it, or use "
        "law='relative'"
    ]


def _in_a_pipeline(optimizer: str) -> list[tuple[bool, float]]:
    warnings.filterwarnings("ignore", "AdaptiveShrink: AdamW takes the same steps")
    shrink = AdaptiveShrink("stability")
    t = piped.trainer(3, callbacks=[shrink])
    t.fit(piped.Piped(lr=0.2, optimizer=optimizer), piped.loader(), piped.loader(20))
    laws = [law for law in shrink._laws.values() if isinstance(law, Stability)]
    return [(law.sees, law.factor(3)) for law in laws]


@pytest.mark.few(0)
def test_in_a_pipeline_each_stage_but_the_last_sees_how_the_loss_bends() -> None:
    """The last one, on rank 0, has no late gradients."""
    ((last, _),), ((middle, one),), ((first, other),) = run(3, _in_a_pipeline, "sgd")
    assert (last, middle, first) == (False, True, True)
    assert one != other
    for seen in run(3, _in_a_pipeline, "adam"):  # whose way is not along its gradients
        assert not any(sees for sees, _ in seen)
