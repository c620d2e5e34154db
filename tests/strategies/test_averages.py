"""Averages over time: what is validated, saved and left at the end is the average of the consensus, on every rank."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_async import AsyncGlobalStrategy, AsyncStrategy, CyclicDelayStrategy, LazySignStrategy, SpeedFaults
from lightning_async.strategies import compat
from lightning_async.strategies.averages import mean_of_averages, miss_no_step
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run

MODES = [("pairwise", "adopt"), ("pairwise", "keep"), ("push_sum", "adopt"), ("sync", "keep"), ("none", "keep")]
DECAY = 0.9


class Trace(Callback):
    """The trainable weights, wherever it is worth knowing."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.epochs: list[list[float]] = []
        self.consensus: list[list[float]] = []
        self.validated: list[list[float]] = []
        self.resumed: list[list[float]] = []
        self.own: list[list[float]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}  # not Lightning's `log`

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.epochs.append(flat(module))

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.resumed.append(flat(module))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.steps.append(flat(module))

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.consensus.append(flat(module))
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        own = strategy.replica._own
        self.own.append(flat(module) if own is None else own.tolist())

    def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.validated.append(flat(module))


def flat(module: nn.Module) -> list[float]:
    return [float(x) for p in module.parameters() for x in p.detach().flatten()]


def fit(*callbacks: Callback, slow: float = 3.0, lit: Lit | None = None, **options: Any) -> Any:
    torch.manual_seed(int(os.environ["RANK"]))  # the ranks' averages begin unequal too
    lit = Lit() if lit is None else lit
    trace = Trace()
    faults = [SpeedFaults(step_seconds=0.002, slow={1: slow})] if slow > 1 else []
    validation = options.pop("validation", True)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **options}
    t = trainer(options.pop("n", 2), callbacks=[*faults, *callbacks, trace], **options)
    t.fit(lit, loader(8), loader(40, shuffle=False) if validation else None)
    return t, lit, trace


# -- the law ---------------------------------------------------------------------------------------------------------


def _ema_in_step() -> Any:
    _, lit, trace = fit(EMAWeightAveraging(decay=DECAY), slow=1, knobs={"mode": "sync"})
    return trace.steps, flat(lit)


def test_the_average_is_that_of_the_consensus() -> None:
    """Ranks that go in step: to rounding, the average that one rank would have kept of the mean of their weights."""
    (first, end), (second, same) = run(2, _ema_in_step)
    assert end == same
    path = torch.tensor([first, second], dtype=torch.float64).mean(0)
    average = path[0]
    for mean in path[1:]:
        average = DECAY * average + (1 - DECAY) * mean
    torch.testing.assert_close(torch.tensor(end).double(), average, rtol=1e-5, atol=1e-5)
    assert float((average - path[-1]).abs().max()) > 1e-2  # it is not the weights


