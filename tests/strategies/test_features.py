"""Lightning's features under a strategy whose ranks run free: each is used once, on two ranks of unequal speed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import IterableDataset, WeightedRandomSampler

from lightning_async import GossipRingStrategy, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run


def _fit(lit: L.LightningModule, data: Any = None, **options: Any) -> L.Trainer:
    faults = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    t = trainer(2, callbacks=[faults], **options)
    t.fit(lit, loader() if data is None else data, loader(10, shuffle=False))
    return t


def _accumulate() -> Any:
    lit = Lit()
    t = _fit(lit, accumulate_grad_batches=3, gradient_clip_val=0.5)
    return weights(lit), t.strategy.steps, len(lit.seen) // 4  # type: ignore[attr-defined]


def test_accumulation_and_clipping() -> None:
    (first, steps, batches), (second, _, _) = run(2, _accumulate)
    assert first == second
    assert batches / 3 <= steps <= batches / 3 + 2


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
    trainer(1, strategy=strategy, **options).fit(lit, loader(n=28), loader(10, shuffle=False))
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


def _bf16() -> Any:
    lit = Lit()
    _fit(lit, precision="bf16-mixed")
    return weights(lit), str(next(lit.parameters()).dtype)


def test_bf16_mixed_keeps_float32_weights() -> None:
    (first, dtype), (second, _) = run(2, _bf16)
    assert first == second
    assert dtype == "torch.float32"


def _double() -> Any:
    lit = Lit()
    _fit(lit, precision="64-true", gradient_clip_val=1.0)
    return weights(lit), str(next(lit.parameters()).dtype)


def test_64_true() -> None:
    (first, dtype), (second, _) = run(2, _double)
    assert first == second
    assert dtype == "torch.float64"


class Manual(Lit):
    """Two optimizers by hand, as a GAN does: one batch is one step all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        for optimizer in self.optimizers():
            loss = (self.layer(batch[1]) - batch[2]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        one, two = self.layer[0].parameters(), self.layer[2].parameters()
        return torch.optim.SGD(one, 0.01), torch.optim.Adam(two, 0.01)


def _manual() -> Any:
    lit = Manual()
    t = _fit(lit)
    return weights(lit), t.strategy.steps == lit.batches  # type: ignore[attr-defined]


def test_manual_optimisation_with_two_optimizers() -> None:
    (first, one_step_a_batch), (second, _) = run(2, _manual)
    assert first == second
    assert one_step_a_batch


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


def _workers(number: int) -> Any:
    lit = Lit()
    _fit(lit, loader(num_workers=number, persistent_workers=number > 0))
    return weights(lit), lit.seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("number", [0, 4])
def test_data_workers(number: int) -> None:
    (first, seen), (second, also_seen) = run(2, _workers, number)
    assert first == second
    assert set(Counter(seen + also_seen).values()) == {2}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 1000)
        for i in range(30):
            x = torch.randn(8, generator=generator)
            yield torch.tensor(i), x, x.sum().reshape(1)


def _stream() -> Any:
    lit = Lit()
    _fit(lit, torch.utils.data.DataLoader(Stream(), batch_size=4))
    return weights(lit)


def test_an_iterable_dataset_is_each_ranks_own() -> None:
    first, second = run(2, _stream)
    assert first == second


def _weighted() -> Any:
    sampler = WeightedRandomSampler([0.0] * 120 + [1.0] * 120, 240, generator=torch.Generator().manual_seed(1))
    lit = Lit()
    _fit(lit, loader(shuffle=False, sampler=sampler))
    return lit.seen


def test_a_users_sampler_decides() -> None:
    seen = [index for ranks in run(2, _weighted) for index in ranks]
    assert len(seen) == 480
    assert min(seen) >= 120


def _unequal_batches() -> Any:
    import os

    lit = Lit()
    _fit(lit, loader(batch_size=4 if os.environ["RANK"] == "0" else 12))
    return weights(lit), lit.seen


def test_unequal_batch_sizes() -> None:
    (first, seen), (second, also_seen) = run(2, _unequal_batches)
    assert first == second
    assert set(Counter(seen + also_seen).values()) == {2}


def _compiled() -> Any:
    lit = Lit()
    lit.layer.compile(backend="aot_eager")
    _fit(lit)
    return weights(lit)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile() -> None:
    first, second = run(2, _compiled, timeout=90)
    assert first == second


def _breaks_views() -> Any:
    class Breaks(Lit):
        def on_train_epoch_start(self) -> None:
            for p in self.parameters():
                p.data = p.data.clone()

    lit = Breaks()
    _fit(lit)
    return weights(lit)


def test_broken_views_are_mended() -> None:
    first, second = run(2, _breaks_views)
    assert first == second


def _fast_dev_run() -> Any:
    lit = Lit()
    _fit(lit, fast_dev_run=2)
    return weights(lit), len(lit.seen)


@pytest.mark.filterwarnings("ignore")
def test_fast_dev_run() -> None:
    (first, seen), (second, also_seen) = run(2, _fast_dev_run)
    assert first == second
    assert seen == also_seen == 8


class TwoSets(Lit):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def _several_validation_loaders() -> Any:
    lit = TwoSets()
    _fit_with(lit, [loader(10, shuffle=False), loader(20, shuffle=False)])
    return weights(lit), lit.seen


def _fit_with(lit: L.LightningModule, validation: Any, **options: Any) -> None:
    t = trainer(2, callbacks=[SpeedFaults(step_seconds=0.002, slow={1: 3.0})], **options)
    t.fit(lit, loader(), validation)


def _no_validation(options: dict[str, Any]) -> Any:
    lit = Lit()
    _fit_with(lit, None if not options else loader(10, shuffle=False), **options)
    return weights(lit), lit.seen


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}, {"reload_dataloaders_every_n_epochs": 1}])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_without_validation_and_with_reloaded_loaders(options: dict[str, Any]) -> None:
    (first, seen), (second, also_seen) = run(2, _no_validation, options)
    assert first == second
    assert set(Counter(seen + also_seen).values()) == {2}


def test_several_validation_loaders() -> None:
    (first, seen), (second, also_seen) = run(2, _several_validation_loaders)
    assert first == second
    assert set(Counter(seen + also_seen).values()) == {2}


class Pair(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"], batch_idx)


def _two_training_loaders() -> None:
    _fit(Pair(), CombinedLoader({"a": loader(), "b": loader()}, "min_size"))


def test_two_training_loaders_are_refused() -> None:
    with Forked(2, _two_training_loaders) as forked:
        results = forked.results(30)
    assert all("several training loaders cannot be shared out" in r.error for r in results)
