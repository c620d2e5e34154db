"""A stage's half-precision weights are stepped in float32: what they hold the rounding of is where a twin goes."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_async.pipeline import compensate
from lightning_async.strategies import compat
from lightning_async.strategies.pipe_rounding import PipeRounding, wider_steps
from lightning_async.strategies.pipe_saving import KEY
from lightning_async.strategies.wide_steps import widen_modes
from tests.strategies.piped import Piped, loader, trainer
from tests.strategies.ranks import run
from tests.strategies.test_half_steps import MAKERS, RATE, Free

Numbers = dict[str, list[float]]


class Tiny(Piped):
    """Steps far below the last place of its weights; remembers with which gradients."""

    def __init__(self, maker: str) -> None:
        super().__init__()
        self.make = MAKERS[maker]
        self.used: list[dict[str, Tensor]] = []
        self.began: Numbers = {}
        self.ended: Numbers = {}
        self.states: dict[str, Any] = {}
        self.shown: Numbers = {}

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        super().configure_gradient_clipping(optimizer, *arguments, **options)
        self.used.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})

    def on_train_start(self) -> None:
        self.began = self._exact()

    def on_train_end(self) -> None:
        self.ended = self.trainer.strategy.answered_for(self._exact())  # type: ignore[attr-defined]
        names = {id(p): name for name, p in self.named_parameters()}
        (optimizer,) = self.trainer.optimizers
        self.states = _plain({names[id(p)]: state for p, state in optimizer.state.items()})
        self.shown = {name: p.flatten().tolist() for name, p in self.named_parameters()}

    def _exact(self) -> Numbers:
        """What the stage trains, as its optimizer steps it."""
        strategy: Any = self.trainer.strategy
        own = {id(p) for p in strategy.turns.parts.own()}
        found = strategy.rounding.exact() or {name: p for name, p in self.named_parameters() if id(p) in own}
        return {name: part.flatten().tolist() for name, part in found.items()}


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """Tensors as what they are, and their numbers."""
    return {
        name: {key: (str(v.dtype), v.flatten().tolist()) for key, v in state.items() if isinstance(v, Tensor)}
        for name, state in states.items()
    }


def _twin(lit: Tiny, start: dict[str, Tensor]) -> tuple[Numbers, dict[str, Any]]:
    """What float32 weights come to that are stepped with the same gradients, and the states of their optimizer."""
    wide = {name: nn.Parameter(start[name].clone()) for name in lit.ended}
    optimizer = lit.make(list(wide.values()))
    for gradients in lit.used:
        for name, p in wide.items():
            p.grad = gradients[name].float() if name in gradients else None
        optimizer.step()
    states = {name: optimizer.state[p] for name, p in wide.items()}
    return {name: p.detach().flatten().tolist() for name, p in wide.items()}, _plain(states)


def _steps(maker: str, knobs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    lit = Tiny(maker)
    start = {name: p.detach().bfloat16().float() for name, p in lit.named_parameters()}
    trainer(2, knobs=knobs, precision="bf16-true", max_epochs=1, **options).fit(lit, loader(), loader(20))
    twin, states = _twin(lit, start)
    return {
        "ended": lit.ended,
        "twin": twin,
        "start": {name: p.flatten().tolist() for name, p in start.items()},
        "rounded": {name: torch.tensor(part).bfloat16().tolist() for name, part in lit.ended.items()},
        "shown": lit.shown,
        "states": lit.states,
        "twins states": states,
        "steps": len(lit.used),
    }


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("maker", "knobs", "options"),
    [
        ("adam", {}, {}),
        ("sgd", {"semantics": "recompute"}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        ("adagrad", {"order": "forward_first", "clip": "pipe"}, {"gradient_clip_val": 0.1}),
        ("adam", {"compensate": "predict", "semantics": "hybrid"}, {}),
    ],
)
def test_they_go_where_a_float32_twin_goes_that_has_the_same_gradients(
    maker: str, knobs: dict[str, Any], options: dict[str, Any]
) -> None:
    last, first = run(2, _steps, maker, knobs, options)
    assert {"net.0.0.weight", "embed.weight", "norm.bias"} <= first["ended"].keys()
    assert {"net.2.0.weight", "head.bias"} <= last["ended"].keys()
    assert not first["ended"].keys() & last["ended"].keys()
    for rank in (last, first):
        assert rank["steps"] == (4 if options.get("accumulate_grad_batches") else 8)
        assert rank["ended"] == rank["twin"]
        assert rank["states"] == rank["twins states"]
        moved = [name for name, part in rank["ended"].items() if part != rank["start"][name]]
        assert 2 * len(moved) > len(rank["ended"])
        assert any(rank["shown"][name] == rank["start"][name] for name in moved), "which `ddp` would lose"
        for name, part in rank["ended"].items():
            assert part == pytest.approx(rank["start"][name], abs=1e-3), "far below a place"
            assert rank["shown"][name] == rank["rounded"][name]


def test_spikes_of_momentum_are_float32_too() -> None:
    weight, twin = (nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    rounding = PipeRounding()
    rounding.begin([("w", weight)], {})
    optimizer, other = (torch.optim.SGD([p], RATE, momentum=0.9) for p in (weight, twin))
    for step in range(3):
        gradient = torch.tensor([1.0, -2.0, 0.5, 3.0]) * (step + 1)
        weight.grad, twin.grad = gradient.bfloat16(), gradient
        with rounding.stepping(optimizer):
            optimizer.step()
        other.step()
        with rounding.around_step(optimizer):
            compensate.spike(optimizer, 2.0)
        compensate.spike(other, 2.0)
    assert torch.equal(rounding.exact()["w"], twin)
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [1.0] * 4
    rounding.end()
    assert not rounding.exact()


def test_averages_that_an_optimizer_shows_are_made_of_float32() -> None:
    """A schedule-free one's, which goes by what it remembers."""
    weight, twin = (nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    rounding, leash = PipeRounding(), compat.Leash(L.Trainer(accelerator="cpu", logger=False))
    rounding.begin([("w", weight)], {})
    optimizer, other = Free([weight], 1e-4), Free([twin], 1e-4)
    shown = SimpleNamespace(train=optimizer.train, eval=optimizer.eval)
    widen_modes(optimizer, shown, leash, lambda: rounding.around_mode(optimizer))
    for step in range(3):
        gradient = torch.tensor([1.0, -2.0, 0.5, 3.0]) * (step + 1)
        weight.grad, twin.grad = gradient.bfloat16(), gradient
        with rounding.stepping(optimizer):
            optimizer.step()
        other.step()
        weight.grad = twin.grad = None
        shown.eval()
        other.eval()
        assert torch.equal(rounding.exact()["w"], twin)
        optimizer.train()
        other.train()
    assert torch.equal(rounding.exact()["w"], twin)
    leash.restore()


def test_frozen_weights_of_eight_bits_are_left_as_they_are() -> None:
    """Nothing is as wide as they and float32; and none of them is stepped."""
    rounding, weight = PipeRounding(), nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    rounding.begin([("w", weight)], {})
    assert not rounding.narrow
    assert not rounding.exact()


def test_a_part_that_begins_in_inference_mode_is_stepped() -> None:
    """As where a hook of the first validation shows an optimizer that has learned something before."""
    weight, rounding = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), PipeRounding()
    optimizer = Free([weight], RATE)
    optimizer.state[weight]["z"] = torch.ones(4, dtype=torch.bfloat16)
    rounding.begin([("w", weight)], {})
    with torch.inference_mode(), rounding.around_mode(optimizer):
        optimizer.eval()
    with rounding.around_mode(optimizer):
        optimizer.train()
    weight.grad = torch.ones_like(weight)
    with rounding.stepping(optimizer):
        optimizer.step()
    assert not rounding.exact()["w"].is_inference()


