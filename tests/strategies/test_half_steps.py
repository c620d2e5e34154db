"""Half-precision weights are stepped in float32: their exact values and the optimizers' states are those of a twin."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_async import AsyncStrategy, SpeedFaults
from tests.strategies.lit import loader, trainer, weights
from tests.strategies.ranks import run
from tests.strategies.resumable import Draws, Saves, held_out, look_when_put_back, plain, samples, seed

BF16, FP32 = "torch.bfloat16", "torch.float32"
RATE = 1e-6
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=RATE, momentum=0.9),
    "adam": partial(torch.optim.AdamW, lr=RATE),
    "adagrad": partial(torch.optim.Adagrad, lr=RATE),  # which makes its state before it has seen a gradient
}


class Small(L.LightningModule):
    """Steps far below the last place of its weights; remembers with which gradients, and as what each optimizer found
    the parameters in its midst."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.frozen, self.unused = nn.Linear(8, 8).requires_grad_(False), nn.Linear(2, 2)
        self.make = make
        self.found: list[dict[str, str]] = []
        self.used: list[tuple[Any, dict[str, Tensor]]] = []

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.frozen(self.body(batch[1]))) - batch[2]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert {p.dtype for p in self.parameters()} == {torch.bfloat16}
        return self.loss(batch)

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        super().configure_gradient_clipping(optimizer, *arguments, **options)
        self.uses(0)

    def uses(self, which: int) -> None:
        """The gradients of the step to come, as the optimizer is about to find them."""
        self.used.append((which, {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}))

    def groups(self) -> list[list[str]]:
        """The parameters of each optimizer, by name."""
        return [[name for name, p in self.named_parameters() if p.requires_grad]]

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        made = [self.make([named[name] for name in names]) for names in self.groups()]
        for optimizer in made:
            optimizer.register_step_post_hook(lambda *_: self.found.append(self.dtypes()))
        return made

    def dtypes(self) -> dict[str, str]:
        """Of all parameters, as they are just now."""
        return {name: str(p.dtype) for name, p in self.named_parameters()}


class Free(torch.optim.Optimizer):
    """SGD without a schedule: takes steps from `z`, shows the average of these, and trains at a point between both."""

    def __init__(self, params: Any, lr: float = RATE, between: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "between": between, "steps": 0, "trains": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            assert group["trains"]
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, 1 / group["steps"])
                    p.sub_(p.grad, alpha=group["lr"] * (1 - group["between"]))
                    z.sub_(p.grad, alpha=group["lr"])
        return result

    @torch.no_grad()
    def _show(self, trains: bool) -> None:
        for group in self.param_groups:
            if group["trains"] is not trains:
                group["trains"] = trains
                weight = 1 - group["between"] if trains else 1 - 1 / group["between"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)

    def train(self) -> None:
        self._show(True)

    def eval(self) -> None:
        self._show(False)


class ShowsAverages(Small):
    """By `self.optimizers()` for a validation, and by the Trainer's own for what is saved."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(make)
        self.shown: list[Tensor] = []

    def on_validation_start(self) -> None:
        self._to("eval", self.optimizers())

    def on_validation_end(self) -> None:
        self._to("train", self.optimizers())

    def on_train_end(self) -> None:
        self._to("eval", self.trainer.optimizers[0])

    def _to(self, mode: str, optimizer: Any) -> None:
        self.used.append((mode, {}))
        getattr(optimizer, mode)()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.shown.append(self.body.weight.detach().clone())


class TwoByHand(Small):
    """An optimizer for the body, and one for the head, which is given a closure."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def groups(self) -> list[list[str]]:
        return [["body.weight", "body.bias"], ["head.weight", "head.bias", "unused.weight"]]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, other = self.optimizers()
        one.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(one, gradient_clip_val=0.5)
        self.uses(0)
        one.step()

        def closure() -> Tensor:
            loss: Tensor = super(TwoByHand, self).training_step(batch, batch_idx)
            other.zero_grad()
            self.manual_backward(loss)
            self.uses(1)
            return loss

        other.step(closure=closure)


def _twin(module: Small, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Any]]:
    """What float32 parameters come to that are stepped with the same gradients, and the states of their optimizers."""
    wide = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizers = [module.make([wide[name] for name in names]) for names in module.groups()]
    for which, gradients in module.used:
        if which in ("train", "eval"):
            getattr(optimizers[0], which)()
            continue
        for name, p in wide.items():
            p.grad = gradients[name].float() if name in gradients else None
        optimizers[which].step()
    return {name: p.detach() for name, p in wide.items()}, [o.state_dict()["state"] for o in optimizers]


