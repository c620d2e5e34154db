"""On real ranks: with whole numbers it is ddp, weights are equal everywhere at every step, nobody is left waiting."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import LazySignStrategy
from lightning_async.callbacks import SpeedFaults
from lightning_async.cli import main
from tests.cli import recorded
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, Saves, samples, seed
from tests.strategies.resumable import held_out as held_out_samples


class Plain(Lit):
    """Without BatchNorm, whose statistics ddp takes from rank 0, and with an optimizer of the test's choice."""

    def __init__(self, optimizer: str = "sgd", **options: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.optimizer, self.options = optimizer, {"lr": 0.002, **options}

    def configure_optimizers(self) -> Any:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        return kinds[self.optimizer](self.parameters(), **self.options)


class Watches(Callback):
    """A fingerprint of the weights after every batch, and of which parameters something is held back at the end."""

    def __init__(self) -> None:
        self.prints: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *arguments: Any) -> None:
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        self.prints.append(hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:12])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if isinstance(strategy := trainer.strategy, LazySignStrategy) and trainer.world_size > 1:
            parts = strategy.replica.parts(strategy.algorithm.signs.rest.vector)
            named = zip(module.named_parameters(), parts, strict=True)
            self.held = {name for (name, _), part in named if part.any()}


def own_share(n: int, batch_size: int) -> DataLoader[Any]:
    """This rank's samples, chosen by the test and not by a sampler."""
    mine = slice(int(os.environ["RANK"]), None, n)
    return DataLoader(TensorDataset(torch.arange(240)[mine], INPUTS[mine], TARGETS[mine]), batch_size=batch_size)


def held_out() -> DataLoader[Any]:
    return loader(40, shuffle=False)


def _fit(
    n: int, knobs: dict[str, Any] | None, module: dict[str, Any], batch: int, options: dict[str, Any]
) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]) if knobs is not None else 0)
    lit, watches = Plain(**module), Watches()
    if knobs is not None and os.environ["RANK"] == "0":
        torch.manual_seed(0)
        lit = Plain(**module)
    strategy = "ddp" if knobs is None else LazySignStrategy(**knobs)
    t = trainer(n, strategy=strategy, callbacks=[watches], use_distributed_sampler=False, **options)
    t.fit(lit, own_share(n, batch), held_out())
    end = {"weights": weights(lit), "prints": watches.prints, "val": float(t.callback_metrics["val"])}
    return end | ({"held": watches.held} if hasattr(watches, "held") else {})


def fit(
    n: int, knobs: dict[str, Any] | None, module: dict[str, Any] | None = None, batch: int = 8, **options: Any
) -> list[Any]:
    return run(n, _fit, n, knobs, module or {}, batch, options)


@cache
def by_ddp(n: int, **module: Any) -> list[float]:
    """The weights with which ddp ends."""
    end: list[float] = fit(n, None, module)[0]["weights"]
    return end


WHOLE: dict[str, Any] = {"compressor": "none"}
pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")


# -- the limit: ddp ----------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("module", [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"optimizer": "adamw"}])
@pytest.mark.parametrize("form", ["gather", "slices"])
def test_whole_gradients_on_two_ranks_are_ddp_to_the_bit(form: str, module: dict[str, Any]) -> None:
    mine = fit(2, {**WHOLE, "compress": "gradient", "form": form}, module)
    assert mine[0]["weights"] == by_ddp(2, **module)


@pytest.mark.few(0)
@pytest.mark.parametrize(("precision", "rounding"), [("32-true", 1e-6), ("64-true", 1e-13)])
@pytest.mark.parametrize("compress", ["update", "gradient"])
def test_whole_numbers_on_three_ranks_are_ddp_to_rounding(compress: str, precision: Any, rounding: float) -> None:
    """Weights are about 1, and each of 30 steps rounds: some of 6e-8, or of 1e-16."""
    module = {"momentum": 0.9}
    mine = fit(3, {**WHOLE, "compress": compress}, module, precision=precision)[0]["weights"]
    by_ddp = fit(3, None, module, precision=precision)[0]["weights"]
    assert mine == pytest.approx(by_ddp, rel=rounding, abs=rounding)


def test_one_rank_is_plain_training_to_the_bit() -> None:
    assert fit(1, {})[0]["weights"] == fit(1, None)[0]["weights"]


# -- signs -------------------------------------------------------------------------------------------------------------

