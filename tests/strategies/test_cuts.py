"""Checkpoints between meetings: nobody stops for one, it holds a state of the whole run, and one lost costs none."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_async.algorithms.cut import unpacked
from lightning_async.replica import Replica
from lightning_async.strategies import cut_first, late_files
from lightning_async.strategies.base import AsyncStrategy
from tests.strategies.cut_runs import (
    IGNORED,
    SAMPLES,
    N,
    Stepwise,
    assert_nothing_over_but,
    check_conserved,
    check_resumed,
    cuts_in,
    diary_of,
    done_of,
    fit,
    resumed_by_others,
    seen_by,
    wait_for,
)
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import (
    Draws,
    files_of,
    rank,
)

pytestmark = IGNORED


@pytest.mark.parametrize("mode", ["push_sum", "pairwise"])
@pytest.mark.few(1)
def test_a_checkpoint_is_written_while_everybody_trains_on_and_the_run_goes_on_from_it(
    mode: str, tmp_path: Path
) -> None:
    first = run(N, fit, str(tmp_path), mode)
    before = first[0]["entries"][0][0]  # meetings that all had had before the first batch
    assert len([1 for met, _, there in first[0]["entries"] if met == before and there]) > 1, "nobody met for it"
    assert sorted(seen_by(first)) == list(range(SAMPLES))
    paths = cuts_in(tmp_path)
    for path in paths:
        check_conserved(path, mode)
    (best,) = {one["best"] for one in first}
    assert Path(best).exists(), "all ranks know the last one by its name"
    assert_nothing_over_but(tmp_path, "diary")
    cut = paths[len(paths) // 2]
    main, own = torch.load(cut, weights_only=True), files_of(cut)
    check_resumed(cut, main, own, run(N, fit, str(tmp_path / "same"), mode, str(cut)))
    other = run(2, resumed_by_others, str(tmp_path / "other"), mode, str(cut))
    for one in other:
        lit = Draws.load_from_checkpoint(cut, map_location="cpu", weights_only=True)
        assert one["restored"]["own"] == Replica(lit.parameters()).flat.tolist()
    assert sorted(done_of(main) + seen_by(other)) == list(range(SAMPLES))


# -- faults ------------------------------------------------------------------------------------------------------------


def _stopped(folder: str) -> dict[str, Any]:
    """Rank 2 is stopped before its third batch, until somebody lets it go on."""

    def stop(trainer: L.Trainer, batches: int) -> None:
        if rank() == 2 and batches == 3:
            Path(folder, "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    return fit(folder, stops=stop, every=4)


@pytest.mark.few(0)
def test_a_stopped_rank_stops_nobody_while_a_cut_is_open(tmp_path: Path) -> None:
    """No clock decides: the others come on by so many batches while it stands, and then the cut is whole."""
    with Forked(N, _stopped, str(tmp_path), store=True) as forked:
        wait_for((tmp_path / "stopped").exists)
        wait_for(lambda: diary_of(tmp_path, 0)[1] is not None)
        (mine, number), (other, _) = diary_of(tmp_path, 0), diary_of(tmp_path, 1)
        wait_for(lambda: diary_of(tmp_path, 0)[0] >= mine + 25 and diary_of(tmp_path, 1)[0] >= other + 12)
        assert diary_of(tmp_path, 0)[1] == number
        assert not list(tmp_path.glob("*.ckpt"))
        forked.signal(2, signal.SIGCONT)
        told = forked.values()
    assert sorted(seen_by(told)) == list(range(SAMPLES))
    paths = cuts_in(tmp_path)
    assert paths
    for path in paths:
        check_conserved(path, "push_sum")


class KilledAtMain(TorchCheckpointIO):
    """Rank 0 is killed in the place of writing its second main file."""

    def __init__(self) -> None:
        self.mains = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.mains += os.path.basename(path) == "x.ckpt"
        if self.mains == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


X: dict[str, Any] = {"filename": "x", "save_top_k": 1, "enable_version_counter": False}


def _killed(folder: str) -> dict[str, Any]:
    return fit(folder, io=KilledAtMain() if rank() == 0 else None, **X)


def _again(folder: str) -> dict[str, Any]:
    return fit(folder, path=f"{folder}/x.ckpt", step=0.004, **X)


@pytest.mark.few(0)
def test_a_kill_in_the_middle_of_a_cut_leaves_the_one_before(tmp_path: Path) -> None:
    with Forked(N, _killed, str(tmp_path), store=True) as forked:
        forked.processes[0].join(40)
        assert forked.processes[0].exitcode == -signal.SIGKILL
    check_conserved(tmp_path / "x.ckpt", "push_sum")
    index = torch.load(tmp_path / "x.ckpt.ranks/index.ckpt", weights_only=True)
    assert len(index["saves"]) == 2, "the one before, and the one that was under way"
    main, own = torch.load(tmp_path / "x.ckpt", weights_only=True), files_of(tmp_path / "x.ckpt")
    check_resumed(tmp_path / "x.ckpt", main, own, run(N, _again, str(tmp_path)))
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["global_step"] > main["global_step"]
    assert_nothing_over_but(tmp_path, "diary")


class KilledBeforeMain(TorchCheckpointIO):
    """Rank 0 is killed in the place of its second main file, when the others have trained on behind their own files."""

    def __init__(self, folder: str) -> None:
        self.folder, self.mains = Path(folder), 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.mains += os.path.dirname(path) == str(self.folder)
        if self.mains == 2:
            before = [diary_of(self.folder, r)[0] for r in (1, 2)]
            wait_for(lambda: all(diary_of(self.folder, r)[0] > b + 4 for r, b in zip((1, 2), before, strict=True)))
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


def _killed_before_main(folder: str) -> dict[str, Any]:
    knobs = {"silence": 0.3, "patience": 5.0}
    return fit(folder, io=KilledBeforeMain(folder) if rank() == 0 else None, step=0.01, n=2400, knobs=knobs)


@pytest.mark.few(0)
def test_nobody_calls_a_checkpoint_by_a_name_of_a_file_that_does_not_come(tmp_path: Path) -> None:
    """Rank 0 dies between telling where to and the main file; those who live cut again at once."""
    with Forked(N, _killed_before_main, str(tmp_path), store=True) as forked:
        results = forked.results()
    assert [one.kind for one in results] == ["gone", None, None], results
    entries, named = (results[2].value[key] for key in ("entries", "named"))  # it is never the first, which knows early
    between = [(name, there) for met, name, there in named if met == entries[0][0]]  # all take the first's at a meeting
    assert all(there for _, there in between)
    assert len({name for name, _ in between}) > 1, "those that the living saved are known, too"
    assert Path(named[-1][1]).exists(), "and what a meeting names comes"
    for one in results[1:]:
        steps, last = one.value["saved_at"], Path(one.value["best"])
        assert any(b < a for a, b in pairwise(steps)), "what did not come is not saved"
        assert torch.load(last, weights_only=True)["lightning_async"]["ranks"] == [1, 2]


def _killed_when_all_know(folder: str) -> dict[str, Any]:
    """Rank 0, when all know the first checkpoint by its name."""

    def stop(trainer: L.Trainer, batches: int) -> None:
        if trainer.checkpoint_callback.best_model_path:  # type: ignore[union-attr]
            Path(folder, f"diary-knows{rank()}").touch()
        if rank() == 0 and all(Path(folder, f"diary-knows{r}").exists() for r in (1, 2)):
            os.kill(os.getpid(), signal.SIGKILL)

    return fit(folder, stops=stop, every=50, step=0.01, knobs={"silence": 0.3, "patience": 5.0})


@pytest.mark.few(0)
def test_a_meeting_does_not_save_what_a_cut_has_saved_whose_first_rank_died_since(tmp_path: Path) -> None:
    """80 steps: a cut at the 50th, which all that follow rank 0 remember; and no other save is due."""
    with Forked(N, _killed_when_all_know, str(tmp_path), store=True) as forked:
        results = forked.results()
    assert [one.kind for one in results] == ["gone", None, None], results
    (path,) = tmp_path.glob("*.ckpt")
    assert {one.value["best"] for one in results[1:]} == {str(path)}
    assert all(one.value["saved_at"][-1] >= 50 for one in results[1:])
    check_conserved(path, "push_sum")


def _dies(folder: str, dead: int) -> dict[str, Any]:
    """This rank dies in the place of its first record."""

    def die(trainer: L.Trainer, batches: int) -> None:
        if rank() == dead and batches == 1:
            strategy = trainer.strategy
            assert isinstance(strategy, AsyncStrategy)
            assert strategy.cuts._mail is not None
            strategy.cuts._mail._state = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]

    cut_first.AGAIN = 0.2
    return fit(folder, stops=die, step=0.01, n=2400, knobs={"silence": 0.3, "patience": 5.0})


@pytest.mark.few(0)
@pytest.mark.parametrize("dead", [1, 0])
def test_those_who_live_give_it_up_and_cut_again(dead: int, tmp_path: Path) -> None:
    with Forked(N, _dies, str(tmp_path), dead, store=True) as forked:
        results = forked.results()
    living = [r for r in range(N) if r != dead]
    assert [one.kind for one in results] == ["gone" if r == dead else None for r in range(N)], results
    for path in cuts_in(tmp_path):
        assert torch.load(path, weights_only=True)["lightning_async"]["ranks"] == living
        assert {unpacked(file["cut"]).members for file in files_of(path).values()} == {tuple(living)}
    assert cuts_in(tmp_path)


def _dies_behind_its_markers(folder: str) -> dict[str, Any]:
    """Rank 1 has recorded with rank 0 when that dies; rank 2 is in a long batch, and records when it knows."""

    def stop(trainer: L.Trainer, batches: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        assert strategy.cuts._mail is not None
        if rank() == 1 and strategy.cuts._mail._newest:
            Path(folder, "diary-recorded").touch()
        if rank() == 0 and strategy.cuts._mail._newest:
            wait_for(lambda: all(Path(folder, f"diary-{name}").exists() for name in ("recorded", "held")))
            os.kill(os.getpid(), signal.SIGKILL)
        if rank() == 2 and batches == 3:
            Path(folder, "diary-held").touch()
            wait_for(lambda: 0 not in strategy.office.carrier.members())

    return fit(folder, stops=stop, step=0.01, n=2400, knobs={"silence": 0.3, "patience": 5.0})


@pytest.mark.few(0)
def test_who_recorded_without_the_dead_cuts_again_too(tmp_path: Path) -> None:
    """Its part of the cut that the dead had begun is complete, and nobody will ever say where to."""
    with Forked(N, _dies_behind_its_markers, str(tmp_path), store=True) as forked:
        results = forked.results()
    assert [one.kind for one in results] == ["gone", None, None], results
    assert len(cuts_in(tmp_path)) > 2
    for path in cuts_in(tmp_path):
        assert torch.load(path, weights_only=True)["lightning_async"]["ranks"] == [1, 2]


def _met_meanwhile(folder: str) -> dict[str, Any]:
    """Rank 0's disk takes the index of a cut only when all have met."""
    met = Event()

    class Waits(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            assert "index" not in os.path.basename(path) or met.wait(30)
            super().save_checkpoint(checkpoint, path, storage_options)

    def arm(trainer: L.Trainer, batches: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        if batches == 1:
            meet = strategy.cuts.meet
            strategy.cuts.meet = lambda: met.set() or meet()  # type: ignore[method-assign,func-returns-value]

    return fit(folder, stops=arm, io=Waits())


@pytest.mark.few(0)
def test_a_meeting_finds_a_cut_that_is_to_be_written(tmp_path: Path) -> None:
    """What it says is as of the cut, and not of the meeting at which the others hear of it."""
    run(2, _met_meanwhile, str(tmp_path))
    (path,) = cuts_in(tmp_path)
    check_conserved(path, "push_sum", 2)


def _told_to_end(folder: str, which: int) -> dict[str, Any]:
    sent: list[int] = []

    def terminate(trainer: L.Trainer, batches: int) -> None:
        if rank() == which and not sent and any(Path(folder).glob("*.ckpt")):
            sent.append(batches)
            os.kill(os.getpid(), signal.SIGTERM)

    return fit(folder, stops=terminate)


@pytest.mark.few(0)
@pytest.mark.parametrize("which", [0, 2])
def test_a_run_that_is_told_to_end_leaves_whole_files(which: int, tmp_path: Path) -> None:
    """Behind the first checkpoint, when the next cut may be open."""
    with Forked(N, _told_to_end, str(tmp_path), which, store=True) as forked:
        results = forked.results()
    assert {one.kind for one in results} == {"SIGTERMException"}, results
    assert cuts_in(tmp_path)
    for path in cuts_in(tmp_path):
        check_conserved(path, "push_sum")
    assert_nothing_over_but(tmp_path, "diary")


def _full(folder: str) -> dict[str, Any]:
    """Rank 2's disk is full."""

    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            raise OSError(28, "No space left on device")

    return fit(folder, io=Full() if rank() == 2 else None)


@pytest.mark.few(0)
def test_who_cannot_write_ends_the_run_and_no_main_file_is_there(tmp_path: Path) -> None:
    with Forked(N, _full, str(tmp_path), store=True) as forked:
        results = forked.results()
    assert results[2].kind == "OSError", results
    assert {results[0].kind, results[1].kind} == {"PeerFailedError"}, results
    assert "No space left" in results[0].error
    assert not list(tmp_path.glob("*.ckpt"))


class FailsLate(TorchCheckpointIO):
    """The second main file cannot be written; known of only when `late` is set."""

    def __init__(self, folder: str) -> None:
        self.folder, self.mains, self.late, self.under_way = folder, 0, Event(), Event()

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.mains += os.path.dirname(path) == self.folder
        if self.mains == 2:
            self.under_way.set()
            assert self.late.wait(30)
            raise OSError(28, "No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def _fails_late(folder: str, how: str) -> None:
    """60 steps of one rank, cuts at the 25th and the 50th; the run ends well, but for that, or fails itself."""
    io = FailsLate(folder)
    late_files.LEAVE_FAILED = 0.1

    def stop(trainer: L.Trainer, batches: int) -> None:
        if batches == 1:
            owner, name = (
                (trainer.strategy.checkpoints, "settle") if how == "well" else (trainer.strategy.cuts, "close")
            )  # type: ignore[attr-defined]
            original = getattr(owner, name)
            setattr(owner, name, lambda: io.late.set() or original())
        if how == "fails" and io.under_way.is_set():
            raise RuntimeError("it fails by itself")

    fit(folder, io=io, stops=stop, every=25, n=240, save_top_k=1)


@pytest.mark.few(0)
@pytest.mark.parametrize("how", ["well", "fails"])
def test_a_write_that_fails_at_the_very_end_is_told_and_the_one_before_stays(how: str, tmp_path: Path) -> None:
    with Forked(1, _fails_late, str(tmp_path), how) as forked:
        (result,) = forked.results()
    assert result.kind == {"well": "OSError", "fails": "RuntimeError"}[how], result
    (path,) = tmp_path.glob("*.ckpt")
    check_conserved(path, "push_sum", 1)


class Box:
    """What torch knows nothing of."""

    def __init__(self) -> None:
        self.batches, self.tensor = 0, torch.zeros(1)


class Boxed(Stepwise):
    """Has such a one in its checkpoint, and goes on filling it."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Box()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.box.batches += 1
        self.box.tensor += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["box"] = {"it": self.box, "again": [self.box], "batches": self.box.batches}


def _boxed(folder: str) -> None:
    """The main file is pickled some batches behind its record."""
    trained = Event()

    class Waits(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            assert os.path.dirname(path) != folder or trained.wait(30)
            super().save_checkpoint(checkpoint, path, storage_options)

    def stop(trainer: L.Trainer, batches: int) -> None:
        if batches == 40:
            trained.set()

    fit(folder, io=Waits(), stops=stop, every=25, n=240, module=Boxed)


@pytest.mark.few(0)
def test_a_file_holds_all_as_it_was_at_the_record(tmp_path: Path) -> None:
    run(1, _boxed, str(tmp_path))
    path, *_ = sorted(tmp_path.glob("*.ckpt"))
    box = torch.load(path, weights_only=False)["box"]
    assert 25 <= box["batches"] < 40
    assert (box["it"].batches, box["it"].tensor.item()) == (box["batches"], box["batches"])
    assert box["again"][0] is box["it"], "what was one is one"