def averaged(steps: int) -> tuple[nn.Module, AveragedModel]:
    """A module that is the same for all by now, and one member's average of what it was."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = AveragedModel(module, use_buffers=True)
    for p in module.parameters():
        nn.init.ones_(p)
    for _ in range(steps):
        nn.init.normal_(module[0].weight)
        average.update_parameters(module)
    nn.init.ones_(module[0].weight)
    return module, average


def meet(parts: list[tuple[nn.Module, AveragedModel]]) -> VirtualCluster:
    cluster = VirtualCluster(len(parts))
    cluster.run(
        {r: mean_of_averages(a, m, Rounds(cluster.carriers[r])) for r, (m, a) in enumerate(parts)}  # type: ignore[misc]
    )
    return cluster


def test_only_averages_that_have_begun_count() -> None:
    parts = [averaged(0), averaged(5), averaged(9)]
    wanted = torch.tensor([flat(average) for _, average in parts[1:]]).mean(0)
    meet(parts)
    for _, average in parts:
        torch.testing.assert_close(torch.tensor(flat(average)), wanted, rtol=1e-6, atol=1e-7)
        assert int(average.n_averaged) == 9


def test_where_none_has_begun_the_first_members_is_taken() -> None:
    parts = [averaged(0), averaged(0)]
    wanted = flat(parts[0][1])
    meet(parts)
    assert all(flat(average) == wanted for _, average in parts)


def test_what_was_always_frozen_does_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    exchange = Rounds.exchange

    def counted(self: Rounds, tensor: torch.Tensor, *args: Any) -> Any:
        sent.append(tensor.numel())
        return exchange(self, tensor, *args)

    monkeypatch.setattr(Rounds, "exchange", counted)
    torch.manual_seed(1)
    body = nn.Linear(100, 100)
    parts = []
    for _ in range(2):
        module = nn.Sequential(copy.deepcopy(body), nn.Linear(1, 1))
        average = AveragedModel(module)
        average.update_parameters(module)
        with torch.no_grad():
            module[1].weight.fill_(7.0)
        parts.append((module, average))
    meet(parts)
    assert max(sent) < 10


# -- WeightAveraging ---------------------------------------------------------------------------------------------------


class Own(Callback):
    """This rank's average as it stood behind its last batch before each validation, for which all become equal."""

    def __init__(self, ema: WeightAveraging) -> None:
        self.ema, self.last = ema, list[float]()
        self.averages: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        average = compat.average_of(self.ema)
        assert average is not None
        self.last = flat(average)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.averages.append(self.last)


def _ema(mode: str, at_meeting: str, folder: str) -> dict[str, Any]:
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    ema = EMAWeightAveraging(decay=DECAY, update_every_n_steps=2)
    own, knobs = Own(ema), {"mode": mode, "at_meeting": at_meeting}
    t, lit, trace = fit(ema, own, saved, knobs=knobs, enable_checkpointing=True, slow=1 if mode == "sync" else 3)
    return {"trace": trace, "own": own.averages, "end": weights(lit), "val": float(t.callback_metrics["val"])}


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("mode", "at_meeting"), MODES)
def test_ema_is_validated_saved_and_left_equal_on_all_ranks(mode: str, at_meeting: str, tmp_path: Path) -> None:
    first, second = run(2, _ema, mode, at_meeting, str(tmp_path))
    assert first["end"] == second["end"]
    assert first["val"] == second["val"]
    one, other = first["trace"], second["trace"]
    batches = len(one.validated) // 3
    for epoch in range(3):
        shown = one.validated[epoch * batches]
        assert shown == other.validated[epoch * batches]
        assert shown != one.consensus[epoch]
        both = torch.tensor([first["own"][epoch], second["own"][epoch]])
        torch.testing.assert_close(torch.tensor(shown), both.mean(0), rtol=1e-6, atol=1e-7)
        assert mode == "sync" or float((both[0] - both[1]).abs().max()) > 1e-4, "each rank averaged its own weights"
        for trace in (one, other):
            assert trace.consensus[epoch] == one.consensus[epoch]
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        names = [name for name, _ in Lit().named_parameters()]
        assert torch.cat([saved["state_dict"][name].flatten() for name in names]).tolist() == shown
        current = torch.cat([saved["current_model_state"][name].flatten() for name in names])
        assert current.tolist() == one.consensus[epoch]
    for trace in (one, other):  # training goes on with weights, not with averages
        for epoch in (1, 2):
            before = trace.consensus[epoch - 1] if at_meeting == "adopt" else _unpadded(trace.own[epoch - 1])
            assert trace.resumed[epoch] == before