def _steps(kind: type[Small], make: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    module = kind(make)
    start = {name: p.detach().bfloat16().float() for name, p in module.named_parameters() if p.requires_grad}
    t = trainer(1, precision="bf16-true", max_epochs=1, **options)
    t.fit(module, loader(8, n=80), loader(40, n=40, shuffle=False) if hasattr(module, "shown") else None)
    strategy = t.strategy
    assert isinstance(strategy, AsyncStrategy)
    names = {id(p): name for name, p in module.named_parameters()}
    places = [names[id(p)] for p, _ in strategy.replica.places]
    exact = dict(zip(places, strategy.replica.parts(strategy.replica.flat), strict=True))
    twin, states = _twin(module, start)
    return {
        "exact": {name: part.tolist() for name, part in exact.items()},
        "twin": {name: p.flatten().tolist() for name, p in twin.items()},
        "start": {name: p.flatten().tolist() for name, p in start.items()},
        "shown": all(torch.equal(p.flatten(), exact[n].bfloat16()) for n, p in module.named_parameters() if n in exact),
        "states": plain([o.state_dict()["state"] for o in t.optimizers]),
        "twins states": plain(states),
        "found": module.found,
        "after": module.dtypes(),
        "steps": len(module.used),
        "gradients": {str(g.dtype) for _, gradients in module.used for g in gradients.values()},
        "norm": max(float(torch.stack([g.float().norm() for g in gs.values()]).norm()) for _, gs in module.used if gs),
    }


@pytest.mark.few(2)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Small, {}),
        (Small, {"gradient_clip_val": 0.5}),
        (Small, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (TwoByHand, {}),
    ],
)
def test_they_go_where_a_float32_twin_goes_that_has_the_same_gradients(
    kind: type[Small], options: dict[str, Any], name: str
) -> None:
    (end,) = run(1, _steps, kind, MAKERS[name], options)
    assert end["steps"] == (4 if "accumulate_grad_batches" in options else 20 if kind is TwoByHand else 10)
    assert end["exact"] == end["twin"]
    for parameter, values in end["exact"].items():
        assert (values == end["start"][parameter]) is parameter.startswith("unused"), parameter
        assert values == pytest.approx(end["start"][parameter], abs=1e-3), "far below a place"
    assert end["shown"]
    assert end["states"] == end["twins states"]
    assert {dtype for dtype, _ in _tensors(end["states"])} == {FP32}
    assert end["gradients"] == {BF16}, "clipping, and whoever looks, sees those of the weights"
    if options.get("gradient_clip_val") == 0.5:
        assert 0.45 < end["norm"] <= 0.5 * (1 + 2**-6)
    assert set(end["after"].values()) == {BF16}


def test_averages_that_an_optimizer_shows_are_made_of_float32() -> None:
    """A schedule-free one's, for a validation and at the end, as its float32 twin's."""
    (end,) = run(1, _steps, ShowsAverages, partial(Free, lr=1e-4), {"val_check_interval": 5, "num_sanity_val_steps": 0})
    assert end["steps"] == 10 + 5
    assert end["exact"] == end["twin"]
    assert end["states"] == end["twins states"]
    assert end["shown"]
    assert {dtype for dtype, _ in _tensors(end["states"])} == {FP32}


class HoldsGroups(Small):
    """Has its own schedule, of a group that it took from its optimizer."""

    def configure_optimizers(self) -> Any:
        (optimizer,) = super().configure_optimizers()
        self.group = optimizer.param_groups[0]
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.group["lr"] = RATE / (1 + batch_idx)
        return super().training_step(batch, batch_idx)


def _held() -> tuple[bool, float]:
    module = HoldsGroups(MAKERS["adagrad"])
    t = trainer(1, precision="bf16-true", max_epochs=1)
    t.fit(module, loader(8, n=80))
    (group,) = t.optimizers[0].param_groups
    return group is module.group, group["lr"]


def test_an_optimizer_whose_early_state_is_widened_keeps_its_groups() -> None:
    assert run(1, _held) == [(True, RATE / 10)]


def test_only_what_an_optimizer_steps_is_float32_in_its_midst() -> None:
    (end,) = run(1, _steps, TwoByHand, MAKERS["sgd"], {})
    body, head = end["found"][:2]
    assert {name for name, dtype in body.items() if dtype == FP32} == {"body.weight", "body.bias"}
    assert {name for name, dtype in head.items() if dtype == FP32} == {"head.weight", "head.bias"}, "one is not used"


