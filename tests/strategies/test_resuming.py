"""What was saved is restored to the bit, on every rank; elsewhere a run goes on from the consensus, and says so."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, LazySignStrategy, SpeedFaults
from lightning_async.algorithms.algorithm import UNIT
from lightning_async.strategies.own_state import primitive
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import (
    Draws,
    Saves,
    Stateful,
    assert_nothing_over,
    files_of,
    held_out,
    look,
    look_when_put_back,
    plain,
    rank,
    samples,
    seed,
    stream,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")


# -- the law: what is saved is what is restored ------------------------------------------------------------------------


class Remembers:
    """Gives an algorithm a state, and remembers what it is given."""

    def __init__(self, algorithm: Any) -> None:
        self.state: dict[str, Any] = {"turn": 0}
        algorithm.state_dict = lambda: self.state
        algorithm.load_state_dict = self.load

    def load(self, state: dict[str, Any]) -> None:
        self.state = state


def _run(n: int, knobs: dict[str, Any], path: str, resume: bool) -> dict[str, Any]:
    seed()
    lit, save = Draws(), Saves(path)
    t = trainer(n, knobs=knobs, max_epochs=2, callbacks=[SpeedFaults(step_seconds=0.002)] + [save] * (not resume))
    remembers = Remembers(t.strategy.algorithm)  # type: ignore[attr-defined]
    if not resume:
        remembers.state = {"turn": 7 + rank(), "moved": torch.full((3,), 0.1 * rank())}
    seen = look_when_put_back(t)
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0] if resume else save.seen


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "balance", "at_meeting"),
    [(2, "claim", "adopt"), (2, "equal", "keep"), (3, "claim", "keep"), (3, "equal", "adopt")],
)
def test_what_is_saved_is_restored_to_the_bit_on_every_rank(
    n: int, balance: str, at_meeting: str, tmp_path: Path
) -> None:
    knobs, path = {"balance": balance, "at_meeting": at_meeting, "mode": "push_sum"}, tmp_path / "x.ckpt"
    saved = run(n, _run, n, knobs, str(path), False)
    restored = run(n, _run, n, knobs, str(path), True)
    for before, after in zip(saved, restored, strict=True):
        for key in before:
            assert after[key] == before[key], key
    assert saved[0]["random"] != saved[1]["random"]
    assert saved[0]["optimizers"] != saved[1]["optimizers"]
    assert saved[0]["moments"]["0"]["count"]
    assert (saved[0]["own"] != saved[1]["own"]) is (at_meeting == "keep")
    assert saved[0]["shown"] == saved[1]["shown"]
    assert_nothing_over(tmp_path)


def _look(kind: Any, path: str, resume: bool) -> dict[str, Any]:
    seed()
    save = Saves(path, "validation")
    slow = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    t = trainer(2, strategy=kind(), max_epochs=2, callbacks=[slow] + [save] * (not resume))
    seen = look_when_put_back(t)
    t.fit(Draws(), samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0] if resume else save.seen


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AsyncGlobalStrategy, LazySignStrategy, partial(CyclicDelayStrategy, push="gradient")])
def test_so_it_is_with_the_own_state_of_other_methods(kind: Any, tmp_path: Path) -> None:
    """Shards and their optimizers, what was held back: as they were, though one rank is slow."""
    path = str(tmp_path / "x.ckpt")
    assert run(2, _look, kind, path, False) == run(2, _look, kind, path, True)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("balance", "where", "slow"),
    [("claim", "validation", 4.0), ("equal", "batch", 1.0), ("claim", "epoch", 1.0)],  # of claims no batch is all's
)
def test_the_masses_in_the_files_sum_to_what_was_born(balance: str, where: str, slow: float, tmp_path: Path) -> None:
    """Also where one rank is slow: plain push-sum would let it hoard the mass of the others."""
    knobs = {"mode": "push_sum", "at_meeting": "keep", "balance": balance}
    run(3, _through, 3, knobs, str(tmp_path / "x.ckpt"), where, "shared", False, "32-true", slow)
    masses = [own["parts"]["algorithm"]["mass"] for own in files_of(tmp_path / "x.ckpt").values()]
    assert sum(masses) == 3 * 4 * UNIT


# -- the limit: a run that never stopped -------------------------------------------------------------------------------


def _through(
    n: int,
    knobs: dict[str, Any],
    path: str,
    where: str,
    data: str,
    resume: bool,
    precision: Any = "32-true",
    slow: float = 1.0,
) -> Any:
    """The losses from the save on, and the end, of a run that goes through or of one that begins there."""
    seed()
    lit, save = Draws(), Saves(path, where, epoch=int(where == "batch"), batch=4)
    options = {"use_distributed_sampler": data != "own", "precision": precision}
    pace = [SpeedFaults(step_seconds=0.003, slow={n - 1: slow})] if slow > 1 else []
    t = trainer(n, knobs=knobs, max_epochs=3, callbacks=[*pace, save], **options)
    batches = {"shared": samples, "own": lambda: Stateful(rank(), n), "stream": lambda: stream(rank(), n)}[data]()
    t.fit(lit, batches, held_out(), ckpt_path=path if resume else None)
    losses = lit.losses if resume else lit.losses[save.losses :]
    return losses, weights(lit), plain([o.state_dict() for o in t.optimizers]), t.global_step, t.strategy.steps


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("n", "at_meeting", "mode", "where", "data"),
    [
        (1, "adopt", "pairwise", "batch", "own"),
        (1, "keep", "push_sum", "epoch", "own"),
        (1, "adopt", "pairwise", "validation", "shared"),
        (2, "adopt", "none", "batch", "own"),
        (2, "adopt", "none", "validation", "shared"),
        (2, "adopt", "none", "epoch", "own"),
        (2, "keep", "none", "batch", "own"),
        (2, "keep", "none", "validation", "shared"),
        (3, "keep", "none", "epoch", "own"),
        (2, "keep", "none", "batch", "stream"),
        (2, "adopt", "none", "validation", "stream"),
        (2, "adopt", "none", "epoch", "stream"),
        (1, "keep", "pairwise", "batch", "shared"),
        (2, "adopt", "none", "epoch", "shared"),
        (2, "keep", "none", "batch", "shared"),
    ],
)
def test_a_resumed_run_continues_as_if_it_had_not_stopped(
    n: int, at_meeting: str, mode: str, where: str, data: str, tmp_path: Path
) -> None:
    path, knobs = str(tmp_path / "x.ckpt"), {"mode": mode, "balance": "equal", "at_meeting": at_meeting}
    through = run(n, _through, n, knobs, path, where, data, False)
    resumed = run(n, _through, n, knobs, path, where, data, True)
    for one, other in zip(through, resumed, strict=True):
        assert len(one[0]) > 5
        assert one == other


# -- a save between two steps of an optimizer --------------------------------------------------------------------------


class DrawsByHand(Draws):
    """Adds up the gradients of three batches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        if batch_idx % 3 == 0:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            optimizer.step()