SIGNS: dict[str, Any] = {"min_size": 0, "block": 16, "history": 5, "max_skip": 3}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "knobs"),
    [
        (2, {"rule": "always", "exact": ["layer.0.*", "*.2.bias"]}),
        (3, {"rule": "always", "compress": "gradient", "form": "slices"}),
        (3, {"rule": "accumulate"}),
        (2, {"rule": "innovation", "form": "slices", "compress": "gradient"}),
        (3, {"rule": "paper"}),
        (2, {"rule": "periodic", "scale": "tensor"}),
    ],
)
def test_weights_are_the_same_everywhere_at_every_step(n: int, knobs: dict[str, Any]) -> None:
    ends = fit(n, {**SIGNS, **knobs}, {"momentum": 0.5}, max_epochs=2)
    assert len(ends[0]["prints"]) == 2 * 240 // n // 8
    for end in ends[1:]:
        assert end["prints"] == ends[0]["prints"]
        assert end["val"] == ends[0]["val"]
    assert len(set(ends[0]["prints"])) >= len(ends[0]["prints"]) // 4
    if "exact" in knobs:  # what travels whole leaves nothing
        assert all(end["held"] == {"layer.2.weight"} for end in ends)


@pytest.mark.few(0)
def test_it_learns_what_ddp_learns() -> None:
    module = {"optimizer": "adam", "lr": 0.01}
    ends = {name: fit(2, knobs, module, 4, max_epochs=6)[0]["val"] for name, knobs in (("ddp", None), ("signs", SIGNS))}
    untrained = float(TARGETS.square().mean())
    assert ends["signs"] < 0.1 * untrained
    assert ends["signs"] < 1.5 * ends["ddp"]


# -- what stops a run stops it everywhere, in words --------------------------------------------------------------------


def _uneven(n: int) -> str:
    rank = int(os.environ["RANK"])
    data = TensorDataset(torch.arange(40), INPUTS[:40], TARGETS[:40])
    t = trainer(n, strategy=LazySignStrategy(**SIGNS), use_distributed_sampler=False, max_epochs=1)
    try:
        t.fit(Plain(), DataLoader(data, batch_size=4 + 4 * rank), held_out())
    except RuntimeError as error:
        return str(error)
    return ""


def test_unequal_numbers_of_batches_are_told_at_once() -> None:
    said = run(2, _uneven, 2)
    assert any("no more batches in this epoch" in words or "different numbers of rounds" in words for words in said)
    assert all(said)


def _dies(n: int) -> str:
    class Dies(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
            if trainer.global_step == 5 and trainer.global_rank == n - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    strategy = LazySignStrategy(**SIGNS, silence=0.5, patience=5.0)
    try:
        trainer(n, strategy=strategy, callbacks=[Dies()]).fit(Plain(), loader(), held_out())
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_dead_rank_stops_the_others_with_a_sentence() -> None:
    with Forked(3, _dies, 3, store=True) as forked:
        results = forked.results(60)
    assert [r.kind for r in results] == [None, None, "gone"]
    assert any("rank 2 is gone, and lazy_sign cannot go on without it" in r.value for r in results[:2])
    assert all(r.value for r in results[:2])


class Explodes(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (float("nan") if batch_idx == 7 and self.trainer.global_rank == 1 else 1.0)


def _explodes(n: int) -> str:
    try:
        trainer(n, strategy=LazySignStrategy(**SIGNS)).fit(Explodes(), loader(), held_out())
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_nan_stops_the_run_before_it_is_fed_back() -> None:
    said = run(2, _explodes, 2)
    assert all("of rank 1 in round 8 has a NaN or an infinity" in words for words in said)


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"rule": "sometimes"}, "`rule` must be one of 'always', 'accumulate', 'periodic', 'paper', 'innovation'"),
        ({"compress": "weights"}, "`compress` must be one of 'update', 'gradient', got 'weights'"),
        ({"compressor": "top-k"}, "`compressor` must be one of 'sign', 'none', got 'top-k'"),
        ({"scale": "row"}, "`scale` must be one of 'block', 'tensor', 'global', got 'row'"),
        ({"form": "ring"}, "`form` must be one of 'auto', 'slices', 'gather', got 'ring'"),
        ({"news": "none"}, "`news` must be one of 'change', 'backlog', got 'none'"),
        ({"block": 12}, "`block` must be a multiple of 8, got 12"),
        ({"stretch": 2}, "`stretch` must be above 0 and below 2, where what is held back would grow, got 2"),
        ({"stretch": 0.0}, "`stretch` must be above 0 and below 2"),
        ({"block": 0}, "`block` must be an integer of at least 8, got 0"),
        ({"min_size": -1}, "`min_size` must be an integer of at least 0, got -1"),
        ({"history": 0}, "`history` must be an integer of at least 1, got 0"),
        ({"history": 2, "history_weights": [1.0]}, "`history_weights` must be a list of 2 numbers of at least 0"),
        ({"history": 2, "history_weights": [0, 0]}, "`history_weights` must be .* not all 0, or None for all alike"),
        ({"max_skip": 1.5}, "`max_skip` must be an integer of at least 0, got 1.5"),
        ({"ahead": True}, "`ahead` must be an integer of at least 0, got True"),
        ({"ahead": 9}, "`ahead` must be at most 8 rounds, got 9"),
        ({"warm_up": -1}, "`warm_up` must be an integer of at least 0, got -1"),
        ({"threads": 0}, "`threads` must be an integer of at least 1, got 0"),
        ({"threshold": -0.1}, "`threshold` must be a number of at least 0, got -0.1"),
        ({"threshold": float("nan")}, "`threshold` must be a number of at least 0, got nan"),
        ({"error_weight": "3"}, "`error_weight` must be a number of at least 0, got '3'"),
        ({"deadline": -1}, "`deadline` must be a number of seconds of at least 0, or None for no deadline, got -1"),
        ({"deadline": 0.1, "rule": "paper"}, "`deadline` goes with rule='always' alone, got 'paper'"),
        ({"exact": "bias"}, "`exact` must be a list of names, got 'bias': write \\['bias'\\]"),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LazySignStrategy(**knobs)


