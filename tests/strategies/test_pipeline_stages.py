"""What a user expects of any strategy: validate, test, predict, callbacks that monitor, stops, sentences."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from lightning_async import AdaptiveShrink, DelayedPipelineStrategy, DelayStats, GossipRingStrategy
from lightning_async.strategies.pipeline_refusals import OF_MEETINGS
from tests.strategies.piped import WIDTH, Piped, loader, trainer, weights
from tests.strategies.ranks import Forked, run

SECONDS = 20.0


def _all_stages(devices: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    lit = Piped(0.01, schedule="plateau")
    best = ModelCheckpoint(folder, monitor="val", save_last=True)
    callbacks = [best, EarlyStopping("train_epoch", patience=1, mode="max")]
    t = trainer(devices, callbacks=callbacks, enable_checkpointing=True, max_epochs=9, **options)
    t.validate(lit, loader(20))
    untrained = float(t.callback_metrics["val"])
    t.fit(lit, loader(shuffle=True), loader(20))
    fitted, epochs, lr = weights(lit), t.current_epoch, t.optimizers[0].param_groups[0]["lr"]
    t.validate(lit, loader(20))
    t.test(lit, loader(20), ckpt_path="best")
    tested = float(t.callback_metrics["test"])
    predicted = t.predict(lit, loader(20))
    return {
        "untrained": untrained,
        "fitted": fitted,
        "epochs": epochs,
        "lr": lr,
        "test": tested,
        "predicted": [p.tolist() for p in predicted if p is not None],
        "best": best.best_model_path,
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("devices", [2, 3])
def test_all_that_a_trainer_does(devices: int, tmp_path: Path) -> None:
    ends = run(devices, _all_stages, devices, str(tmp_path / "many"), {})
    for end in ends[1:]:
        for key in ("untrained", "fitted", "epochs", "lr", "test", "best"):
            assert end[key] == ends[0][key], key
        assert end["predicted"] == []
    first = ends[0]
    assert first["epochs"] == 2  # what falls is not what EarlyStopping was told to wait for
    assert first["lr"] < 0.01
    lit = Piped()
    lit.load_state_dict(torch.load(first["best"], weights_only=True)["state_dict"])
    lit.eval()
    lit.log = lambda *a, **k: None  # type: ignore[method-assign]
    with torch.no_grad():
        expected = [lit.head(lit.net(lit.prepare(x))) for x, _ in loader(20)]
    assert first["predicted"] == [p.tolist() for p in expected]


class Unlike(Piped):
    """A module that is wrong in one way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "tied outside":
            self.head.weight = self.net[0][0].weight
        if how == "in place":
            self.net[2] = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
        if how == "a tuple":
            self.net[1] = Twice()
        if how == "manual":
            self.automatic_optimization = False
        if how == "thaws":
            self.factor = nn.Parameter(torch.ones(1), requires_grad=False)

    def on_train_epoch_start(self) -> None:
        if self.how == "thaws" and self.current_epoch == 1:
            self.factor.requires_grad_()
        if self.how == "a group" and self.current_epoch == 1:
            self.optimizers().add_param_group({"params": [nn.Parameter(torch.ones(1))]})

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        by_step = {"scheduler": plateau, "interval": "step", "monitor": "val"}
        return ([optimizer], [by_step]) if self.how == "plateau" else optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.prepare(x) * getattr(self, "factor", 1.0)
        out = hidden
        if self.how != "no call":
            out = self.net(hidden)
        if self.how == "two calls":
            out = self.net(out)
        if self.how == "around":
            out = out + hidden
        loss = (self.head(out) - y).square().mean()
        if self.how == "penalty":
            loss = loss + sum(p.square().sum() for p in self.parameters())
        if self.how == "a later penalty" and self.current_epoch == 1:
            loss = loss + self.embed.weight.square().sum()
        return loss  # type: ignore[no-any-return]


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def _refused(devices: int, how: str, knobs: dict[str, Any], options: dict[str, Any]) -> None:
    trainer(devices, knobs=knobs, limit_val_batches=0, **options).fit(Unlike(how), loader(), loader(20))


