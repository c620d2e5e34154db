"""Whenever a save is cut short, a whole checkpoint is there; and what is replaced or removed leaves nothing over."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_async import SpeedFaults
from lightning_async.strategies import compat, late_files
from lightning_async.strategies.rank_files import rank_file
from tests.strategies.lit import Lit, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import (
    Draws,
    assert_nothing_over,
    files_of,
    held_out,
    look_when_put_back,
    rank,
    samples,
)
from tests.strategies.stores import Dies, DiesWriting, Elsewhere, Full, Recorded, SavesTwice

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:.*multiple `ModelCheckpoint`", "ignore:Using `DistributedSampler` with"
)


# -- a save that is cut short ------------------------------------------------------------------------------------------


def _dies(folder: str, dead: int, at: int, patience: float, kind: type[Dies] | type[DiesWriting] = Dies) -> int:
    io = kind(at=at if rank() == dead else -1)

    def arm() -> None:
        io.armed = True

    knobs = {"silence": min(0.5, patience), "patience": patience}
    n = int(os.environ["WORLD_SIZE"])
    t = trainer(n, plugins=[io], callbacks=[SavesTwice(f"{folder}/x.ckpt", arm)], knobs=knobs)
    t.fit(Draws(), samples(), held_out())
    return t.current_epoch


def _resumes(folder: str) -> Any:
    """To the bit: the sentence that says otherwise would be an error."""
    lit = Draws()
    t = trainer(int(os.environ["WORLD_SIZE"]), max_epochs=3)
    seen = look_when_put_back(t)
    t.fit(lit, samples(), held_out(), ckpt_path=f"{folder}/x.ckpt")
    return seen[0]["epoch"], weights(lit)


STAGES = [
    (0, 0, "before the index"),
    (0, 1, "before its own file"),
    (0, 2, "before the main file"),
    (0, 3, "before the old files go"),
    (0, 4, "while the old files go"),
    (1, 0, "before its own file"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("dead", "at", "when"), STAGES)
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(dead: int, at: int, when: str, tmp_path: Path) -> None:
    with Forked(2, _dies, str(tmp_path), dead, at, 60.0, store=True) as forked:
        forked.processes[dead].join(30)  # the others are killed with it
    main = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert main["epoch"] == (0 if at < 3 else 1)
    assert all(own["save"] == main["lightning_async"]["save"] for own in files_of(tmp_path / "x.ckpt").values())
    (epoch, first), (_, second) = run(2, _resumes, str(tmp_path))
    assert first == second
    assert epoch == main["epoch"]


@pytest.mark.few(1)
@pytest.mark.parametrize(("dead", "at", "what"), [(0, 2, "x.ckpt"), (0, 0, "index"), (0, 1, "rank0"), (1, 0, "rank1")])
def test_a_kill_in_the_middle_of_a_write_leaves_a_whole_checkpoint(
    dead: int, at: int, what: str, tmp_path: Path
) -> None:
    with Forked(2, _dies, str(tmp_path), dead, at, 60.0, DiesWriting, store=True) as forked:
        forked.processes[dead].join(30)
    assert any(what in part.name for part in tmp_path.rglob("*.part"))  # and perhaps of others, killed with it
    main = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert main["epoch"] == 0
    assert all(own["save"] == main["lightning_async"]["save"] for own in files_of(tmp_path / "x.ckpt").values())
    run(2, _dies, str(tmp_path), -1, 0, 60.0, DiesWriting)
    assert_nothing_over(tmp_path)


@pytest.mark.few(0)
def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path: Path) -> None:
    with Forked(2, _dies, str(tmp_path), 0, 2, 60.0, store=True) as forked:
        forked.processes[0].join(30)
    assert len(list(tmp_path.rglob("*.rank?.ckpt"))) == 4
    run(2, _dies, str(tmp_path), -1, 0, 60.0)
    assert_nothing_over(tmp_path)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dead", "at"), [(0, 2), (0, 1), (2, 0)])
def test_those_who_live_finish_the_save(dead: int, at: int, tmp_path: Path) -> None:
    with Forked(3, _dies, str(tmp_path), dead, at, 2.0, store=True) as forked:
        results = forked.results(60)
    assert [r.kind for r in results] == ["gone" if r == dead else None for r in range(3)]
    main = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert main["epoch"] == 1
    assert main["lightning_async"]["ranks"] == [r for r in range(3) if r != dead]
    assert_nothing_over(tmp_path)


def _fills(folder: str, full: int, what: str, kind: type[Full] = Full) -> Any:
    io = kind(what)

    def arm() -> None:
        io.full = rank() == full

    t = trainer(2, plugins=[io], callbacks=[SavesTwice(f"{folder}/x.ckpt", arm)])
    t.fit(Draws(), samples(), held_out())


@pytest.mark.few(1)
@pytest.mark.parametrize(("full", "what"), [(0, "index"), (0, "rank0"), (1, "rank1"), (0, "x.ckpt")])
def test_a_full_disk_on_one_rank_is_raised_on_all_and_the_old_checkpoint_stays(
    full: int, what: str, tmp_path: Path
) -> None:
    with Forked(2, _fills, str(tmp_path), full, what) as forked:
        results = forked.results(20)
    assert results[full].kind == "OSError"
    assert results[1 - full].kind == "PeerFailedError"
    assert f"rank {full} could not write its part of the checkpoint" in results[1 - full].error
    assert "No space left on device" in results[1 - full].error
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["epoch"] == 0
    assert_nothing_over(tmp_path)
    (_, first), (_, second) = run(2, _resumes, str(tmp_path))
    assert first == second


# -- after the run -----------------------------------------------------------------------------------------------------


def _saves_afterwards(path: str) -> tuple[bool, list[float], list[float]]:
    said: list[str] = []
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    lit, t = Draws(), trainer(2, max_epochs=1)
    t.fit(lit, samples(), held_out())
    t.save_checkpoint(path)
    again = Draws()
    trainer(2, max_epochs=2).fit(again, samples(), held_out(), ckpt_path=path)
    return any("only the first one's" in sentence for sentence in said), weights(lit), weights(again)


def test_a_checkpoint_saved_after_fit_is_the_consensus_and_says_what_it_lacks(tmp_path: Path) -> None:
    (said, first, one), (_, second, other) = run(2, _saves_afterwards, str(tmp_path / "x.ckpt"))
    assert said
    assert first == second
    saved = Draws()
    saved.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    assert weights(saved) == first
    assert not (tmp_path / "x.ckpt.ranks").exists()
    assert one == other, "all go on from it"


# -- other stores, and rotation ----------------------------------------------------------------------------------------


def _rotates(folder: str, io: str, options: dict[str, Any], resume: str | None = None) -> Any:
    stores = {"plain": Recorded, "async": AsyncCheckpointIO, "elsewhere": lambda: Elsewhere(f"{folder}/store")}
    saved = ModelCheckpoint(f"{folder}/saved", **{"filename": "{epoch}-{step}", **options})
    slow = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    epochs = 5 if resume else 4
    t = trainer(2, enable_checkpointing=True, plugins=[stores[io]()], callbacks=[saved, slow], max_epochs=epochs)
    lit, seen = Draws(), look_when_put_back(t)
    t.fit(lit, samples(), held_out(), ckpt_path=resume)
    return {
        "best": saved.best_model_path,
        "last": saved.last_model_path,
        "start": seen[0]["steps"],
        "end": weights(lit),
    }


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {"save_top_k": 1},
        {"save_top_k": 2, "monitor": "val", "save_last": True},
        {"save_top_k": 1, "save_last": "link"},
        {"save_top_k": 1, "filename": "same", "enable_version_counter": False},
    ],
)
def test_what_rotates_out_leaves_no_files(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = run(2, _rotates, str(tmp_path), "plain", options)
    assert first["best"] == second["best"]
    assert_nothing_over(tmp_path / "saved")
    if "save_last" in options:  # what an earlier run left rotates out too
        again, also = run(2, _rotates, str(tmp_path), "plain", options, first["last"])
        assert again["start"] > 0
        assert again["end"] == also["end"]
        assert_nothing_over(tmp_path / "saved")


class Calls(Lit):
    """Each rank logs a number of its own, after which its files are called."""

    def __init__(self, own: Callable[[int, int], float]) -> None:
        super().__init__()
        self.own = own

    def on_validation_epoch_end(self) -> None:
        self.log("own", self.own(self.global_rank, self.current_epoch))


OWN: dict[str, Callable[[int, int], float]] = {
    "the first calls two the same": lambda rank, epoch: 10.0 + epoch if rank else epoch // 2,
    "the other calls all the same": lambda rank, epoch: 10.0 if rank else epoch,
    "never the same": lambda rank, epoch: 10.0 * rank + epoch,
}
APART: dict[str, Callable[[int, int], float]] = {
    "best at other times": lambda rank, epoch: ([10.0, 5.0, 1.0, 0.5] if rank else [0.0, 1.0, 0.5, 2.0])[epoch]
}


def _calls(folder: str, law: str, more: dict[str, Any]) -> tuple[str, int, list[float]]:
    warnings.filterwarnings("ignore", ".*sync_dist=True")
    saved = ModelCheckpoint(f"{folder}/saved", **{"filename": "{own:.1f}", "save_top_k": 1, **more})
    own = {**OWN, **APART}[law]
    slow = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    asks = LambdaCallback(on_train_start=lambda t, _: t.is_global_zero and saved.format_checkpoint_name({}))  # alone
    t = trainer(2, enable_checkpointing=True, callbacks=[saved, slow, asks], max_epochs=3)
    t.fit(Calls(own), samples(), held_out())
    t.fit_loop.max_epochs, best = 4, saved.best_model_path
    again, seen = Calls(own), look_when_put_back(t)
    t.fit(again, samples(), held_out(), ckpt_path="best")
    return os.path.basename(best), seen[0]["global_step"], weights(again)


@pytest.mark.few(0)
@pytest.mark.parametrize("law", OWN)
@pytest.mark.parametrize("more", [{}, {"save_last": True}, {"monitor": "val"}], ids=str)
def test_files_that_each_rank_calls_otherwise_are_called_as_the_first_rank_does(
    law: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """Names made of what is logged without `sync_dist`; the slow rank finds the best file by its name all the same."""
    first, second = run(2, _calls, str(tmp_path), law, more)
    assert first == second
    best, steps, _ = first
    names = [f"own={OWN[law](0, epoch):.1f}.ckpt" for epoch in range(3)]
    assert best in names if "monitor" in more else best == names[2]
    assert steps > 0
    assert_nothing_over(tmp_path / "saved")


def _ranks_otherwise(folder: str) -> tuple[str, int, list[float]]:
    return _calls(folder, "best at other times", {"monitor": "own", "filename": "best", "save_top_k": 2})


@pytest.mark.few(0)
def test_the_best_are_the_first_ranks_best(tmp_path: Path) -> None:
    """Two are kept, under names that come again; the third takes the place of the first rank's worst, on all ranks."""
    first, second = run(2, _ranks_otherwise, str(tmp_path))
    assert first == second
    assert first[0] == "best.ckpt"
    assert_nothing_over(tmp_path / "saved")