class StepsInPairs(DrawsByHand):
    """Two steps in each of its first four batches; then it adds up the gradients of three."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(Draws.training_step(self, batch, batch_idx))
        for _ in range(2 if batch_idx < 4 else batch_idx % 3 == 0):
            optimizer.step()
        if batch_idx < 4 or batch_idx % 3 == 0:
            optimizer.zero_grad()


class BehindValidation(Saves):
    """Saves once, behind the first validation of the second epoch."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1 and self.losses < 0:
            self._save(trainer, module)


class Terminated(L.Callback):
    """Rank 0 gets a SIGTERM in mid-epoch; perhaps when rank 1 is at its last batch of 20, behind which it waits."""

    def __init__(self, last: Path | None = None) -> None:
        self.last = last

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 1 and (trainer.current_epoch, batch_idx) == (1, 19) and self.last is not None:
            self.last.touch()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 0 and (trainer.current_epoch, batch_idx) == (1, 3):
            end = time.monotonic() + 30
            while self.last is not None and not self.last.exists() and time.monotonic() < end:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)


def _adds_up(
    n: int,
    module: Any,
    knobs: dict[str, Any],
    more: dict[str, Any],
    save: list[L.Callback],
    path: str | None,
    size: int,
    epochs: int = 3,
) -> Any:
    """The losses of batches of this size, and the end."""
    seed()
    lit = module()
    saves = any(isinstance(one, ModelCheckpoint) for one in save)
    t = trainer(n, knobs=knobs, callbacks=save, enable_checkpointing=saves, max_epochs=epochs, **more)
    with suppress(SIGTERMException):
        t.fit(lit, stream(rank(), n, size), held_out(), ckpt_path=path)
    return lit.losses, (weights(lit), plain([o.state_dict() for o in t.optimizers]), t.global_step)