REFUSALS: list[tuple[int, str, dict[str, Any], dict[str, Any], str]] = [
    (2, "tied outside", {}, {}, r"`head.weight` is shared between stage 0 and what is outside of the stages"),
    (2, "in place", {}, {}, "the first block of stage 1 changes what it gets in place"),
    (2, "a tuple", {}, {}, "stage 0 ends with a tuple"),
    (2, "no call", {}, {}, "a step has not called `net`"),
    (2, "two calls", {}, {}, "a step calls `net` twice"),
    (2, "around", {}, {}, "`embed.weight` is used before the call of the stages"),
    (2, "a later penalty", {}, {}, "`embed.weight` .* reaches the loss also on another way"),
    (2, "penalty", {}, {}, "reaches the loss also on another way"),
    (2, "thaws", {}, {}, "`factor` is trained before the call .*, and was not in the first batch .*second `fit`"),
    (3, "a group", {}, {}, "another group of parameters during the fit.* thaw in a second `fit`"),
    (3, "", {"split": [1]}, {}, "`split` must be 2 rising block numbers"),
    (3, "", {"replicas": 2}, {}, "3 ranks cannot be divided among 2 replicas"),
    (2, "", {"replicas": 2}, {}, "use strategy='ddp'"),
    (2, "plateau", {}, {}, "use interval='epoch'"),
    (1, "manual", {}, {}, "with manual optimisation the module steps by itself"),
    (1, "", {}, {"precision": "16-true"}, "use 'bf16-mixed'"),
    (5, "", {}, {}, "4 blocks cannot be cut into 5 stages"),
]


class Blockwise(Piped):
    """A layer before the call, the first block and the head thaw; the optimizer has had all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.thaw(False)
        self.saw: list[dict[str, list[float]]] = []

    def thaw(self, trained: bool) -> None:
        for layer in (self.embed, self.net[0], self.head):
            layer.requires_grad_(trained)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.thaw(True)

    def on_train_batch_end(self, *args: Any) -> None:
        mine = {"net": self.net[0][0], "embed": self.embed} if self.global_rank else {"head": self.head}
        self.saw.append({name: layer.weight.flatten().tolist() for name, layer in mine.items()})


def _thaws() -> tuple[list[dict[str, list[float]]], list[float]]:
    lit = Blockwise()
    trainer(2, limit_val_batches=0).fit(lit, loader(), loader(20))
    return lit.saw, weights(lit)


def test_all_layers_may_thaw_where_an_epoch_starts() -> None:
    (last, end), (first, same) = run(2, _thaws)
    assert end == same
    head = [one["head"] for one in last]
    assert head[0] == head[7] != head[8]
    for name in ("net", "embed"):
        path = [one[name] for one in first]
        assert path[0] == path[7] == path[9]  # eight batches are an epoch, and gradients are two batches late
        assert path[15] != path[9]


KNOBS: list[tuple[dict[str, Any], str]] = [
    ({"split": "best"}, "`split` must be 'even', 'auto' or a list of block numbers, got 'best'"),
    ({"shrink": 0.0}, "`shrink` must be above 0 and at most 1, got 0.0"),
    ({"semantics": "old"}, "`semantics` must be one of 'stash', 'recompute', 'hybrid', got 'old'"),
    ({"order": "both"}, "`order` must be one of 'update_first', 'forward_first', got 'both'"),
    ({"anneal": 0}, "`anneal` must be an integer of at least 1, got 0"),
    ({"replicas": 0}, "`replicas` must be an integer of at least 1, got 0"),
    ({"baseline": "sync", "shrink": 0.5}, "`shrink` must be 1 with baseline='sync'"),
    ({"patience": 0.1}, "`patience` must be at least `silence`"),
]


@pytest.mark.parametrize(("knobs", "sentence"), KNOBS)
def test_knobs_that_mean_nothing(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DelayedPipelineStrategy(stages="net", **knobs)


@pytest.mark.parametrize("knob", OF_MEETINGS)
def test_a_knob_of_strategies_that_meet_is_refused_with_the_remedy(knob: str) -> None:
    with pytest.raises(TypeError, match=f"^`{knob}` is for strategies whose ranks meet, .*: .*"):
        DelayedPipelineStrategy(stages="net", **{knob: None})
    assert knob in signature(GossipRingStrategy).parameters
    assert knob not in signature(DelayedPipelineStrategy).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'stage'"):
        DelayedPipelineStrategy(stage="net")  # type: ignore[call-arg]


@pytest.mark.few(4)
@pytest.mark.parametrize(("devices", "how", "knobs", "options", "sentence"), REFUSALS)
def test_what_is_refused(devices: int, how: str, knobs: Any, options: Any, sentence: str) -> None:
    with Forked(devices, _refused, devices, how, knobs, options) as forked:
        results = forked.results(SECONDS)
    assert all(result.kind not in (None, "silent", "gone") for result in results), results
    assert any(re.search(sentence, result.error) for result in results), results
    assert all(re.search(sentence, r.error) or "stops because of it" in r.error for r in results), [
        r.error for r in results
    ]


class Say(Callback):
    """Touch a file once this rank trains; where it ends by an error, write down why who is dead was declared so."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch > 0:
            (Path(self.folder) / f"rank{trainer.global_rank}").touch()
        time.sleep(0.005)

    def on_exception(self, trainer: Any, *args: Any) -> None:
        (Path(self.folder) / f"deaths{trainer.global_rank}").write_text(str(trainer.strategy.office.carrier.deaths))