SCALED = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.layer[0].parameters(), 0.1), torch.optim.SGD(self.layer[2].parameters(), 0.1)]


@pytest.mark.parametrize(
    ("module", "knobs", "options", "sentence"),
    [
        (Plain, {"exact": ["head.*"]}, {}, "`exact` names 'head.\\*', and no trainable parameter is called that"),
        (TwoOptimizers, {"compress": "gradient"}, {}, "goes by one optimizer, and there are 2"),
        (Plain, {"compress": "gradient"}, {"plugins": [SCALED]}, "use compress='update', or precision='bf16-mixed'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    module: type[Plain], knobs: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer(1, strategy=LazySignStrategy(**knobs), **options).fit(module(), loader(), held_out())


@pytest.mark.parametrize(
    ("knobs", "module", "warned"),
    [
        (
            {"compress": "gradient"},
            {"momentum": 0.9},
            "averages them with a momentum of 0.9: what signs miss counts 10 ",
        ),
        ({"compress": "gradient"}, {"optimizer": "adamw"}, "use compress='update', the default"),
        ({"compress": "gradient"}, {"momentum": 0.5}, None),
        ({"compress": "gradient", **WHOLE}, {"momentum": 0.9}, None),
        ({}, {"momentum": 0.9}, None),
    ],
)
def test_signs_of_gradients_are_warned_of_where_momentum_averages_them(
    knobs: dict[str, Any], module: dict[str, Any], warned: str | None
) -> None:
    t = trainer(1, strategy=LazySignStrategy(**knobs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(Plain(**module), loader(n=24), held_out())
    said = [str(w.message) for w in caught if "sends signs of gradients" in str(w.message)]
    assert len(said) == (warned is not None)
    assert all(warned is not None and warned in words for words in said)


# -- a deadline --------------------------------------------------------------------------------------------------------


class Adds(Plain):
    """Adds up what its optimizer has done."""

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        before = _flat(self)
        super().optimizer_step(*arguments, **options)
        self.moved = getattr(self, "moved", torch.zeros_like(before)) + _flat(self) - before


def _flat(module: L.LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class ByRound(Callback):
    """A fingerprint of the weights by epoch and round, and what is held back at the end."""

    def __init__(self) -> None:
        self.prints: dict[tuple[int, int], str] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *arguments: Any) -> None:
        where = (trainer.current_epoch, trainer.strategy.algorithm.late.round)
        self.prints[where] = hashlib.sha256(_flat(module).numpy().tobytes()).hexdigest()[:12]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy = trainer.strategy
        state = strategy.algorithm.state_dict()
        held, served = state["rest"] / trainer.world_size, state["exchange"]
        held[served["base"] : served["base"] + served["rest"].numel()] += served["rest"]
        self.held = torch.cat([part.flatten() for part in strategy.replica.parts(held)])


def _slow(n: int, deadline: float, slow: dict[int, float]) -> dict[str, Any]:
    torch.manual_seed(0)
    lit, rounds = Adds(), ByRound()
    start = _flat(lit)
    strategy = LazySignStrategy(**SIGNS, deadline=deadline)
    faults = SpeedFaults(step_seconds=0.02, slow=slow)
    t = trainer(n, strategy=strategy, callbacks=[rounds, faults], max_epochs=2)
    t.fit(lit, loader(), held_out())
    return {
        "prints": rounds.prints,
        "seen": lit.seen,
        "end": (_flat(lit) - start).tolist(),
        "moved": lit.moved.tolist(),
        "held": rounds.held.tolist(),
        "missed": strategy.algorithm.skipped,
    }


def test_rounds_close_without_a_slow_rank_and_what_it_sends_counts_when_it_comes() -> None:
    n = 3
    ends = run(n, _slow, n, 0.0, {2: 8.0})
    prints: dict[tuple[int, int], str] = {}
    for end in ends:
        assert all(prints.setdefault(where, one) == one for where, one in end["prints"].items())
        assert end["end"] == ends[0]["end"]
    assert sorted(index for end in ends for index in end["seen"]) == sorted(2 * list(range(240)))
    assert len(ends[2]["seen"]) < len(ends[0]["seen"])
    assert ends[2]["missed"] > 0
    moved = sum(torch.tensor(end["moved"]) for end in ends) / n
    held = sum(torch.tensor(end["held"]) for end in ends)
    torch.testing.assert_close(torch.tensor(ends[0]["end"]) + held, moved, rtol=1e-5, atol=1e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _through(n: int, knobs: dict[str, Any], path: str, resume: bool) -> Any:
    """The losses from the save on and the end, of a run that goes through or of one that begins there."""
    seed()
    lit, save = Draws(), Saves(path, "batch", epoch=1, batch=4)
    t = trainer(n, strategy=LazySignStrategy(**knobs), max_epochs=3, callbacks=[save])
    seen: list[float] = []
    begin = t.strategy.on_train_start
    t.strategy.on_train_start = lambda: (begin(), seen.append(float(t.strategy.algorithm.signs.rest.vector.norm())))[0]
    t.fit(lit, samples(), held_out_samples(), ckpt_path=path if resume else None)
    return lit.losses if resume else lit.losses[save.losses :], weights(lit), seen[0]


@pytest.mark.few(0)
@pytest.mark.parametrize("rule", ["always", "accumulate", "innovation"])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(rule: str, tmp_path: Path) -> None:
    path, knobs = str(tmp_path / "x.ckpt"), {**SIGNS, "rule": rule, "form": "slices"}
    through, resumed = run(2, _through, 2, knobs, path, False), run(2, _through, 2, knobs, path, True)
    for one, other in zip(through, resumed, strict=True):
        assert len(one[0]) > 5
        assert one[:2] == other[:2]


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*the run does not go on to the bit")
def test_a_resumed_run_with_more_ranks_takes_over_what_was_held_back(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    run(2, _through, 2, SIGNS, path, False)
    ends = run(3, _through, 3, SIGNS, path, True)
    assert [end[2] > 0 for end in ends] == [True, True, False]
    assert ends[0][1] == ends[1][1] == ends[2][1]


# -- replays -----------------------------------------------------------------------------------------------------------


def _recorded(folder: str, knobs: dict[str, Any]) -> None:
    L.seed_everything(7, verbose=False)
    trainer(2, strategy=LazySignStrategy(record=folder, **knobs)).fit(recorded.Net())


@pytest.mark.few(0)
@pytest.mark.parametrize("knobs", [{"exact": ["layer.0.*"]}, {}, {"rule": "accumulate"}, {"deadline": 0.0}], ids=str)
def test_a_recorded_run_is_replayed_to_the_bit(
    knobs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(2, _recorded, str(tmp_path), {**SIGNS, **knobs})
    status = main(["replay", str(tmp_path), "--module", "tests.cli.recorded:Net"])
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    assert "to the bit" in said.out
