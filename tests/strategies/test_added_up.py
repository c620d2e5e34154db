"""Gradients of a step that is still to come are not lost where a run goes on: to the bit, or as their mean.

The loss is linear in the weights and the samples are small whole numbers: gradients are those of the samples, exactly.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import SpeedFaults
from lightning_async.strategies.added_up import Carried, mean_of_all
from lightning_async.strategies.rank_files import rank_file
from lightning_async.transport.rounds import combined
from tests.strategies.lit import trainer
from tests.strategies.ranks import run
from tests.strategies.resumable import Saves, files_of, look_when_put_back, rank

WINDOW = 4
SAMPLES = torch.randint(-8, 8, (96, 8), generator=torch.Generator().manual_seed(0)).float()
WORLDS = [(2, 1), (2, 3), (4, 2), (1, 2)]


class Straight(L.LightningModule):
    """Knows the gradients that its batches add up to, and what the optimizer was given."""

    window = WINDOW

    def __init__(self) -> None:
        super().__init__()
        self.w, self.other = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(2))
        self.pending = torch.zeros(8, dtype=torch.float64)
        self.steps: list[tuple[list[float], list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        self.pending = self.pending + x.mean(0).double() / self.window
        return (x * self.w).sum(1).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.other.grad is None
        assert self.w.grad is not None
        self.steps.append((self.w.grad.double().tolist(), self.pending.tolist()))
        self.pending = torch.zeros(8, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 2.0**-6)


class ByHand(Straight):
    """Adds up the gradients of three batches by itself."""

    window = 1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class SavesPending(Saves):
    """Remembers what had been added up."""

    pending: Tensor

    def _save(self, trainer: Any, module: Any) -> None:
        super()._save(trainer, module)
        self.pending = module.pending.clone()


def _fit(
    n: int,
    kind: type[Straight],
    scale: bool,
    save: tuple[str, tuple[int, ...]] | None,
    path: str | None,
    sizes: tuple[int, ...] = (2, 2, 2, 2),
    window: int = WINDOW,
) -> dict[str, Any]:
    """A run that saves at a batch of each rank's own, or one that goes on, or both."""
    module, callbacks = kind(), list[L.Callback]([SpeedFaults(step_seconds=0.001)])
    module.window = 1 if kind is ByHand else window
    if save is not None:
        callbacks.append(SavesPending(save[0], epoch=0, batch=save[1][rank()]))
    options: dict[str, Any] = {} if kind is ByHand else {"accumulate_grad_batches": window}
    if scale:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (5 + rank()))
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    t = trainer(n, knobs={"mode": "none", "balance": "equal"}, callbacks=callbacks, max_epochs=1, **options)
    carried = look_when_put_back(t, lambda t: t.strategy.stepping.state_dict()["carried"])  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(module, DataLoader(TensorDataset(SAMPLES), batch_size=sizes[rank()]), ckpt_path=path)
    return {
        "steps": module.steps,
        "pending": next((c.pending.tolist() for c in callbacks if isinstance(c, SavesPending)), None),
        "carried": {name: value.tolist() for name, value in carried[0].items()},
        "said": [str(w.message) for w in caught if "does not go on to the bit" in str(w.message)],
    }


def mean(ranks: list[dict[str, Any]]) -> Tensor:
    """Of what all had added up."""
    return torch.tensor([one["pending"] for one in ranks], dtype=torch.float64).mean(0)


def steps_with(one: dict[str, Any], first: Tensor) -> bool:
    """The first step is with `first` on top of its batches; the others with their batches' gradients alone."""
    found, batches = (torch.tensor(of, dtype=torch.float64) for of in zip(*one["steps"], strict=True))
    batches[0] += first
    return torch.equal(found, batches)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [Straight, ByHand])
@pytest.mark.parametrize(("before", "after"), WORLDS)
@pytest.mark.parametrize("first", [3, 5])
def test_another_world_adds_the_mean_of_what_all_had_added_up_to_its_first_step(
    kind: type[Straight], before: int, after: int, first: int, tmp_path: Path
) -> None:
    """Also where the rank that wrote the main file had just stepped, and its window begins anew (3; by hand: 5)."""
    path = str(tmp_path / "x.ckpt")
    saved = run(before, _fit, before, kind, False, (path, (first, 4, 6, 3)), None)
    resumed = run(after, _fit, after, kind, False, None, path)
    carried = mean(saved)
    stepped = first == (5 if kind is ByHand else 3)
    assert stepped != any(saved[0]["pending"])
    adding = bool(carried.any())
    for one in resumed:
        assert one["carried"] == ({"w": carried.tolist()} if adding else {})
        assert len(one["steps"]) >= 2
        assert steps_with(one, carried)
    (sentence,) = resumed[0]["said"]
    words = "Each rank adds the mean of the gradients that all had added up to a step still to come to its first step."
    assert (words in sentence) is adding
    assert "lost" not in sentence