@pytest.mark.parametrize(("maker", "remembered"), [("adam", 2), ("sgd", 1)])
def test_what_it_costs_is_told(maker: str, remembered: int) -> None:
    """A float32 number for each, and two bytes more for what is remembered of each."""
    narrow, wide = (
        nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in ((10, torch.bfloat16), (5, torch.float32))
    )
    optimizer = MAKERS[maker]([narrow, wide])
    assert wider_steps(optimizer, [narrow, wide]) == 10 * (4 + 2 * remembered)
    assert wider_steps(optimizer, [wide]) == 0


# -- files -------------------------------------------------------------------------------------------------------------


def _goes_on(n: int, folder: str, resume: str | None, precision: str) -> Any:
    for sentence in ("The dirpath has changed", ".*callbacks used to create the checkpoint"):
        warnings.filterwarnings("ignore", sentence)
    lit, saver = Tiny("adam"), ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0, "max_epochs": 1}
    trainer(n, callbacks=[saver], precision=precision, **options).fit(lit, loader(), loader(20), ckpt_path=resume)
    return lit.began, lit.ended, lit.states, lit.losses


@pytest.mark.few(1)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_run_goes_on_to_the_bit(precision: str, tmp_path: Path) -> None:
    """From what the weights hold the rounding of, and with states as wide as they were."""
    whole = run(2, _goes_on, 2, str(tmp_path / "a"), None, precision)
    file = tmp_path / "a" / "step=4.ckpt"
    exact = _exact_of(file)
    assert exact.keys() == {name for name, _ in Piped().named_parameters()}
    rest = run(2, _goes_on, 2, str(tmp_path / "b"), str(file), precision)
    for (_, ended, states, losses), (began, *end, later) in zip(whole, rest, strict=True):
        assert began.items() <= exact.items()
        assert ended.keys() <= began.keys()
        assert end == [ended, states]
        assert later == losses[4:]


@pytest.mark.few(0)
@pytest.mark.parametrize(("before", "after"), [("bf16-true", "bf16-true"), ("bf16-true", "32-true")])
def test_another_number_of_stages_goes_on_from_all_of_it(before: str, after: str, tmp_path: Path) -> None:
    run(2, _goes_on, 2, str(tmp_path / "a"), None, before)
    file = tmp_path / "a" / "step=4.ckpt"
    exact = _exact_of(file)
    rounded = torch.load(file, weights_only=True)["state_dict"]
    assert any(rounded[name].float().flatten().tolist() != part for name, part in exact.items())
    for began, *_ in run(3, _goes_on, 3, str(tmp_path / "b"), str(file), after):
        assert began
        assert began.items() <= exact.items()


def _exact_of(file: Path) -> Numbers:
    found = torch.load(file, weights_only=True)[KEY]["exact"]
    return {name: part.flatten().tolist() for name, part in found.items()}
