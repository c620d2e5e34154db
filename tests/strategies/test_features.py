"""What docs/features.md has no row for: what an algorithm sees, unusual modules, data workers that stay."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_async import GossipRingStrategy, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run


def _fit(lit: L.LightningModule, data: Any = None, **options: Any) -> L.Trainer:
    faults = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    t = trainer(2, callbacks=[faults], **options)
    t.fit(lit, loader() if data is None else data, loader(40, shuffle=False))
    return t


def _what_the_algorithm_sees() -> Any:
    told: list[tuple[str, int, float]] = []

    class Telling(Lit):
        def tell(self, who: str, step: int = 0) -> None:
            told.append((who, step, float(self.layer[2].weight.grad.norm())))  # type: ignore[union-attr, operator]

        def on_after_backward(self) -> None:
            self.tell("backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.tell("hook")

    lit, strategy = Telling(), GossipRingStrategy(mode="none")

    def before_step(replica: Any, mail: Any, step: int) -> Any:
        lit.tell("algorithm", step)
        yield from ()
        lit.layer[2].weight.grad.mul_(0.5)  # type: ignore[union-attr, operator]
        return []

    strategy.algorithm.before_step = before_step  # type: ignore[method-assign]
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 1e-3, "max_epochs": 1}
    trainer(1, strategy=strategy, **options).fit(lit, loader(n=28), loader(40, shuffle=False))
    return told


def test_an_algorithm_sees_the_accumulated_gradients_first() -> None:
    """Once a step, after backward, and before Lightning's hook and clipping, which see what it leaves."""
    (told,) = run(1, _what_the_algorithm_sees)
    whole, rest = ["backward"] * 3 + ["algorithm", "hook"], ["backward", "algorithm", "hook"]
    assert [who for who, _, _ in told] == whole + whole + rest
    assert [number for who, number, _ in told if who == "algorithm"] == [1, 2, 3]
    for (_, _, before), (who, _, seen), (_, _, after) in zip(told, told[1:], told[2:], strict=False):
        if who == "algorithm":
            assert seen == before > 1e-3
            assert after == seen / 2


class Groups(Lit):
    """Parameter groups, a frozen layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.layer[0].weight

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [self.layer[0].weight], "lr": 0.01, "weight_decay": 0.1},
            {"params": self.layer[2].parameters()},
        ]
        return torch.optim.AdamW(groups, lr=0.02)


def _groups() -> Any:
    torch.manual_seed(3)
    lit = Groups()
    before = weights(lit.frozen)  # type: ignore[arg-type]
    _fit(lit)
    return weights(lit), weights(lit.frozen) == before, lit.tied.weight is lit.layer[0].weight  # type: ignore[arg-type]


def test_parameter_groups_frozen_and_tied_weights() -> None:
    (first, frozen_stays, still_tied), (second, _, _) = run(2, _groups)
    assert first == second
    assert frozen_stays
    assert still_tied


def _workers() -> Any:
    lit = Lit()
    _fit(lit, loader(num_workers=4, persistent_workers=True))
    return weights(lit), lit.seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.few(0)
def test_data_workers_that_stay() -> None:
    (first, seen), (second, also_seen) = run(2, _workers)
    assert first == second
    assert set(Counter(seen + also_seen).values()) == {2}


class LogsLater(Lit):
    """torch 2.13 cannot trace Lightning's `log` in a compiled `training_step`, under `"auto"` neither."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": (self.layer(batch[1]) - batch[2]).square().mean()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train", outputs["loss"], on_step=True)


class Own(nn.Sequential):
    """A layer of the user's: of torch's own `nn.Sequential` dynamo compiles nothing by `layer.compile()`."""

    def forward(self, x: Any) -> Any:
        return super().forward(x)


def _compiled(what: str, backend: str, cache: Path) -> Any:
    from torch._inductor import config  # takes a second

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    config.compile_threads, config.cpp_cache_precompile_headers = 1, False  # those lie elsewhere, wherever the cache is
    lit = Lit() if what == "layer" else LogsLater()
    before = weights(lit)
    if what == "layer":
        lit.layer = Own(*lit.layer)
        lit.layer.compile(backend=backend)
        _fit(lit)
    else:
        _fit(torch.compile(lit, backend=backend))  # type: ignore[arg-type]  # Lightning takes what it makes
    from torch._dynamo.utils import counters

    return weights(lit) != before, counters["stats"]["unique_graphs"] > 0, weights(lit)


@pytest.mark.few(0)
@pytest.mark.parametrize(("what", "backend"), [("layer", "aot_eager"), ("module", "aot_eager"), ("layer", "inductor")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile(what: str, backend: str, tmp_path: Path) -> None:
    """`"inductor"` is the default: a dozen seconds of a C++ compiler's."""
    if backend == "inductor" and shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        pytest.skip(f'backend="inductor" needs a C++ compiler, and there is no {compiler}')
    first, second = run(2, _compiled, what, backend, tmp_path, timeout=300 if backend == "inductor" else 90)
    assert first == second
    assert first[:2] == (True, True)
    assert bool([*tmp_path.rglob("*.so")]) == (backend == "inductor")


def _breaks_views() -> Any:
    class Breaks(Lit):
        def on_train_epoch_start(self) -> None:
            for p in self.parameters():
                p.data = p.data.clone()

    lit = Breaks()
    _fit(lit)
    return weights(lit)


@pytest.mark.few(0)
def test_broken_views_are_mended() -> None:
    first, second = run(2, _breaks_views)
    assert first == second
