"""Every precision trains, ends equal on all ranks, and a step that a scaler skips harms nobody."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_async import GossipRingStrategy, SpeedFaults
from lightning_async.strategies.scaling import SkippedSteps, has_stepped, steps_of
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run

MODES = ["pairwise", "push_sum", "sync", "none"]
TRUE = [("bf16-true", mode, "keep") for mode in MODES]
TRUE += [("bf16-true", "pairwise", "adopt"), ("16-true", "push_sum", "adopt")]
WIDE = [("bf16-mixed", "float32", "bfloat16"), ("64-true", "float64", "float64")]


def fit(
    lit: L.LightningModule, *callbacks: Callback, slow: float = 3.0, batch: int = 8, **options: Any
) -> GossipRingStrategy:
    faults = [SpeedFaults(step_seconds=0.002, slow={1: slow})] if slow > 1 else []
    t = trainer(2, callbacks=[*faults, *callbacks], **options)
    t.fit(lit, loader(batch), loader(40, shuffle=False))
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    return strategy


class AdamLit(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def _true(precision: str, mode: str, at_meeting: str, folder: str) -> Any:
    torch.manual_seed(int(os.environ["RANK"]))
    lit = AdamLit() if precision == "bf16-true" else Lit()  # Adam's eps is 0 in float16
    saved = ModelCheckpoint(folder, filename="end")
    knobs = {"mode": mode, "at_meeting": at_meeting}
    slow = 1.0 if mode == "sync" else 3.0
    strategy = fit(lit, saved, precision=precision, knobs=knobs, slow=slow, enable_checkpointing=True)
    return weights(lit), str(strategy.replica.flat.dtype), [str(p.dtype) for p in lit.parameters()]


@pytest.mark.few(1)
@pytest.mark.parametrize(("precision", "mode", "at_meeting"), TRUE)
def test_half_precision_weights(precision: str, mode: str, at_meeting: str, tmp_path: Path) -> None:
    (first, flat, dtypes), (second, _, _) = run(2, _true, precision, mode, at_meeting, str(tmp_path))
    assert first == second
    assert flat == "torch.float32"
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    assert set(dtypes) == {str(dtype)}
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert saved["layer.0.weight"].dtype == dtype
    assert saved["layer.0.weight"].flatten().tolist() == first[:64]  # the consensus


def _wide(precision: str) -> Any:
    lit, computed = Lit(), set[str]()
    lit.layer[0].register_forward_hook(lambda layer, given, out: computed.add(str(out.dtype)))
    strategy = fit(lit, precision=precision, max_epochs=1)
    return weights(lit), str(strategy.replica.flat.dtype), {str(p.dtype) for p in lit.parameters()}, computed


@pytest.mark.parametrize(("precision", "held", "computed"), WIDE)
def test_weights_of_full_and_double_width(precision: str, held: str, computed: str) -> None:
    first, second = run(2, _wide, precision)
    assert first[0] == second[0]
    assert all(map(math.isfinite, first[0]))
    assert first[1:] == second[1:] == (f"torch.{held}", {f"torch.{held}"}, {f"torch.{computed}"})


class WideHead(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.layer[0].bfloat16()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, x, y = batch
        return (self._forward(x) - y).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self._forward(batch[1]) - batch[2]).square().mean(), sync_dist=True)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer[0](x.bfloat16()).float()
        out: torch.Tensor = self.layer[2](self.layer[1](hidden))
        return out


def _wide_head() -> Any:
    lit = WideHead()
    fit(lit)
    return weights(lit)


def test_a_float32_head_on_a_half_precision_body() -> None:
    first, second = run(2, _wide_head)
    assert first == second


# -- fp16's gradient scaler --------------------------------------------------------------------------------------------


class Overflows(AdamLit):
    """On rank 1 the gradients of two batches are not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if os.environ["RANK"] == "1" and batch_idx in (3, 5) else loss


class Still(Callback):
    """Whether the weights stood still in the batches whose gradients were not finite."""

    def __init__(self) -> None:
        self.moved: dict[int, bool] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = weights(module)[:64]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.moved[batch_idx] = weights(module)[:64] != self._before


def _scaled(mode: str) -> Any:
    torch.manual_seed(0)
    lit, still = Overflows(), Still()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    slow = 1.0 if mode == "sync" else 3.0
    strategy = fit(lit, still, plugins=[plugin], knobs={"mode": mode}, max_epochs=1, slow=slow, batch=4)
    return weights(lit), strategy.skipped_steps, strategy.steps, still.moved


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("mode", MODES)
def test_steps_that_the_scaler_skips_are_counted_and_harm_nobody(mode: str) -> None:
    (first, none, steps, moved), (second, skipped, also_steps, also_moved) = run(2, _scaled, mode)
    assert first == second
    assert all(map(math.isfinite, first))
    assert (none, skipped) == (0, 2)
    assert all(moved.values())
    if mode == "none":
        assert not also_moved[3]
        assert not also_moved[5]
    assert steps == len(moved)
    assert also_steps == len(also_moved)  # a skipped step is a step in every count


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_skips_steps_by_itself_is_counted_too(fused: bool) -> None:
    """`fused=True` unscales in its own step: it is always asked for one."""
    weight, scaler, skipped = nn.Parameter(torch.ones(3)), torch.amp.GradScaler("cpu", init_scale=64.0), SkippedSteps()
    optimizer, moved = torch.optim.AdamW([weight], 0.1, fused=fused), []
    for factor in (1.0, float("inf"), 1.0, float("nan"), float("inf")):
        before = weight.tolist()
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        with skipped.watch(MixedPrecision("16-mixed", "cpu", scaler), optimizer), steps_of(optimizer) as steps:
            scaler.step(optimizer)
        scaler.update()
        moved.append(weight.tolist() != before)
        assert has_stepped(steps) is moved[-1]
    assert moved == [True, False, True, False, False]
    assert skipped.count == 3
    skipped.count = 0
    assert skipped.count == 0


# -- accumulation and clipping -----------------------------------------------------------------------------------------


def _scheduled(mode: str) -> Any:
    lit = Lit()
    strategy = fit(
        lit,
        GradientAccumulationScheduler({0: 1, 1: 4}),
        knobs={"mode": mode, "balance": "equal"},
        slow=1.0 if mode == "sync" else 3.0,
    )
    return weights(lit), strategy.steps


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_of_accumulation(mode: str) -> None:
    (first, steps), (second, also_steps) = run(2, _scheduled, mode)
    assert first == second
    assert steps == also_steps == 15 + 4  # 15 batches an epoch; the last 3 of the second are a step of their own


class Clipped(Lit):
    """It looks at its gradients just before the optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))


def _clipped(mode: str) -> Any:
    lit = Clipped()
    slow = 1.0 if mode == "sync" else 3.0
    fit(lit, knobs={"mode": mode}, gradient_clip_val=0.1, slow=slow)
    return weights(lit), lit.norms


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", MODES)
def test_a_ranks_own_gradient_is_clipped(mode: str) -> None:
    (first, norms), (second, also_norms) = run(2, _clipped, mode)
    assert first == second
    assert max(norms + also_norms) <= 0.1 + 1e-6
