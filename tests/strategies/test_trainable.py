"""What is trained may change where an epoch starts, on all ranks alike; only what is trained travels."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from torch import nn

from lightning_async import (
    AsyncGlobalStrategy,
    CyclicDelayStrategy,
    GossipRingStrategy,
    LazySignStrategy,
    SpeedFaults,
    SpreadStats,
)
from lightning_async.algorithms.gossip import Gossip
from lightning_async.algorithms.pairwise import ANSWER, ASK
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.transport.rounds import Rounds
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run

SIGNS: dict[str, Any] = {"block": 8, "min_size": 0}
MODES = [("pairwise", "adopt"), ("pairwise", "keep"), ("push_sum", "keep"), ("sync", "adopt"), ("none", "adopt")]


class Backbone(Lit):
    """A frozen backbone and a head, trained with Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.layer = nn.Sequential(self.backbone, nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Sizes(Callback):
    """How long the flat vector is in each epoch, what of the module is in it, and with which weights epochs start."""

    def __init__(self) -> None:
        self.numel: list[int] = []
        self.views: list[bool] = []
        self.starts: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.starts.append(weights(module))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        self.numel.append(strategy.replica.numel)
        first, length = strategy.replica.flat.data_ptr(), strategy.replica.numel * 4
        self.views.append(all((first <= p.data_ptr() < first + length) == p.requires_grad for p in module.parameters()))


def fit(lit: L.LightningModule, *callbacks: Callback, slow: float = 3.0, **options: Any) -> tuple[L.Trainer, Sizes]:
    torch.manual_seed(0)
    sizes = Sizes()
    faults = [SpeedFaults(step_seconds=0.002, slow={1: slow})] if slow > 1 else []
    t = trainer(2, callbacks=[*faults, *callbacks, sizes], **{"max_epochs": 3, **options})
    t.fit(lit, loader(8), loader(40, shuffle=False))
    return t, sizes


def _thaws(mode: str, at_meeting: str) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    lit = Backbone()
    before = lit.backbone[0].weight.detach().clone()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    t, sizes = fit(lit, thaw, slow=1.0 if mode == "sync" else 3.0, knobs={"mode": mode, "at_meeting": at_meeting})
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    return {
        "end": weights(lit),
        "numel": list(dict.fromkeys(sizes.numel)),
        "views": all(sizes.views),
        "moved": not torch.equal(lit.backbone[0].weight, before),
        "stretched": lit.backbone[0].weight in strategy.stepping.moment(strategy.optimizers[0])._square,
        "arrivals": len(strategy.arrivals()),
    }


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize(("mode", "at_meeting"), MODES)
def test_a_backbone_thaws_at_a_meeting(mode: str, at_meeting: str) -> None:
    first, second = run(2, _thaws, mode, at_meeting)
    assert first["end"] == second["end"]
    for end in (first, second):
        assert len(end["numel"]) == 2
        assert end["numel"][0] < end["numel"][1]
        assert end["views"]
        assert end["moved"]
        assert end["stretched"] == (mode != "none")
        assert bool(end["arrivals"]) == (mode != "none")


class HeldBack(Callback):
    """What this rank holds back of the head as it meets, and as it goes on, with what its server does."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, LazySignStrategy)
        state = strategy.algorithm.state_dict()
        held, served = state["rest"] / trainer.world_size, state["exchange"]
        held[served["base"] : served["base"] + served["rest"].numel()] += served["rest"]
        parts = dict(zip((p for p, _ in strategy.replica.places), strategy.replica.parts(held), strict=True))
        self.found.append([x for p in module.layer[1].parameters() for x in parts[p].tolist()])  # type: ignore[index, union-attr]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.look(trainer, module)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch > 0:
            self.look(trainer, module)


def _holds_back() -> Any:
    lit, held = Backbone(), HeldBack()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    strategy = LazySignStrategy(form="slices", **SIGNS)
    _, sizes = fit(lit, thaw, held, slow=1.0, strategy=strategy, num_sanity_val_steps=0)
    return weights(lit), held.found, list(dict.fromkeys(sizes.numel))


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.few(0)
def test_what_signs_held_back_is_not_forgotten_where_a_backbone_thaws() -> None:
    (first, one, sizes), (second, other, _) = run(2, _holds_back)
    assert first == second
    assert len(sizes) == 2
    met, thawed = (torch.tensor(one[i]) + torch.tensor(other[i]) for i in (0, 1))
    assert met.all()
    torch.testing.assert_close(thawed, met)


class Spreads(SpreadStats):
    """Keeps what it said of each epoch, beside what was to be said."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.found: list[tuple[float, float, int]] = []
        self.truth: list[tuple[float, float, int]] = []

    def say(self, stretch: Any) -> Any:
        words, apart = super().say(stretch), [*stretch.apart()]
        trained = [p for p in self.module.parameters() if p.requires_grad]
        size = sum(float(p.detach().double().square().sum()) for p in trained)
        self.found.append(tuple(words[""]))
        self.truth.append((sum(apart), size, sum(p.numel() for p in trained)))
        assert len(apart) == len(trained)
        return words

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().begin(trainer, module)
        self.module = module


def _spread() -> tuple[list[Any], list[Any]]:
    torch.manual_seed(0)
    says = Spreads()
    fit(Backbone(), BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False), says)
    return says.found, says.truth