def _unpadded(own: list[float]) -> list[float]:
    """A replica's flat vector without its padding: each parameter begins at a multiple of 16."""
    values: list[float] = []
    for p in Lit().parameters():
        values += own[: p.numel()]
        own = own[-(-p.numel() // 16) * 16 :]
    return values


def _late(kind: str) -> Any:
    late = EMAWeightAveraging(update_starting_at_step=20) if kind == "step" else Epochs()
    t, lit, _ = fit(late, knobs={}, slow=4.0, num_sanity_val_steps=2)
    left = weights(lit)
    t.validate(lit, loader(40, shuffle=False), verbose=False)
    return left, float(t.callback_metrics["val"]), weights(lit) == left


class Epochs(WeightAveraging):
    """The plain mean of the weights at the ends of epochs."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_averages_that_begin_late_or_by_epochs(kind: str) -> None:
    first, second = run(2, _late, kind)
    assert first == second
    assert first[2]  # another stage leaves what it found


class Held(Callback):
    """What of averages each rank would save, what it begins with, and at which steps it averaged."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, list[float]]] = []
        self.began: list[list[float]] = []
        self.steps: list[tuple[int, int]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        average = compat.average_of(_ema_of(trainer))
        assert average is not None
        self.began = [flat(average), flat(module)]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.steps.append((trainer.global_step, compat.averaged_until(_ema_of(trainer))))

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved.append((trainer.global_step, flat_of(checkpoint["state_dict"])))


def _ema_of(trainer: L.Trainer) -> WeightAveraging:
    return next(c for c in compat.callbacks(trainer) if isinstance(c, WeightAveraging))


def flat_of(state: dict[str, torch.Tensor]) -> list[float]:
    return torch.cat([state[name].flatten() for name, _ in Lit().named_parameters()]).tolist()


def _saves_midway(at_meeting: str, folder: str, resume: str | None) -> Any:
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    held = Held()
    ema = EMAWeightAveraging(decay=DECAY, update_every_n_steps=7)
    faults = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    lit, options = Lit(), {"max_epochs": 3, "enable_checkpointing": True, "limit_val_batches": 0}
    t = trainer(2, knobs={"at_meeting": at_meeting}, callbacks=[faults, ema, held, save], **options)
    t.fit(lit, loader(8), ckpt_path=resume)
    return held.saved, held.began, held.steps, flat(lit)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The dirpath has changed")
@pytest.mark.few(0)
@pytest.mark.parametrize("at_meeting", ["adopt", "keep"])
def test_a_file_of_mid_epoch_holds_the_average_of_all_ranks(at_meeting: str, tmp_path: Path) -> None:
    first, second = run(2, _saves_midway, at_meeting, str(tmp_path), None)
    assert first[0] == second[0]
    assert len(first[0]) == 2
    files = [torch.load(path := tmp_path / f"step={step}.ckpt", weights_only=True) for step, _ in reversed(first[0])]
    for file, (_, saved) in zip(files, reversed(first[0]), strict=True):
        assert flat_of(file["state_dict"]) == saved
        assert flat_of(file["current_model_state"]) != saved
    resumed = run(2, _saves_midway, at_meeting, str(tmp_path / "resumed"), str(path))
    for saved, began, _, end in resumed:
        assert began == [first[0][0][1], flat_of(files[-1]["current_model_state"])]
        assert saved == resumed[0][0]
        assert end == resumed[0][3]
    for _, _, steps, _ in (first, second):
        top = 0
        for now, averaged in steps:
            if now > top:  # a meeting may find a few steps less than were foreseen
                assert (averaged == now) is any(step % 7 == 0 for step in range(top, now))
                top = now


def test_no_step_is_missed_that_a_batch_of_a_slow_rank_takes_with_others() -> None:
    ema = EMAWeightAveraging(update_every_n_steps=4, update_starting_at_step=5)
    alone = EMAWeightAveraging(update_every_n_steps=4, update_starting_at_step=5)
    t = L.Trainer(callbacks=[ema], logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    leash = compat.Leash(t)
    miss_no_step(t, leash)
    steps = [2, 5, 6, 9, 10, 9, 11, 12, 18, 19]
    assert [step for step in steps if ema.should_update(step_idx=step)] == [9, 12, 18]
    assert [step for step in steps if alone.should_update(step_idx=step)] == [12]
    assert not ema.should_update(epoch_idx=3)
    leash.restore()
    assert not ema.should_update(step_idx=21)


# -- StochasticWeightAveraging -----------------------------------------------------------------------------------------


class NoNorm(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.layer[1] = nn.Identity()


def _swa(mode: str, at_meeting: str, norm: bool, validation: bool, balance: str) -> Any:
    knobs = {"mode": mode, "at_meeting": at_meeting, "balance": balance}
    lit = Lit() if norm else NoNorm()
    return _averaged(lit=lit, slow=1.0 if mode == "sync" else 3.0, validation=validation, knobs=knobs)


def _averaged(**options: Any) -> Any:
    swa = StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=2, annealing_epochs=1)
    t, lit, trace = fit(swa, max_epochs=4, **options)
    rates = [group["lr"] for group in t.optimizers[0].param_groups]
    return {
        "end": weights(lit),
        "flat": flat(lit),
        "epochs": trace.epochs,
        "rates": rates,
        "length": t.fit_loop.max_batches,
        "epoch": t.current_epoch,
    }


def _scaled() -> Any:
    swa = StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=1)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    t, lit, trace = fit(swa, n=1, slow=1, max_epochs=2, validation=False, plugins=[plugin])
    assert isinstance(t.strategy, AsyncStrategy)
    return flat(lit), trace.epochs, t.strategy.steps, len(trace.steps)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:Detected call of `lr_scheduler.step")
def test_the_epoch_that_takes_statistics_steps_nothing_under_fp16s_scaler_too() -> None:
    """Lightning asks for a step behind its last batch, and the scaler has seen no gradients."""
    ((end, epochs, steps, batches),) = run(1, _scaled)
    assert steps == 2 * batches // 3
    mean = torch.tensor(epochs[:2]).mean(0)
    torch.testing.assert_close(torch.tensor(end), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("mode", "at_meeting", "validation", "norm"),
    [(*mode, True, True) for mode in MODES] + [("pairwise", "keep", False, True), ("pairwise", "keep", True, False)],
)
def test_swa_leaves_the_mean_of_the_consensus_over_its_epochs(
    mode: str, at_meeting: str, validation: bool, norm: bool
) -> None:
    balance = "equal" if mode == "sync" else "claim"
    first, second = run(2, _swa, mode, at_meeting, norm, validation, balance)
    assert first["end"] == second["end"]
    assert first["rates"] == second["rates"]
    assert first["epoch"] == second["epoch"] == (5 if norm else 4)
    assert first["epochs"] == second["epochs"]
    mean = torch.tensor(first["epochs"][1:4]).mean(0)
    torch.testing.assert_close(torch.tensor(first["flat"]), mean, rtol=1e-5, atol=1e-6)
    assert first["length"] == float("inf")  # shared data have no length, and have none again


SERVED = {
    "async_global": lambda: AsyncGlobalStrategy(outer_lr=0.7, outer_momentum=0.5),
    "cyclic_delay": lambda: CyclicDelayStrategy(push="gradient"),
    "lazy_sign": lambda: LazySignStrategy(compress="gradient", min_size=1),
}
"""Methods that know of weights, or of gradients, beside what the replicas hold."""


def _swa_beside(name: str) -> Any:
    return _averaged(strategy=SERVED[name](), slow=1.0 if name == "lazy_sign" else 3.0)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SERVED)
def test_swa_is_left_where_a_method_knows_of_other_weights(name: str) -> None:
    first, second = run(2, _swa_beside, name)
    assert first["end"] == second["end"]
    assert first["epochs"] == second["epochs"]
    mean = torch.tensor(first["epochs"][1:4]).mean(0)
    torch.testing.assert_close(torch.tensor(first["flat"]), mean, rtol=1e-5, atol=1e-6)
