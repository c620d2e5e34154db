"""What is trained may change behind a validation in mid-epoch; what is saved there, and later, goes on with it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_async import AsyncStrategy, LazySignStrategy, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, Saves, held_out, look, look_when_put_back, samples, seed

pytestmark = pytest.mark.filterwarnings("ignore:.*goes on with the parameters that were trained")
SIGNS: dict[str, Any] = {"block": 8, "min_size": 0, "form": "slices"}
MODES = [("pairwise", "adopt"), ("pairwise", "keep"), ("push_sum", "keep"), ("sync", "adopt"), ("none", "adopt")]
HEAD, WHOLE = 64, 144
"""Numbers of the flat vector: a head and a BatchNorm, each tensor on cache lines of its own; and with the backbone."""


class Thaws(BaseFinetuning):
    """Thaws the backbone in the second epoch: behind its first validation, or at a meeting of its own at a batch."""

    def __init__(self, batch: int | None = None) -> None:
        super().__init__()
        self.batch = batch
        self.at: list[int] = []

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, *_: Any) -> None:
        pass

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.batch is None and trainer.current_epoch == 1:
            self.thaw(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (1, self.batch):
            trainer.strategy.meet()  # type: ignore[attr-defined]
            self.thaw(trainer, module)

    def thaw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.backbone[0].weight.requires_grad:  # type: ignore[index, union-attr]
            return
        self.at.append(trainer.fit_loop.epoch_loop.batch_idx)
        for number, optimizer in enumerate(trainer.optimizers):
            groups = len(optimizer.param_groups)
            self.unfreeze_and_add_param_group(module.backbone, optimizer, train_bn=False)
            self._store(module, number, groups, optimizer.param_groups)


class Backbone(Draws):
    """A backbone that is frozen at first, but for its BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.BatchNorm1d(8))
        self.layer = nn.Sequential(self.backbone, nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Sizes(Callback):
    """How long the flat vector is at each batch, and whether what is trained, and nothing else, is in it."""

    def __init__(self) -> None:
        self.numel: list[tuple[int, int]] = []
        self.views = True

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        self.numel.append((trainer.current_epoch, strategy.replica.numel))
        first, length = strategy.replica.flat.data_ptr(), strategy.replica.numel * 4
        views = ((first <= p.data_ptr() < first + length) == p.requires_grad for p in module.parameters())
        self.views = self.views and all(views)


# -- the thaw ----------------------------------------------------------------------------------------------------------


def _thaws(mode: str, at_meeting: str) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    lit, thaws, sizes = Backbone(), Thaws(), Sizes()
    before = lit.backbone[0].weight.detach().clone()
    pace = [] if mode == "sync" else [SpeedFaults(step_seconds=0.002, slow={1: 3.0})]
    knobs = {"mode": mode, "at_meeting": at_meeting}
    t = trainer(2, knobs=knobs, callbacks=[*pace, thaws, sizes], max_epochs=3, val_check_interval=5)
    t.fit(lit, samples(), held_out())
    optimizer = t.optimizers[0]
    return {
        "end": weights(lit),
        "sizes": list(dict.fromkeys(sizes.numel)),
        "views": sizes.views,
        "moved": not torch.equal(lit.backbone[0].weight, before),
        "stepped": optimizer.state[lit.backbone[0].weight]["exp_avg"].any().item(),
        "times": len(thaws.at),
    }


@pytest.mark.few(1)
@pytest.mark.parametrize(("mode", "at_meeting"), MODES)
def test_a_backbone_thaws_behind_a_validation_in_mid_epoch(mode: str, at_meeting: str) -> None:
    first, second = run(2, _thaws, mode, at_meeting)
    assert first["end"] == second["end"]
    for end in (first, second):
        assert end["sizes"] == [(0, HEAD), (1, HEAD), (1, WHOLE), (2, WHOLE)], "in mid-epoch"
        assert end["views"]
        assert end["moved"]
        assert end["stepped"]
        assert end["times"] == 1


class OneRankOnly(Thaws):
    """The others' backbones stay frozen."""

    def thaw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if os.environ["RANK"] == "1":
            super().thaw(trainer, module)


def _one_rank_only(folder: str | None) -> None:
    save = [] if folder is None else [ModelCheckpoint(folder, monitor="val", save_on_train_epoch_end=False)]
    options = {"val_check_interval": 5, "enable_checkpointing": folder is not None}
    trainer(2, callbacks=[OneRankOnly(), *save], **options).fit(Backbone(), samples(), held_out())


@pytest.mark.few(0)
@pytest.mark.parametrize("saves", [True, False])
def test_ranks_that_do_not_thaw_alike_are_stopped_with_the_names(saves: bool, tmp_path: Path) -> None:
    """Before what they would save is of unlike vectors; else before they train on."""
    with Forked(2, _one_rank_only, str(tmp_path) if saves else None) as forked:
        results = forked.results(30)
    sentence = "the ranks do not train the same parameters (rank 1 also `layer.0.0.bias`, `layer.0.0.weight`): freeze"
    assert all(sentence in result.error for result in results)


# -- what is saved behind it -------------------------------------------------------------------------------------------


class SavesBehind(Saves):
    """Saves once, `later` validations behind the thaw, or at its own batch; what it saw is what was saved."""

    def __init__(self, path: str, where: str, later: int = 0, batch: int = 0) -> None:
        super().__init__(path, where, epoch=1, batch=batch)
        self.later = later

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if self.where == "validation" and module.backbone[0].weight.requires_grad and self.losses < 0:
            self.later -= 1
            if self.later < 0:
                self._save(trainer, module)

    def _save(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.path)
        self.seen, self.losses = look(trainer), len(module.losses)


def _goes_on(knobs: dict[str, Any], later: int, precision: Any, path: str, resume: bool) -> dict[str, Any]:
    seed()
    batch = None if knobs["mode"] == "sync" else 4
    save = SavesBehind(path, "validation" if batch is None else "batch", later, 4 + later)
    lit, options = Backbone(), dict[str, Any]({"val_check_interval": 5} if batch is None else {})
    callbacks = [Thaws(batch)] + [save] * (not resume)
    options |= {"max_epochs": 3, "precision": precision, "num_sanity_val_steps": 0}
    t = trainer(2, knobs=knobs, callbacks=callbacks, **options)
    seen = look_when_put_back(t)
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    strategy = t.strategy
    assert isinstance(strategy, AsyncStrategy)
    return {
        "seen": seen[0] if resume else save.seen,
        "losses": lit.losses if resume else lit.losses[save.losses :],
        "end": (weights(lit), strategy.replica.numel, [g["lr"] for g in t.optimizers[0].param_groups]),
    }


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("mode", "at_meeting", "later", "precision"),
    [
        ("sync", "adopt", 0, "32-true"),
        ("sync", "adopt", 1, "32-true"),
        ("none", "adopt", 0, "32-true"),
        ("none", "keep", 0, "bf16-true"),
        ("none", "keep", 2, "32-true"),
    ],
)
def test_what_is_saved_behind_the_thaw_goes_on_to_the_bit(
    mode: str, at_meeting: str, later: int, precision: str, tmp_path: Path
) -> None:
    """At the same meeting, or later in the epoch."""
    path, knobs = str(tmp_path / "x.ckpt"), {"mode": mode, "at_meeting": at_meeting, "balance": "equal"}
    through = run(2, _goes_on, knobs, later, precision, path, False)
    resumed = run(2, _goes_on, knobs, later, precision, path, True)
    trained = torch.load(path, weights_only=True)["lightning_async"]["trained"]["parameters"]
    assert sorted(trained) == [f"layer.{name}.{kind}" for name in ("0.0", "0.2", "1") for kind in ("bias", "weight")]
    for one, other in zip(through, resumed, strict=True):
        for key in one["seen"]:
            assert other["seen"][key] == one["seen"][key], key
        assert len(one["losses"]) >= 10
        assert other["losses"] == one["losses"]
        assert other["end"] == one["end"]
    assert resumed[0]["end"][0] == resumed[1]["end"][0]
    assert resumed[0]["end"][1] == WHOLE