@pytest.mark.few(0)
def test_the_spread_is_of_what_is_trained_now() -> None:
    for found, truth in run(2, _spread):
        assert len({numel for _, _, numel in truth}) == 2
        for said, true in zip(found, truth, strict=True):
            assert said == pytest.approx(true)


class Freezes(BaseFinetuning):
    """Layer by layer the other way round: what was trained is frozen."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        pass

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.freeze(pl_module.backbone, train_bn=False)


def _freezes() -> Any:
    lit, told = Backbone(), list[str]()

    def noted(name: str, call: Any) -> Any:
        return lambda *arguments, **options: (told.append(name), call(*arguments, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Gossip, "begin"), (Rounds, "barrier"), (Gossip, "resume")):
            patch.setattr(owner, name, noted(name, getattr(owner, name)))
        _, sizes = fit(lit, Freezes(), knobs={"at_meeting": "keep"})
    anew = len(told) - told[::-1].index("begin")  # what was posted to who has not begun would be the old one's
    assert "barrier" in told[anew : told.index("resume", anew)]
    frozen = lit.backbone[0].weight
    own_memory = frozen.untyped_storage().nbytes() == frozen.numel() * 4
    return weights(lit), list(dict.fromkeys(sizes.numel)), all(sizes.views) and own_memory


def test_what_is_frozen_later_is_equal_too() -> None:
    (first, sizes, views), (second, _, _) = run(2, _freezes)
    assert first == second
    assert len(sizes) == 2
    assert sizes[0] > sizes[1]
    assert views


class Replaces(Backbone):
    """A new head object under the old name, on one rank only: all begin anew, from the first rank's."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and os.environ["RANK"] == "1":
            old = self.layer[1]
            self.layer[1] = nn.Linear(8, 1)
            self.trainer.optimizers[0].add_param_group({"params": list(self.layer[1].parameters())})
            assert old is not self.layer[1]


def _replaces(signs: bool) -> Any:
    lit = Replaces()
    innovation = {"strategy": LazySignStrategy(rule="innovation", **SIGNS)} if signs else {}
    _, sizes = fit(lit, **innovation)
    return weights(lit), sizes.starts


@pytest.mark.few(0)
@pytest.mark.parametrize("signs", [False, True])
def test_a_replaced_layer(signs: bool) -> None:
    """Also with signs that say how updates have changed: what all have of them must not stay on some ranks alone."""
    (first, starts), (second, also_starts) = run(2, _replaces, signs)
    assert first == second
    assert starts == also_starts


# -- refused ---------------------------------------------------------------------------------------------------------


class OneRankOnly(Backbone):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and os.environ["RANK"] == "1":
            self.backbone.requires_grad_(False)


class InMidEpoch(Backbone):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1 and batch_idx == 3:
            self.backbone.requires_grad_(False)