class Tiny(Draws):
    """Adam at rates that bfloat16 does not see."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), RATE)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def _saved(path: str, at_meeting: str, resume: bool) -> dict[str, Any]:
    seed()
    save, pace = Saves(path, "validation"), SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    knobs = {"at_meeting": at_meeting}
    callbacks = [pace] if resume else [pace, save]
    t = trainer(2, knobs=knobs, precision="bf16-true", callbacks=callbacks, max_epochs=2)
    seen = look_when_put_back(t)
    t.fit(Tiny(), samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0] if resume else save.seen


def _tensors(state: Any) -> list[tuple[str, list[float]]]:
    """What `plain` made of tensors of more than a number."""
    if isinstance(state, dict):
        return [found for value in state.values() for found in _tensors(value)]
    if isinstance(state, tuple):
        return [(state[0], state[2])] if state[1] else []
    return [found for value in state for found in _tensors(value)] if isinstance(state, list) else []


@pytest.mark.few(0)
@pytest.mark.parametrize("at_meeting", ["keep", "adopt"])
def test_states_come_back_as_wide_as_they_were(at_meeting: str, tmp_path: Path) -> None:
    """torch would round them to the precision of the weights that it finds as it loads them."""
    path = str(tmp_path / "x.ckpt")
    saved = run(2, _saved, path, at_meeting, False)
    assert saved == run(2, _saved, path, at_meeting, True)
    for one in saved:
        states = _tensors([optimizer["state"] for optimizer in one["optimizers"]])
        assert {dtype for dtype, _ in states} == {FP32}
        assert any(torch.tensor(values).bfloat16().tolist() != values for _, values in states)


class SavesExactly(Saves):
    """And notes what all hold at the save, by name."""

    def _save(self, trainer: Any, module: Any) -> None:
        super()._save(trainer, module)
        self.exact = by_name(trainer.strategy, trainer.strategy.replica.flat)


def by_name(strategy: AsyncStrategy, vector: Tensor) -> dict[str, list[float]]:
    names = {id(p): name for name, p in strategy.trainer.lightning_module.named_parameters()}
    parts = zip(strategy.replica.places, strategy.replica.parts(vector), strict=True)
    return {names[id(p)]: part.tolist() for (p, _), part in parts}


def _other_world(n: int, path: str, resume: bool, precision: str) -> dict[str, list[float]]:
    seed()
    save = SavesExactly(path, "validation", epoch=0)
    t = trainer(n, knobs={"at_meeting": "keep"}, precision=precision, callbacks=[save] * (not resume), max_epochs=2)
    seen = look_when_put_back(t, lambda t: by_name(t.strategy, t.strategy.replica.own))  # type: ignore[arg-type, attr-defined]
    warnings.filterwarnings("ignore", ".*does not go on to the bit")
    t.fit(Tiny(), samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0] if resume else save.exact


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("before", "after", "precision", "then"),
    [(3, 2, "bf16-true", "bf16-true"), (2, 3, "bf16-true", "32-true"), (2, 1, "64-true", "64-true")],
)
def test_another_world_goes_on_from_all_of_the_consensus(
    before: int, after: int, precision: str, then: str, tmp_path: Path
) -> None:
    """Also with what lies below a place of the weights that the file shows."""
    path = str(tmp_path / "x.ckpt")
    saved = run(before, _other_world, before, path, False, precision)
    found = run(after, _other_world, after, path, True, then)
    assert found == [saved[0]] * after
    rounded = torch.load(path, weights_only=True)["state_dict"]
    assert any(values != rounded[name].float().flatten().tolist() for name, values in saved[0].items())


def _moved() -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    module = Tiny()
    before = [float(x) for p in module.parameters() for x in p.detach().bfloat16().flatten()]
    t = trainer(2, precision="bf16-true", max_epochs=2)
    t.fit(module, samples(), held_out())
    strategy = t.strategy
    assert isinstance(strategy, AsyncStrategy)
    exact = [float(x) for part in strategy.replica.parts(strategy.replica.flat) for x in part]
    assert len(exact) == len(before)
    return weights(module), [a - b for a, b in zip(exact, before, strict=True)]


def test_no_step_is_too_small_for_ranks_that_meet() -> None:
    """Adam goes about as far as its rate says in each of 20 steps, which most weights cannot show yet."""
    (first, moved), (second, also_moved) = run(2, _moved)
    assert first == second
    assert moved == also_moved
    assert 5 * RATE < max(map(abs, moved)) < 50 * RATE