def _held(trainer: L.Trainer) -> dict[str, Any]:
    """What this rank holds back of the consensus, with what its server does; what it shows, and what is its own."""
    strategy = trainer.strategy
    assert isinstance(strategy, AsyncStrategy)
    found: dict[str, Any] = {"own": strategy.replica.own.tolist(), "shown": strategy.replica.flat.tolist()}
    if isinstance(strategy, LazySignStrategy):
        state = strategy.algorithm.state_dict()
        held, served = state["rest"] / trainer.world_size, state["exchange"]
        held[served["base"] : served["base"] + served["rest"].numel()] += served["rest"]
        found["held"] = held.tolist()
    return found


class SavesAndHolds(SavesBehind):
    """It is looked at another thing."""

    def _save(self, trainer: Any, module: Any) -> None:
        super()._save(trainer, module)
        self.seen = _held(trainer)


class Begins(Callback):
    """Looks at it as the first batch begins."""

    seen: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen = self.seen or _held(trainer)


def _elsewhere(n: int, signs: bool, path: str, resume: bool) -> dict[str, Any]:
    seed()
    save, sizes, lit = SavesAndHolds(path, "validation"), Sizes(), Backbone()
    knobs = {"mode": "push_sum", "at_meeting": "keep"}
    strategy: dict[str, Any] = {"strategy": LazySignStrategy(**SIGNS)} if signs else {"knobs": knobs}
    callbacks: list[Callback] = [Thaws(), sizes, begins := Begins()] + [save] * (not resume)
    t = trainer(n, callbacks=callbacks, max_epochs=3, val_check_interval=4, num_sanity_val_steps=0, **strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return {
        "seen": begins.seen if resume else save.seen,
        "end": weights(lit),
        "sizes": {numel for _, numel in sizes.numel},
        "said": [str(w.message) for w in caught if "goes on with" in str(w.message) or "to the bit" in str(w.message)],
    }


@pytest.mark.few(0)
@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_another_world_goes_on_behind_the_thaw_with_what_was_held_back(
    before: int, after: int, signs: bool, tmp_path: Path
) -> None:
    path = str(tmp_path / "x.ckpt")
    saved = run(before, _elsewhere, before, signs, path, False)
    resumed = run(after, _elsewhere, after, signs, path, True)
    for one in resumed:
        assert one["seen"]["own"] == one["seen"]["shown"] == saved[0]["seen"]["shown"]
        assert one["sizes"] == {WHOLE}
        assert one["end"] == resumed[0]["end"]
    if signs:
        held, again = (torch.tensor([one["seen"]["held"] for one in ranks]).sum(0) for ranks in (saved, resumed))
        assert held.any()
        torch.testing.assert_close(again, held)
    thawed, another = resumed[0]["said"]
    assert "it trains `layer.0.0.bias`, `layer.0.0.weight` again" in thawed
    assert f"it was saved by {before} ranks, and there are {after}" in another


class FreezesAll(Callback):
    """Nothing is trained any more when the last epoch is over."""

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            module.requires_grad_(False)


def _freezes_all(folder: str) -> Tensor:
    save = ModelCheckpoint(folder, filename="end", save_on_train_epoch_end=True)
    lit = Lit()
    trainer(2, callbacks=[FreezesAll(), save], enable_checkpointing=True).fit(lit, loader(8), held_out())
    return torch.tensor(weights(lit))


@pytest.mark.few(0)
def test_what_is_frozen_for_good_at_the_very_end_is_saved(tmp_path: Path) -> None:
    first, second = run(2, _freezes_all, str(tmp_path))
    assert torch.equal(first, second)
    assert (tmp_path / "end.ckpt").exists()