@pytest.mark.few(0)
def test_files_may_be_written_later(tmp_path: Path) -> None:
    options = {"save_top_k": 1, "filename": "same", "enable_version_counter": False}
    first, _ = run(2, _rotates, str(tmp_path), "async", options)
    assert sorted(files_of(Path(first["best"]))) == [0, 1]
    again, also = run(2, _rotates, str(tmp_path), "async", options, first["best"])
    assert again["start"] > 0
    assert again["end"] == also["end"]


class Gated(TorchCheckpointIO):
    """Writes nothing before the gate is open: as a disk that is slower than the training.

    Attributes:
        early: Main files that were written before all the files that they name.
    """

    def __init__(self, gate: Event) -> None:
        self.gate = gate
        self.early: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        assert self.gate.wait(30)
        shared = checkpoint.get("lightning_async", {"ranks": []})
        if not all(os.path.exists(rank_file(path, shared["save"], r)) for r in shared["ranks"]):
            self.early.append(path)
        super().save_checkpoint(checkpoint, path, storage_options)


class Opens(Callback):
    """Opens the gate at the end: all was asked for by then."""

    def __init__(self, gate: Event) -> None:
        self.gate = gate

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.gate.set()


def _lags(folder: str, slow: list[int], options: dict[str, Any]) -> tuple[str, list[str]]:
    gate = Event()
    if rank() not in slow:
        gate.set()
    saved = ModelCheckpoint(f"{folder}/saved", **{"filename": "{epoch}", **options})
    inner = Gated(gate)
    io = AsyncCheckpointIO(inner)
    t = trainer(2, enable_checkpointing=True, plugins=[io], callbacks=[saved, Opens(gate)], max_epochs=3)
    t.fit(Draws(), samples(), held_out())
    return saved.best_model_path, inner.early


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [[0], [1], [0, 1]])
@pytest.mark.parametrize(
    "options", [{"save_top_k": 1}, {"save_top_k": 1, "filename": "same", "enable_version_counter": False}]
)
def test_what_is_written_after_it_rotated_out_is_removed_all_the_same(
    slow: list[int], options: dict[str, Any], tmp_path: Path
) -> None:
    (best, early), _ = run(2, _lags, str(tmp_path), slow, options)
    assert not early, "a main file came before the files that it names"
    assert sorted(files_of(Path(best))) == [0, 1]
    assert_nothing_over(tmp_path / "saved")