@pytest.mark.few(1)
@pytest.mark.parametrize(("module", "accumulate"), [(Draws, 4), (DrawsByHand, 1)])
@pytest.mark.parametrize(("at_meeting", "mode"), [("adopt", "none"), ("keep", "none"), ("adopt", "sync")])
def test_a_run_that_was_saved_between_two_steps_goes_on_to_the_bit(
    at_meeting: str, mode: str, module: Any, accumulate: int, tmp_path: Path
) -> None:
    """A meeting in mid-epoch: some of its batches have been added up to a step that is still to come."""
    path, more = str(tmp_path / "x.ckpt"), {"accumulate_grad_batches": accumulate}
    save = [Saves(path, epoch=1, batch=4)]
    if mode == "sync":
        save, more = [BehindValidation(path, "validation")], {**more, "val_check_interval": 5}
    knobs = {"mode": mode, "at_meeting": at_meeting, "balance": "equal"}
    through = run(2, _adds_up, 2, module, knobs, more, save, None, 4)
    resumed = run(2, _adds_up, 2, module, knobs, more, [], path, 4)
    for (losses, end), (rest, other) in zip(through, resumed, strict=True):
        assert len(losses) == 30
        assert rest == losses[15:]
        assert other == end
    names = {name for name, _ in Draws().named_parameters()}
    if mode == "sync" and module is DrawsByHand:
        names = set()  # Lightning clears gradients before a validation, but for those that it adds up by itself
    for own in files_of(Path(path)).values():
        assert set(own["parts"]["stepping"]["gradients"]) == names


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:Using ModelCheckpoint with manual optimization")
def test_a_save_that_comes_past_its_step_and_between_two_others_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The multiple of `every_n_train_steps` was passed before the meeting, behind which gradients were added up."""
    save: Any = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7)
    knobs = {"mode": "none", "balance": "equal", "meet_every": 48}
    through = run(2, _adds_up, 2, StepsInPairs, knobs, {}, [save], None, 4, 1)
    path = tmp_path / "step=8.ckpt"
    for own in files_of(path).values():
        gradients = own["parts"]["stepping"]["gradients"]
        assert set(gradients) == {name for name, _ in Draws().named_parameters()}
        assert any(bool(gradient.any()) for gradient in gradients.values())
    resumed = run(2, _adds_up, 2, StepsInPairs, knobs, {}, [save], str(path), 4, 1)
    for (losses, end), (rest, other) in zip(through, resumed, strict=True):
        assert len(losses) == 10
        assert rest == losses[6:]
        assert other == end


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:rank 1 had no batch in this epoch")
@pytest.mark.parametrize("last", [True, False])
def test_a_run_that_was_terminated_between_two_steps_goes_on_to_the_bit(last: bool, tmp_path: Path) -> None:
    """Ranks that train alone, each on its own: wherever each of them was stopped, it goes on as if it had not been.
    One that had no more batches waits again for the others to end the epoch."""
    knobs, more = {"mode": "none", "at_meeting": "keep", "buffers": "local"}, {"accumulate_grad_batches": 100}
    terminated = Terminated(tmp_path / "last" if last else None)
    save = [terminated, ModelCheckpoint(tmp_path, filename="x", save_on_exception=True, every_n_epochs=100)]
    through = run(2, _adds_up, 2, Draws, knobs, more, [], None, 2)
    pace = SpeedFaults(step_seconds=0.02)  # 16 steps in which they agree where they stop: at its end an epoch is over
    stopped = run(2, _adds_up, 2, Draws, knobs, more, [*save, pace], None, 2)
    assert 24 <= len(stopped[0][0]) < 40  # in mid-epoch, all of which is one step
    file = tmp_path / "x.ckpt"
    resumed = run(2, _adds_up, 2, Draws, knobs, more, save[1:], str(file), 2)
    for (losses, end), (first, _), (rest, other) in zip(through, stopped, resumed, strict=True):
        assert first + rest == losses
        assert other == end
    assert files_of(file)[0]["parts"]["stepping"]["gradients"]


def _forgets(path: str, resume: bool) -> int:
    class Forgets(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return ((x, x, y) for x, y in zip(INPUTS[:40], TARGETS[:40], strict=True))

    lit = Draws()
    t = trainer(2, callbacks=[] if resume else [Saves(path, epoch=0, batch=4)], max_epochs=1)
    t.fit(lit, DataLoader(Forgets(), batch_size=4), held_out(), ckpt_path=path if resume else None)
    return len(lit.losses)


@pytest.mark.filterwarnings("ignore:`DataLoader` has no state, so this run begins its stream anew")
def test_a_stream_that_does_not_know_where_it_stood_begins_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert run(2, _forgets, path, False) == run(2, _forgets, path, True) == [10, 10]


@pytest.mark.few(0)
@pytest.mark.parametrize("at_meeting", ["adopt", "keep"])
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_a_resumed_run_continues_in_other_precisions(precision: str, at_meeting: str, tmp_path: Path) -> None:
    path, knobs = str(tmp_path / "x.ckpt"), {"mode": "none", "balance": "equal", "at_meeting": at_meeting}
    through = run(2, _through, 2, knobs, path, "validation", "shared", False, precision)
    assert through == run(2, _through, 2, knobs, path, "validation", "shared", True, precision)


def _scaled(path: str, resume: bool) -> list[float]:
    """The scaler's factor at the save, or when everything is restored."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 if resume else 5 + rank()))
    plugin, save, factor = MixedPrecision("16-mixed", "cpu", scaler), Saves(path, epoch=0), []
    t = trainer(2, plugins=[plugin], callbacks=[] if resume else [save], max_epochs=1)
    look_when_put_back(t, lambda _: factor.append(scaler.get_scale()))
    t.fit(Draws(), samples(), held_out(), ckpt_path=path if resume else None)
    return factor