@pytest.mark.few(2)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1)])
@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_with_another_window_each_sample_counts_as_those_to_come(
    before: int, after: int, window: int, tmp_path: Path
) -> None:
    """Nor is it lost where a window of the new length begins there, and all gradients are cleared (1, 2)."""
    path = str(tmp_path / "x.ckpt")
    saved = run(before, _fit, before, Straight, False, (path, (5, 4)), None)
    (end,) = run(after, _fit, after, Straight, False, None, path, (2, 2), window)
    had = mean(saved)
    assert had.any()
    if window == WINDOW and before == after:  # they are in `.grad`
        assert end["carried"] == {}
    assert steps_with(end, had * WINDOW / window)


def test_files_of_older_versions_do_not_say_by_what_they_are_divided(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    (saved,) = run(1, _fit, 1, Straight, False, (str(path), (4,)), None)
    own = files_of(path)[0]
    assert own["parts"]["stepping"].pop("divided") == WINDOW
    torch.save(own, rank_file(str(path), own["save"], 0))
    (end,) = run(1, _fit, 1, Straight, False, None, str(path), (2,), 8)
    assert steps_with(end, mean([saved]))


@pytest.mark.few(0)
@pytest.mark.parametrize("kind", [Straight, ByHand])
def test_under_fp16s_scaler_each_rank_had_a_scale_of_its_own(kind: type[Straight], tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    saved = run(2, _fit, 2, kind, True, (path, (4, 6)), None)
    assert [own["parts"]["stepping"]["scale"] for own in files_of(Path(path)).values()] == [32.0, 64.0]
    for one in run(3, _fit, 3, kind, True, None, path):
        assert one["carried"] == {"w": mean(saved).tolist()}
        assert steps_with(one, mean(saved))


@pytest.mark.few(0)
def test_who_has_larger_batches_weighs_more(tmp_path: Path) -> None:
    """Each sample counts the same."""
    path = str(tmp_path / "x.ckpt")
    one, other = run(2, _fit, 2, Straight, False, (path, (4, 5)), None, (2, 6))
    small, large = (torch.tensor(rank["pending"], dtype=torch.float32) for rank in (one, other))
    (end,) = run(1, _fit, 1, Straight, False, None, path)
    torch.testing.assert_close(torch.tensor(end["carried"]["w"]), (small + 3 * large) / 4, rtol=0, atol=1e-6)  # sixths


@pytest.mark.few(0)
@pytest.mark.parametrize("again", [1, 2])
def test_what_waits_for_its_step_is_saved_once_more(again: int, tmp_path: Path) -> None:
    """By the same world: each goes on with its own, to the bit; by another: with the mean of both."""
    one, other = str(tmp_path / "x.ckpt"), str(tmp_path / "y.ckpt")
    saved = run(2, _fit, 2, Straight, False, (one, (4, 5)), None)
    (middle,) = run(1, _fit, 1, Straight, False, (other, (5,)), one)
    assert any(middle["pending"])
    for end in run(again, _fit, again, Straight, False, None, other):
        if again == 1:
            assert end["carried"] == middle["carried"]
            assert steps_with(end, mean(saved) + mean([middle]))
            assert not end["said"]
        else:
            assert end["carried"] == {"w": (mean(saved) + mean([middle])).tolist()}
            assert steps_with(end, mean(saved) + mean([middle]))


def test_whose_file_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    saved = run(2, _fit, 2, Straight, False, (str(path), (4, 5)), None)
    (file,) = tmp_path.rglob("*.rank1.ckpt")
    file.unlink()
    first, second = run(2, _fit, 2, Straight, False, None, str(path))
    for one in (first, second):
        assert one["carried"] == {"w": saved[0]["pending"]}, "of those that are there"
        assert steps_with(one, mean(saved[:1]))
    (sentence,) = first["said"]
    assert "The gradients that rank 1 had added up to a step still to come are lost; their samples" in sentence


def test_who_had_nothing_to_add_says_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    run(2, _fit, 2, Straight, False, (path, (3, 7)), None)
    assert torch.load(path, weights_only=True)["lightning_async"]["added_up"] == []
    (one,) = run(1, _fit, 1, Straight, False, None, path)
    assert one["carried"] == {}
    assert steps_with(one, torch.zeros(8, dtype=torch.float64))
    assert "added up" not in one["said"][0]


# -- the mean itself ---------------------------------------------------------------------------------------------------


class _Rounds:
    """A round in which `others` have said what they bring; alone it is one's own."""

    def __init__(self, me: int, others: dict[int, tuple[torch.Tensor, int]]) -> None:
        self.me, self.others = me, others

    def agree(self, word: bytes, *, what: str) -> Any:
        yield from ()
        return {self.me: word}

    def exchange(self, tensor: torch.Tensor, how: str, weight: int) -> Any:
        yield from ()
        self.others[self.me] = tensor, weight
        parts = [self.others[rank] for rank in sorted(self.others)]
        return [combined(parts, "mean")], tuple(self.others)


def _mean(me: int, world: int, states: list[dict[str, Any]], here: list[int], others: dict[int, Any]) -> dict[str, Any]:
    module, ranks = torch.nn.Linear(5, 3), list(range(len(states)))
    strategy = SimpleNamespace(
        global_rank=me,
        world_size=world,
        office=SimpleNamespace(rounds=_Rounds(me, others)),
        trainer=SimpleNamespace(lightning_module=module),
        precision_plugin=SimpleNamespace(precision="32-true"),
    )
    files = [{"parts": {"stepping": state}} for state in states]
    waiting = mean_of_all(strategy, {"ranks": ranks}, files[me % len(ranks)], files.__getitem__, here)  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as ended:
        next(waiting)
    found, lost = ended.value.value
    assert lost == []
    return found


def test_who_goes_on_alone_adds_up_what_all_would_to_the_bit() -> None:
    """A replay of one rank reads the files of all; so do those who are left where one died on the way."""
    torch.manual_seed(3)
    states = [
        {"gradients": {"weight": torch.randn(3, 5), "bias": torch.randn(3)}, "mass": mass} for mass in (3, 1, 4, 1, 5)
    ]
    brought: dict[int, Any] = {}
    for me in range(3):
        together = _mean(me, 3, states, [0, 1, 2], brought)
    for me in range(3):
        alone = _mean(me, 3, states, [me], {})
        assert all(torch.equal(alone[name], together[name]) for name in ("weight", "bias"))
    exact = sum(state["gradients"]["weight"].double() * state["mass"] for state in states) / 14
    assert torch.allclose(together["weight"].double(), exact, rtol=0, atol=1e-6)
    brought = {}
    for me in (0, 2):
        without = _mean(me, 3, states, [0, 2], brought)
    assert torch.allclose(without["weight"].double(), exact, rtol=0, atol=1e-6)


def test_what_overflowed_is_nobody_elses() -> None:
    """Its step would have been skipped on the rank that had it."""
    finite = {"gradients": {"bias": torch.ones(3)}, "mass": 1}
    broken = {"gradients": {"bias": torch.tensor([1.0, float("inf"), 1.0])}, "mass": 1}
    assert torch.equal(_mean(0, 1, [finite, broken], [0], {})["bias"], torch.full((3,), 0.5))


# -- a step that is not taken ------------------------------------------------------------------------------------------


def test_what_waits_goes_on_waiting_where_its_step_is_not_taken() -> None:
    weight, own = nn.Parameter(torch.zeros(3)), torch.full((3,), 4.0)
    optimizer, plugin, carried = torch.optim.SGD([weight], 1.0), Precision(), Carried()
    module = nn.ParameterDict({"w": weight})
    carried.load_state_dict(module, {"w": torch.ones(3)})

    def backward() -> None:
        weight.grad = own.clone()

    for fails in (True, False):
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), carried.until_stepped(optimizer):
            carried.behind(backward, optimizer, plugin)()
            assert weight.grad.tolist() == [5.0] * 3  # type: ignore[union-attr]
            if fails:  # a hook raises; or fp16's scaler does not ask for the step
                1 / 0  # noqa: B018
        assert weight.grad.tolist() == own.tolist()  # type: ignore[union-attr]
        assert carried.state_dict(module)["w"].tolist() == [1.0] * 3
    with carried.until_stepped(optimizer):
        optimizer.step(carried.behind(backward, optimizer, plugin))
    assert weight.tolist() == [-5.0] * 3
    assert not carried
    with carried.until_stepped(optimizer):
        optimizer.step(carried.behind(backward, optimizer, plugin))
    assert weight.tolist() == [-9.0] * 3


def test_in_the_step_the_device_holds_the_sums_alone() -> None:
    """Those of this rank that they are made of wait in host memory, in case that the step is not taken."""
    weight, plugin, carried = nn.Parameter(torch.zeros(3)), Precision(), Carried()
    optimizer, found = torch.optim.SGD([weight], 1.0), list[weakref.ref[Tensor]]()
    carried.load_state_dict(nn.ParameterDict({"w": weight}), {"w": torch.ones(3)})

    def backward() -> None:
        weight.grad = torch.full((3,), 4.0)
        found.append(weakref.ref(weight.grad))

    with carried.until_stepped(optimizer):
        carried.behind(backward, optimizer, plugin)()
        assert found[0]() is None
        optimizer.step()
    assert weight.tolist() == [-5.0] * 3


class OverflowsAtFirst(Straight):
    """The scaler skips its first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if len(self.steps) == 0 and self.skips else loss

    skips = False


def _skips(path: str) -> dict[str, Any]:
    OverflowsAtFirst.skips = True
    return _fit(1, OverflowsAtFirst, True, None, path)


def test_a_step_that_the_scaler_skips_does_not_lose_them(tmp_path: Path) -> None:
    """The samples of others that come with them have not overflowed."""
    path = str(tmp_path / "x.ckpt")
    saved = run(2, _fit, 2, OverflowsAtFirst, True, (path, (4, 5)), None)
    ((end),) = run(1, _skips, path)
    assert not all(map(isfinite, end["steps"][0][0]))
    end["steps"] = end["steps"][1:]
    assert steps_with(end, mean(saved))