class Later(Callback):
    """Two saves at one path, written later; when the first one is on the disk, `arm` is called."""

    def __init__(self, path: str, io: AsyncCheckpointIO, arm: Callable[[], None]) -> None:
        self.path, self.io, self.arm = path, io, arm

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            if trainer.current_epoch == 1:
                written = Event()
                compat.behind_writes(self.io, written.set)
                assert written.wait(30)
                self.arm()
            trainer.save_checkpoint(self.path)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2:  # the second save is under way: rank 0 has written its part, rank 1 cannot
            while rank() == 0 and len(list(Path(f"{self.path}.ranks").glob("*.rank0.ckpt"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def _killed_later(path: str) -> None:
    gate = Event()
    gate.set()
    io = AsyncCheckpointIO(Gated(gate))
    arm = gate.clear if rank() == 1 else (lambda: None)
    trainer(2, plugins=[io], callbacks=[Later(path, io, arm)], max_epochs=3).fit(Draws(), samples(), held_out())


def test_a_kill_while_a_rank_has_still_to_write_leaves_the_checkpoint_of_before(tmp_path: Path) -> None:
    with Forked(2, _killed_later, str(tmp_path / "x.ckpt"), store=True) as forked:
        assert [result.kind for result in forked.results(30)] == ["gone", "gone"]
    main = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert main["epoch"] == 0
    assert all(own["save"] == main["lightning_async"]["save"] for own in files_of(tmp_path / "x.ckpt").values())
    (epoch, first), (_, second) = run(2, _resumes, str(tmp_path))
    assert first == second
    assert epoch == 0


class Ended:
    """A gate that opens when rank 0 has left the run."""

    def __init__(self, sign: Path) -> None:
        self.sign, self.shut = sign, False

    def clear(self) -> None:
        self.shut = True

    def wait(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while self.shut and not self.sign.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return not self.shut or self.sign.exists()


class Fails(Later):
    """Rank 0 fails while rank 1 has still to write."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2 and rank() == 0:
            raise ValueError("of the user's")


def _fails_later(path: str) -> None:
    late_files.LEAVE_FAILED = 0.2
    gate = Ended(Path(path).with_suffix(".sign"))
    io = AsyncCheckpointIO(Gated(gate))  # type: ignore[arg-type]
    arm = gate.clear if rank() == 1 else (lambda: None)
    try:
        trainer(2, plugins=[io], callbacks=[Fails(path, io, arm)], max_epochs=3).fit(Draws(), samples(), held_out())
    finally:
        if rank() == 0:
            gate.sign.touch()


def test_a_run_that_failed_does_not_wait_for_the_disks_of_others(tmp_path: Path) -> None:
    with Forked(2, _fails_later, str(tmp_path / "x.ckpt")) as forked:
        assert [result.kind for result in forked.results(60)] == ["ValueError", "PeerFailedError"]
    main = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert main["epoch"] == 0
    assert all(own["save"] == main["lightning_async"]["save"] for own in files_of(tmp_path / "x.ckpt").values())


def _fills_later(path: str, full: int, what: str) -> None:
    inner = Full(what)
    io = AsyncCheckpointIO(inner)

    def arm() -> None:
        inner.full = rank() == full

    trainer(2, plugins=[io], callbacks=[Later(path, io, arm)]).fit(Draws(), samples(), held_out())


@pytest.mark.few(1)
@pytest.mark.parametrize(("full", "what"), [(1, "rank1"), (0, "rank0"), (0, "x.ckpt")])
def test_a_disk_that_was_full_later_is_raised_on_all_and_the_old_checkpoint_stays(
    full: int, what: str, tmp_path: Path
) -> None:
    with Forked(2, _fills_later, str(tmp_path / "x.ckpt"), full, what) as forked:
        results = forked.results(30)
    assert results[full].kind == "OSError"
    assert results[1 - full].kind == "PeerFailedError"
    # by its word in the next save, or when that rank has stopped by then because of it
    assert re.match(f"rank {full} (could not write its |stopped: OSError)", results[1 - full].error)
    assert "No space left on device" in results[1 - full].error
    main = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert main["epoch"] == 0
    assert all(own["save"] == main["lightning_async"]["save"] for own in files_of(tmp_path / "x.ckpt").values())


@pytest.mark.few(0)
def test_files_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    options = {"save_top_k": 1}
    first, _ = run(2, _rotates, str(tmp_path), "elsewhere", options)
    store, best = Elsewhere(f"{tmp_path}/store"), first["best"]
    assert len(store.names()) == 4
    assert all(name.startswith(best) for name in store.names())
    again, also = run(2, _rotates, str(tmp_path), "elsewhere", options, best)
    assert again["start"] > 0
    assert again["end"] == also["end"]
    assert all(name.startswith((best, again["best"])) for name in store.names())
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").rglob("*.ckpt"))


# -- what has no files beside it ---------------------------------------------------------------------------------------


def _between(path: str, met: bool) -> list[str]:
    """Saved in a batch hook, perhaps when all have saved there in the epoch before."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (int(met), 1):
                trainer.save_checkpoint(path)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if met and trainer.current_epoch == 0 and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(2, callbacks=[Saves()], max_epochs=1 + met).fit(Lit(), samples(), held_out())
    return [str(w.message) for w in caught if "not the consensus" in str(w.message)]


def test_what_one_rank_saves_does_not_take_the_place_of_what_all_saved(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    (sentence,), none = run(2, _between, str(path), True)
    assert not none
    assert f"the ranks are not together, so {path}.rank0 holds the weights of this one" in sentence
    assert "lightning_async" not in torch.load(f"{path}.rank0", weights_only=True)
    assert sorted(files_of(path)) == [0, 1]
    assert torch.load(path, weights_only=True)["epoch"] == 0


def test_between_meetings_no_rank_writes_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = run(2, _between, str(tmp_path / "x.ckpt"), False)
    assert len(first) == 1
    assert not second
    assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"]
    assert "lightning_async" not in torch.load(tmp_path / "x.ckpt", weights_only=True)


def _mere_weights(path: str) -> None:
    saved = ModelCheckpoint(path, save_weights_only=True, filename="x")
    t = trainer(2, enable_checkpointing=True, callbacks=[saved], max_epochs=1)
    t.fit(Lit(), samples(), held_out())


def test_mere_weights_have_no_files_beside_them(tmp_path: Path) -> None:
    run(2, _mere_weights, str(tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"]