def _for_ever(folder: str, knobs: dict[str, Any]) -> None:
    saved = ModelCheckpoint(folder, filename="one", enable_version_counter=False)
    t = trainer(3, knobs=knobs, max_epochs=10000, callbacks=[Say(folder), saved], enable_checkpointing=True)
    t.fit(Piped(), loader(), loader(20))


def _until_training(folder: Path) -> None:
    end = time.monotonic() + 3 * SECONDS  # three processes begin on a machine that is busy
    while len(list(folder.glob("rank*"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stage_that_is_killed_stops_all_with_a_sentence_and_leaves_a_checkpoint(rank: int, tmp_path: Path) -> None:
    silence, patience = 0.5, 5.0
    with Forked(3, _for_ever, str(tmp_path), {"silence": silence, "patience": patience}, store=True) as forked:
        _until_training(tmp_path)
        forked.signal(rank, signal.SIGKILL)
        results = forked.results(3 * SECONDS)
    said = "".join(file.read_text() for file in tmp_path.glob("deaths*"))
    quiet = [float(seconds) for seconds in re.findall(rf"{rank}: '[^']*silent for ([0-9.]+) s", said)]
    assert quiet, said
    assert max(quiet) <= patience + silence / 2 + 0.05  # seconds in which they looked: one look more, and rounding
    for r, result in enumerate(results):
        if r != rank:
            assert result.kind in ("LostStageError", "PeerFailedError"), result
            assert f"rank {rank} died" in result.error
    Piped().load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 2])
def test_sigterm_stops_all_cleanly(rank: int, tmp_path: Path) -> None:
    with Forked(3, _for_ever, str(tmp_path), {}) as forked:
        _until_training(tmp_path)
        forked.signal(rank, signal.SIGTERM)
        results = forked.results(SECONDS)
    assert [r.kind for r in results] == ["SIGTERMException"] * 3, results


class Noted(Callback):
    """After how many batches this rank stopped."""

    batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


def _terminated(folder: str, rank: int, where: str) -> int:
    class Told(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if (trainer.global_rank, number, where) == (rank, 3, "batch"):
                os.kill(os.getpid(), signal.SIGTERM)

        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            if (trainer.global_rank, trainer.sanity_checking, where) == (rank, False, "validation"):
                os.kill(os.getpid(), signal.SIGTERM)

    saver = ModelCheckpoint(folder, filename="end", save_on_exception=True, every_n_epochs=100)
    lit, noted = Piped(), Noted()
    t = trainer(3, callbacks=[Told(), noted, saver], enable_checkpointing=True, max_epochs=100)
    with pytest.raises(SIGTERMException):
        t.fit(lit, loader(), loader(20))
    return noted.batches


@pytest.mark.few(1)
@pytest.mark.parametrize(("rank", "where"), [(0, "batch"), (2, "validation")])
def test_sigterm_stops_all_after_the_same_batch_and_saves_the_whole(rank: int, where: str, tmp_path: Path) -> None:
    ends = run(3, _terminated, str(tmp_path), rank, where)
    assert len(set(ends)) == 1
    (file,) = tmp_path.glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    Piped().load_state_dict(saved["state_dict"])
    assert saved["global_step"] == saved["delayed_pipeline"]["batches"] == ends[0] > 0


def _unequal(devices: int, more: int) -> None:
    lit = Piped()
    trainer(devices, limit_val_batches=0).fit(lit, loader(n=40 + more * int(os.environ["RANK"])), loader(20))


@pytest.mark.few(2)
@pytest.mark.parametrize(("devices", "more"), [(2, 16), (3, 8), (3, -8)])
def test_unequal_numbers_of_batches_are_no_hang(devices: int, more: int) -> None:
    with Forked(devices, _unequal, devices, more) as forked:
        results = forked.results(SECONDS)
    assert any("must be given the same batches" in r.error for r in results), results


def _different() -> None:
    data = loader()
    if int(os.environ["RANK"]):
        data.dataset.tensors[0].neg_()  # type: ignore[attr-defined]
    trainer(2, limit_val_batches=0).fit(Piped(), data, loader(20))


def test_different_batches_are_noticed_at_once() -> None:
    with Forked(2, _different) as forked:
        results = forked.results(SECONDS)
    assert any("were given different data in batch 1" in r.error for r in results), results


def _works(devices: int, make: Callable[[], Piped], knobs: dict[str, Any]) -> list[float]:
    lit = make()
    trainer(devices, knobs=knobs, limit_val_batches=0).fit(lit, loader(), loader(20))
    return lit.losses


class InAList(Piped):
    """Blocks called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(self.net)  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.prepare(x)
        for block in self.net:
            x = block(x)
        loss = (self.head(x) - y).square().mean()
        self.losses.append(float(loss.detach()))
        return loss  # type: ignore[no-any-return]


class Configured(Piped):
    """A list of its own making."""

    def configure_stages(self) -> list[nn.Module]:
        return [*self.net[0], self.net[1], self.net[2], self.net[3]]


def _measures(knobs: dict[str, Any]) -> Any:
    lit = Configured()
    t = trainer(2, knobs=knobs, limit_val_batches=0)
    order = torch.Generator().manual_seed(3)  # which goes on from where it was left
    t.fit(lit, loader(shuffle=True, generator=order), loader(20))
    return lit.losses, lit.started, t.strategy.turns.place.stage.stash.most


@pytest.mark.few(0)
def test_measuring_leaves_no_trace() -> None:
    split = {"split": [1], "stages": None}
    auto = run(2, _measures, {"split": "auto", "stages": None})
    for cut in range(1, 6):
        if run(2, _measures, {**split, "split": [cut]})[0][0] == auto[0][0]:
            return
    pytest.fail("no cut gives the same run")


@pytest.mark.few(0)
def test_a_list_of_blocks_trains_as_a_sequence_does() -> None:
    sequence = run(2, _works, 2, Piped, {"split": [1]})
    in_a_list = run(2, _works, 2, InAList, {"split": [1]})
    assert in_a_list[0] == sequence[0]
    assert len(sequence[0]) == 16


def _watched(folder: str, resume: str | None) -> Any:
    warnings.filterwarnings("ignore", "The dirpath has changed")
    shrink, delays = AdaptiveShrink(law="constant", beta=0.5), DelayStats()
    saved = ModelCheckpoint(folder, filename="{epoch}")
    lit = Piped()
    t = trainer(3, callbacks=[shrink, delays, saved], enable_checkpointing=True, max_epochs=2)
    t.fit(lit, loader(), loader(20), ckpt_path=resume)
    factors = [a.factor for a in t.strategy.arrivals()]
    return factors, lit.losses, shrink.figures, delays.figures


def test_callbacks_see_delays_and_shrink_by_them(tmp_path: Path) -> None:
    ends = run(3, _watched, str(tmp_path / "a"), None)
    assert ends[0][0] == []
    one = ends[2][0][:8]
    assert one[0] == 1.0
    assert one[3:] == [0.25] * 5  # beta ** 3, but for what the stage behind has shrunk: its delay is 1
    assert ends[2][0][8:] == one  # a checkpoint has drained the pipe
    for end in ends[1:]:
        assert repr(end[2:]) == repr(ends[0][2:])  # some figures are none, and no two of these are equal
    assert ends[0][3]["max"] == 3.0