def test_each_rank_has_its_own_scaler_back(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert run(2, _scaled, path, False) == run(2, _scaled, path, True) == [[32.0], [64.0]]


# -- another world -----------------------------------------------------------------------------------------------------


class ByNumPy(Draws):
    """Its learning rates are NumPy's numbers."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return [optimizer], [LambdaLR(optimizer, lambda epoch: 0.5 * (1 + np.cos(epoch / 4)))]


class StandsInNumPy(Stateful):
    """Its state is an array, which `weights_only` does not read."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": np.array([self.at])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = int(state["at"][0])


def _by_numpy(path: str, resume: bool) -> Any:
    seed()
    lit, save = ByNumPy(), Saves(path, epoch=1, batch=4)
    t = trainer(2, knobs={"mode": "none"}, max_epochs=3, callbacks=[save], use_distributed_sampler=False)
    t.fit(lit, StandsInNumPy(rank(), 2), held_out(), ckpt_path=path if resume else None, weights_only=False)
    return lit.losses if resume else lit.losses[save.losses :], weights(lit)


@pytest.mark.few(0)
def test_what_weights_only_does_not_read_is_read_for_who_says_so(tmp_path: Path) -> None:
    """Of all ranks, and not of the main file alone: a file that cannot be read would be warned about."""
    path = str(tmp_path / "x.ckpt")
    assert run(2, _by_numpy, path, False) == run(2, _by_numpy, path, True)


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path) -> None:
    torch.save(primitive({"rates": [np.float64(0.5), (np.int32(3), None)], "on": np.bool_(True)}), tmp_path / "x")
    assert torch.load(tmp_path / "x", weights_only=True) == {"rates": [0.5, (3, None)], "on": True}


def _data_of(t: L.Trainer) -> list[dict[str, Any]]:
    """Every rank says that it completed ten positions of its own, and two with all others. Returns what it is told."""
    told: list[dict[str, Any]] = []
    feeding = t.strategy.feeding  # type: ignore[attr-defined]
    feeding.state_dict = lambda: {"epoch": 0, "done": torch.tensor([[100, 2], [10 * rank(), 10]])}
    feeding.load_state_dict = told.append
    return told


def _own(t: L.Trainer) -> dict[str, Any]:
    """This rank's own weights by name, whatever stands in for them."""
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    names = {id(p): name for name, p in t.lightning_module.named_parameters()}
    parts = strategy.replica.parts(strategy.replica.own)
    return {names[id(p)]: part.tolist() for (p, _), part in zip(strategy.replica.places, parts, strict=True)}