def test_ranks_that_train_different_parameters_are_stopped_with_their_names() -> None:
    with Forked(2, lambda: fit(OneRankOnly())) as forked:
        results = forked.results(30)
    sentence = (
        "the ranks do not train the same parameters (rank 0 also `layer.0.0.bias`, `layer.0.0.weight`, "
        "`layer.0.1.bias` and 1 more): freeze or unfreeze where an epoch starts"
    )
    assert all(sentence in result.error for result in results)


def test_a_change_in_mid_epoch_is_refused() -> None:
    with Forked(2, lambda: fit(InMidEpoch())) as forked:
        results = forked.results(30)
    assert all("has changed between two meetings" in r.error for r in results)


# -- what travels ------------------------------------------------------------------------------------------------------


class Adapted(Lit):
    """A frozen weight with a trainable correction of rank 1, as LoRA does, and a tied pair."""

    def __init__(self, width: int = 400) -> None:
        super().__init__()
        self.layer[0] = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, width).requires_grad_(False)
        self.back = nn.Linear(width, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 1, bias=False), nn.Linear(1, 8, bias=False)
        self.layer = nn.Sequential(Around(self), nn.Linear(8, 1))
        self.layer[1].requires_grad_(False)
        self.tied = nn.Linear(8, 1, bias=False)
        self.tied.weight = self.down.weight


class Around(nn.Module):
    def __init__(self, lit: Adapted) -> None:
        super().__init__()
        self.parts = (lit.frozen, lit.back, lit.down, lit.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frozen, back, down, up = self.parts
        corrected: torch.Tensor = back(frozen(x)) + up(down(x))
        return corrected


class Counts(Adapted):
    """It reads the carrier's counters before it leaves."""

    counted: tuple[int, int] = (0, 0)

    def on_train_end(self) -> None:
        table = self.trainer.strategy.traffic()  # type: ignore[attr-defined]
        rows = [count for kinds in table.values() for kind, count in kinds.items() if kind in (ASK, ANSWER)]
        self.counted = (sum(r.messages_out for r in rows), sum(r.bytes_out for r in rows))


def _counts() -> Any:
    lit = Counts()
    fit(lit)
    trainable = [p.numel() for p in lit.parameters() if p.requires_grad]
    whole = sum(p.numel() for p in lit.parameters())
    return weights(lit), trainable, whole, lit.counted, lit.tied.weight is lit.down.weight


def test_of_a_frozen_model_with_small_adapters_only_these_travel() -> None:
    (first, trainable, whole, (messages, size), tied), (second, *_) = run(2, _counts)
    assert first == second
    assert tied
    assert trainable == [8, 8]
    assert whole > 400 * sum(trainable)
    assert messages > 0
    assert size == messages * 4 * 32  # two parameters, each padded to 16 elements


class Sends(Adapted):
    """It counts all that leaves from the first step to the last, with headers, and the meetings."""

    def __init__(self) -> None:
        super().__init__(4000)
        self.sent = self.meetings = 0

    def on_train_start(self) -> None:
        self.sent = -self._out()  # frozen weights were made equal before

    def on_train_end(self) -> None:
        self.sent += self._out()
        self.meetings = self.trainer.strategy.clock.progress.meetings  # type: ignore[attr-defined]

    def _out(self) -> int:
        table = self.trainer.strategy.traffic()  # type: ignore[attr-defined]
        return sum(count.bytes_out for kinds in table.values() for count in kinds.values())


def _sends(kind: type[AsyncStrategy]) -> Any:
    lit = Sends()
    fit(lit, strategy=kind(meet_every=120), max_epochs=1)  # type: ignore[call-arg]
    frozen = sum(p.numel() * p.element_size() for p in lit.frozen.parameters())
    return [p.tolist() for p in lit.parameters() if p.requires_grad], lit.meetings, lit.sent, frozen


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AsyncGlobalStrategy, GossipRingStrategy, CyclicDelayStrategy, LazySignStrategy])
def test_a_whole_run_of_small_adapters_sends_less_than_one_frozen_layer(kind: type[AsyncStrategy]) -> None:
    """All that is counted, a meeting in mid-epoch and the one at its end included, of both ranks together."""
    (first, meetings, sent, frozen), (second, _, also_sent, _) = run(2, _sends, kind)
    assert first == second
    assert meetings >= 3, "at the start, in mid-epoch, at the end"
    assert 0 < sent + also_sent < frozen