def _world(n: int, knobs: dict[str, Any], path: str, resume: bool) -> dict[str, Any]:
    seed()
    lit, save = Draws(), Saves(path, epoch=0)
    t = trainer(n, knobs=knobs, max_epochs=2, callbacks=[SpeedFaults(step_seconds=0.002)] + [save] * (not resume))
    told, seen = _data_of(t), look_when_put_back(t, lambda t: {**look(t), "by name": _own(t)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    said = [str(w.message) for w in caught if "does not go on to the bit" in str(w.message)]
    return {"seen": (seen if resume else [save.seen])[0], "end": weights(lit), "told": plain(told), "said": said}


@pytest.mark.few(1)
@pytest.mark.parametrize(("before", "after", "at_meeting"), [(3, 2, "keep"), (3, 2, "adopt"), (2, 3, "keep")])
def test_another_world_goes_on_from_the_consensus_and_says_so(
    before: int, after: int, at_meeting: str, tmp_path: Path
) -> None:
    path, knobs = tmp_path / "x.ckpt", {"at_meeting": at_meeting, "mode": "push_sum"}
    saved = run(before, _world, before, knobs, str(path), False)
    restored = run(after, _world, after, knobs, str(path), True)
    main = torch.load(path, weights_only=True)["state_dict"]
    for r, one in enumerate(restored):
        old = saved[r % before]["seen"]
        assert one["seen"]["shown"] == old["shown"]
        assert one["seen"]["own"] == restored[0]["seen"]["own"]
        assert one["seen"]["optimizers"] == old["optimizers"]
        assert one["seen"]["moments"] == old["moments"]
        assert one["seen"]["random"] != old["random"]
        assert one["seen"]["steps"] == 0
        assert one["end"] == restored[0]["end"]
        assert one["told"] == plain([{"epoch": 0, "done": torch.tensor([[0, 10 * before], [100, 2]])}])
        assert len(one["said"]) == (r == 0)
        assert one["seen"]["by name"] == {name: main[name].flatten().tolist() for name in one["seen"]["by name"]}
    for ranks in (saved, restored):  # what was born with the ranks of then, and of now
        assert sum(one["seen"]["algorithm"]["mass"] for one in ranks) == len(ranks) * 4 * UNIT
    sentence = restored[0]["said"][0]
    assert f"it was saved by {before} ranks, and there are {after}" in sentence
    assert "All ranks start from the consensus" in sentence
    assert "nobody goes on with the others' streams" in sentence
    assert sentence.endswith("The state of the method (masses, turns, steps) and the random states begin anew")


CUT_ANEW = "The server's shards are cut anew for the members of now"
TAKEN_OVER = {
    "async_global": (AsyncGlobalStrategy, CUT_ANEW),
    "cyclic_delay": (partial(CyclicDelayStrategy, push="gradient"), CUT_ANEW),
    "lazy_sign": (LazySignStrategy, "What ranks had held back (error feedback) is shared out among the ranks of now"),
}


def _taken_over(n: int, name: str, path: str, resume: bool) -> list[str]:
    t = trainer(n, strategy=TAKEN_OVER[name][0](), callbacks=[] if resume else [Saves(path, epoch=0)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(Draws(), samples(), held_out(), ckpt_path=path if resume else None)
    return [str(w.message) for w in caught if "does not go on to the bit" in str(w.message)]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", TAKEN_OVER)
def test_another_world_says_what_of_the_method_goes_on(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    run(2, _taken_over, 2, name, path, False)
    ((sentence,),) = run(1, _taken_over, 1, name, path, True)
    assert f"{TAKEN_OVER[name][1]}" in sentence
    assert sentence.endswith("What else the method knew (masses, turns, steps) and the random states begin anew")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", TAKEN_OVER)
def test_the_world_of_before_a_death_goes_on_with_what_the_living_saved(name: str, tmp_path: Path) -> None:
    """As with another number of ranks; whose shards nobody saved begin anew."""
    path = tmp_path / "x.ckpt"
    run(2, _taken_over, 2, name, str(path), False)
    main = torch.load(path, weights_only=True)
    main["lightning_async"]["ranks"] = [1]
    torch.save(main, path)
    (sentence,), _ = run(2, _taken_over, 2, name, str(path), True)
    assert "rank 0 had died before it was saved. All ranks start from the consensus" in sentence
    assert f"{TAKEN_OVER[name][1]}" in sentence


class SeenBySave(Saves):
    """Remembers which samples this rank had trained on."""

    def _save(self, trainer: Any, module: Any) -> None:
        super()._save(trainer, module)
        self.samples = list(module.seen)


def _one_epoch(n: int, knobs: dict[str, Any], path: str, resume: bool) -> list[int]:
    """The samples trained on until the save, or from there to the end of the epoch."""
    lit, save = Lit(), SeenBySave(path, epoch=0, batch=2)
    pace = SpeedFaults(step_seconds=0.004)
    t = trainer(n, knobs=knobs, max_epochs=1, callbacks=[pace] if resume else [pace, save])
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    return lit.seen if resume else save.samples


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:.*does not go on to the bit")
@pytest.mark.parametrize("balance", ["claim", "equal"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 2), (2, 3)])
def test_no_completed_sample_is_repeated_or_lost(before: int, after: int, balance: str, tmp_path: Path) -> None:
    path, knobs = str(tmp_path / "x.ckpt"), {"balance": balance}
    seen = Counter(i for ranks in run(before, _one_epoch, before, knobs, path, False) for i in ranks)
    assert set(seen.values()) == {1}
    assert len(seen) == 12 * before
    seen += Counter(i for ranks in run(after, _one_epoch, after, knobs, path, True) for i in ranks)
    assert len(seen) == 80
    repeated = sum(seen.values()) - 80
    assert repeated == (0 if balance == "claim" else -(80 - 12 * before) % after)  # equal shares are padded


def test_another_method_goes_on_from_the_consensus(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    saved = run(2, _world, 2, {"mode": "push_sum"}, str(path), False)
    restored = run(2, _world, 2, {"mode": "pairwise"}, str(path), True)
    assert restored[1]["seen"]["optimizers"] == saved[1]["seen"]["optimizers"]
    (sentence,) = restored[0]["said"]
    assert "it was saved by gossip_ring (PushSum), and this is gossip_ring (Pairwise)" in sentence


def test_a_missing_file_of_one_rank_is_said_and_all_go_on_from_the_consensus(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    saved = run(2, _world, 2, {}, str(path), False)
    (name,) = tmp_path.rglob("*.rank1.ckpt")
    name.unlink()
    first, second = run(2, _world, 2, {}, str(path), True)
    assert first["seen"]["steps"] == second["seen"]["steps"] == 0
    assert first["seen"]["optimizers"] == second["seen"]["optimizers"] == saved[0]["seen"]["optimizers"]
    (sentence,) = first["said"]
    assert f"{name} cannot be read (FileNotFoundError" in sentence


class Validated(L.Callback):
    """At which steps of the run this rank validated."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


def _counted(folder: Path, path: Path | None) -> tuple[list[int], int]:
    validated = Validated()
    save: Any = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    pace = SpeedFaults(step_seconds=0.006, slow={1: 4.0})
    counts: dict[str, Any] = {"max_steps": 14, "max_epochs": -1, "val_check_interval": 3}
    counts |= {"check_val_every_n_epoch": None, "enable_checkpointing": True}
    t = trainer(2, callbacks=[pace, validated, save], **counts)
    t.fit(Lit(), loader(), held_out(), ckpt_path=path)
    return validated.at, t.global_step


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*does not go on to the bit", "ignore:.*exists and is not empty")
def test_whose_file_is_missing_counts_as_the_others_do(tmp_path: Path) -> None:
    """What it did itself, and Lightning counts, is not what all did: it is the slow one."""
    run(2, _counted, tmp_path, None)
    (file,) = (tmp_path / "step=6.ckpt.ranks").glob("*.rank1.ckpt")
    file.unlink()
    assert run(2, _counted, tmp_path, tmp_path / "step=6.ckpt") == [([9, 12], 14)] * 2


def _batches(sizes: tuple[int, int], path: str, resume: bool) -> dict[str, Any]:
    """What a rank of push-sum holds when it begins, and whether it posts."""
    save, pace = Saves(path, epoch=0, batch=4), SpeedFaults(step_seconds=0.002)
    t = trainer(2, knobs={"mode": "push_sum", "at_meeting": "keep"}, callbacks=[pace] if resume else [pace, save])
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    algorithm: Any = strategy.algorithm
    begun = look_when_put_back(t, lambda _: (algorithm.mass, strategy.replica.own.tolist()))
    posted: list[int] = []
    algorithm_push = algorithm._push

    def push(replica: Any, mail: Any) -> None:
        before = algorithm.mass
        algorithm_push(replica, mail)
        posted.append(before - algorithm.mass)

    algorithm._push = push
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(Lit(), loader(sizes[rank()], n=160), held_out(), ckpt_path=path if resume else None)
    said = [str(w.message) for w in caught if "masses begin anew" in str(w.message)]
    return {"begun": begun[0], "posted": sum(posted), "said": said, "saved": save.seen.get("own")}


@pytest.mark.few(0)
@pytest.mark.parametrize(("sizes", "who"), [((4, 16), "1"), ((16, 16), "0, 1")])
def test_other_batch_sizes_begin_with_masses_of_now_and_the_consensus(
    sizes: tuple[int, int], who: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "x.ckpt")
    saved = run(2, _batches, (4, 4), path, False)
    assert saved[0]["saved"] != saved[1]["saved"]
    first, second = run(2, _batches, sizes, path, True)
    assert [first["begun"][0], second["begun"][0]] == [size * UNIT for size in sizes]
    assert first["begun"][1] == second["begun"][1]
    assert first["posted"] + second["posted"] > 0
    (sentence,) = first["said"]
    assert f"the batch of rank {who} has another size than when the run was saved" in sentence
    assert not second["said"]


# -- plain Lightning, and what is refused ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two ranks after one of two epochs."""
    run(2, _through, 2, {"mode": "none", "balance": "equal"}, str(tmp_path / "x.ckpt"), "validation", "shared", False)
    return tmp_path / "x.ckpt"


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_the_main_file_is_an_ordinary_checkpoint(saved: Path) -> None:
    lit = Draws()
    t = L.Trainer(
        strategy="auto",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
    )
    t.fit(lit, samples(), held_out(), ckpt_path=str(saved))
    assert t.current_epoch == 2
    main = torch.load(saved, weights_only=True)
    assert set(Draws.load_from_checkpoint(saved).state_dict()) == set(main["state_dict"])
    assert sorted(files_of(saved)) == [0, 1]


def _fits(path: str) -> Any:
    lit = Draws()
    t = trainer(2)
    seen = look_when_put_back(t)
    t.fit(lit, samples(), held_out(), ckpt_path=path)
    return seen[0]["steps"], weights(lit)


@pytest.mark.few(1)
def test_a_checkpoint_without_our_word_loads_as_always(saved: Path) -> None:
    main = torch.load(saved, weights_only=True)
    del main["lightning_async"]
    torch.save(main, saved)
    (steps, first), (_, second) = run(2, _fits, str(saved))
    assert steps == 0
    assert first == second


def test_a_newer_form_is_refused_for_training_only(saved: Path) -> None:
    main = torch.load(saved, weights_only=True)
    main["lightning_async"] = {"version": 99}
    torch.save(main, saved)
    with Forked(2, _fits, str(saved)) as forked:
        results = forked.results(30)
    assert {r.kind for r in results} <= {MisconfigurationException.__name__, "PeerFailedError"}
    assert all("was written by a newer lightning_async (form 99; this one knows 1)" in r.error for r in results)
    assert run(2, _validates, str(saved))[0] > 0


def _validates(path: str) -> float:
    t = trainer(2)
    t.validate(Draws(), held_out(), ckpt_path=path, verbose=False)
    return float(t.callback_metrics["val"])


class Progress:
    """A part that somebody else adds."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def _with_part(path: str, resume: bool) -> int:
    part, strategy = Progress(), GossipRingStrategy()
    strategy.checkpoints.parts["progress"] = part
    part.count = 0 if resume else 5 + rank()
    t = trainer(2, strategy=strategy, callbacks=[] if resume else [Saves(path, epoch=0)], max_epochs=1)
    t.fit(Lit(), samples(), held_out(), ckpt_path=path if resume else None)
    return part.count


def test_other_parts_are_saved_and_put_back(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert run(2, _with_part, path, False) == run(2, _with_part, path, True) == [5, 6]
