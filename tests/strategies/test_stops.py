"""However a run is stopped, every rank stops within seconds, and each says why."""

from __future__ import annotations

import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_async import SpeedFaults
from lightning_async.strategies import late_files, office
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import Forked, Result
from tests.strategies.resumable import files_of, rank

SECONDS = 20.0  # on a machine that is busy with other things; a hang would take for ever


class Say(Callback):
    """Touch a file once this rank trains."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        (Path(self.folder) / str(trainer.global_rank)).touch()


def _train(folder: str, faults: dict[str, Any], options: dict[str, Any]) -> int:
    lit = Lit()
    t = trainer(3, callbacks=[Say(folder), SpeedFaults(**faults)], max_epochs=1000, **options)
    t.fit(lit, loader(), loader(40, shuffle=False))
    return t.current_epoch


def until_training(folder: Path, n: int = 3) -> None:
    end = time.monotonic() + SECONDS
    while len(list(folder.iterdir())) < n:
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(forked: Forked) -> list[Result]:
    start = time.monotonic()
    results = forked.results(SECONDS)
    assert all(r.kind not in (None, "silent", "gone") for r in results), results
    assert time.monotonic() - start < SECONDS
    return results


@pytest.mark.few(2)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_sigterm_to_any_rank_stops_all_cleanly(rank: int, tmp_path: Path) -> None:
    with Forked(3, _train, str(tmp_path), {"step_seconds": 0.01, "slow": {2: 4.0}}, {}) as forked:
        until_training(tmp_path)
        forked.signal(rank, signal.SIGTERM)
        results = ended(forked)
    assert [r.kind for r in results] == ["SIGTERMException"] * 3


@pytest.mark.few(0)
@pytest.mark.parametrize("ranks", [(0, 1, 2, 1), (2, 2, 1, 0)])
def test_sigterm_to_all_ranks_and_to_one_of_them_twice_stops_all_cleanly(
    ranks: tuple[int, ...], tmp_path: Path
) -> None:
    """As where a job is preempted, and a launcher passes on what its ranks hear themselves."""
    with Forked(3, _train, str(tmp_path), {"step_seconds": 0.01, "slow": {2: 4.0}}, {}) as forked:
        until_training(tmp_path)
        for rank in ranks:
            forked.signal(rank, signal.SIGTERM)
        results = ended(forked)
    assert [r.kind for r in results] == ["SIGTERMException"] * 3


class Stands(Callback):
    """Rank 1 stands in its third step of the second epoch, until it is told to go on; rank 0 has taken some by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (1, 1, 2):
            (self.folder / "1").touch()
            end = time.monotonic() + 3 * SECONDS
            while not (self.folder.parent / "go").exists() and time.monotonic() < end:
                time.sleep(0.01)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (0, 1, 4):
            (self.folder / "0").touch()


def _graceless(folder: Path, options: dict[str, Any]) -> None:
    office.FAREWELL_FAILED = 0.5
    saves = ModelCheckpoint(folder / "saved", save_on_exception=True, every_n_epochs=1, **options)
    saves.CHECKPOINT_NAME_LAST = "last-{step}"
    callbacks = [Stands(folder / "there"), saves]
    t = trainer(2, knobs={"grace": 1.0}, enable_checkpointing=True, callbacks=callbacks, max_epochs=1000)
    t.fit(Lit(), loader(), loader(40, shuffle=False))


NAMES: dict[str, dict[str, Any]] = {
    "one name": {"filename": "x", "enable_version_counter": False},
    "a name for each": {"filename": "{epoch}-{step}", "save_last": "link"},
    "the last one too": {"filename": "{epoch}-{step}", "save_last": True},
}


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*the ranks are not together")
@pytest.mark.parametrize("names", NAMES)
def test_where_a_rank_does_not_come_in_time_what_all_saved_stays(names: str, tmp_path: Path) -> None:
    """The grace is over, and rank 0 ends with weights of its own: under another name, and nothing is linked to them."""
    saved, there = tmp_path / "saved", tmp_path / "there"
    there.mkdir()
    with Forked(2, _graceless, tmp_path, NAMES[names]) as forked:
        until_training(there, 2)
        before = {path.name: torch.load(path, weights_only=True) for path in saved.glob("*.ckpt")}
        forked.signal(0, signal.SIGTERM)
        start = time.monotonic()
        first = forked.result(0, SECONDS)
        assert first.kind == "SIGTERMException", first
        assert time.monotonic() - start < 1.0 + 0.5 + 8.0, "the grace, the farewell, and a busy machine"
        (tmp_path / "go").touch()
        assert forked.result(1, SECONDS).kind in ("SIGTERMException", "PeerFailedError")
    assert before
    assert {path.name for path in saved.glob("*.ckpt")} == set(before)
    for name, main in before.items():
        now = torch.load(saved / name, weights_only=True)
        assert now["lightning_async"]["save"] == main["lightning_async"]["save"]
        assert sorted(files_of((saved / name).resolve())) == [0, 1]
    (alone,) = saved.glob("*.ckpt.rank0")
    assert "lightning_async" not in torch.load(alone, weights_only=True)


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_exception_on_any_rank_stops_all_and_is_named(rank: int, tmp_path: Path) -> None:
    with Forked(3, _train, str(tmp_path), {"step_seconds": 0.01, "fail": {rank: 7}}, {}) as forked:
        results = ended(forked)
    own = results[rank]
    for r, result in enumerate(results):
        if r != rank:
            assert result.kind == "PeerFailedError"
            assert f"rank {rank} stopped: {own.kind}: {own.error}" in result.error


class Crosses(Callback):
    """What goes wrong when a user lets rank 0 alone call something."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            if trainer.is_global_zero:
                trainer.strategy.barrier()
            trainer.strategy.reduce(torch.zeros(1), reduce_op="sum")


def _cross() -> None:
    trainer(3, callbacks=[Crosses()]).fit(Lit(), loader(), loader(40, shuffle=False))


def test_ranks_that_call_different_things_all_hear_who_was_where() -> None:
    with Forked(3, _cross) as forked:
        results = ended(forked)
    assert {r.kind for r in results} <= {"RuntimeError", "PeerFailedError"}
    assert all("rank 0 is at 'barrier', ranks 1, 2 are at 'reduce sum'" in r.error for r in results)


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_on_one_rank_stops_all(rank: int, tmp_path: Path) -> None:
    with Forked(3, _train, str(tmp_path), {"step_seconds": 0.01}, {}) as forked:
        until_training(tmp_path)
        forked.signal(rank, signal.SIGINT)
        results = ended(forked)
    assert results[rank].kind == "SystemExit"
    assert all("KeyboardInterrupt" in r.error for i, r in enumerate(results) if i != rank)


def test_ctrl_c_twice_in_a_terminal_stops_all_ranks(tmp_path: Path) -> None:
    """It goes to all of them at once, and again to those that are still busy with the first one."""
    with Forked(3, _train, str(tmp_path), {"step_seconds": 0.01}, {}) as forked:
        until_training(tmp_path)
        for rank in (0, 1, 2) * 2:
            forked.signal(rank, signal.SIGINT)
        results = ended(forked)
    assert all(r.kind in ("SystemExit", "KeyboardInterrupt") or "KeyboardInterrupt" in r.error for r in results)


class FullDisk(TorchCheckpointIO):
    """A disk on which a file may have 2 kB: the kernel says so in the middle of a write."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        try:
            super().save_checkpoint(checkpoint, path, storage_options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _full_disk(folder: str) -> None:
    lit = Lit()
    t = trainer(2, enable_checkpointing=True, plugins=[FullDisk()], callbacks=[ModelCheckpoint(folder, monitor="val")])
    t.fit(lit, loader(), loader(40, shuffle=False))


def test_a_full_disk_stops_all_ranks_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with Forked(2, _full_disk, str(tmp_path)) as forked:
        first, second = ended(forked)
    assert first.kind == second.kind == "OSError"  # each writes a file of its own
    assert "File too large" in first.error
    assert "File too large" in second.error
    assert list(tmp_path.glob("**/*.ckpt")) == []


def _batch_fails_on_one(folder: str) -> None:
    class Bad(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 240

        def __getitem__(self, index: int) -> Any:
            if index == 101:
                raise ValueError("sample 101 is broken")
            return torch.tensor(index), torch.zeros(8), torch.zeros(1)

    data = torch.utils.data.DataLoader(Bad(), batch_size=4)
    trainer(2, max_epochs=5).fit(Lit(), data, loader(40, shuffle=False))


def test_a_broken_sample_stops_all_ranks_and_is_named(tmp_path: Path) -> None:
    with Forked(2, _batch_fails_on_one, str(tmp_path)) as forked:
        results = ended(forked)
    assert any(r.kind == "ValueError" and "sample 101 is broken" in r.error for r in results)
    assert all("sample 101 is broken" in r.error for r in results)


def _gathers(folder: str) -> None:
    class Gathers(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.all_gather(batch[0])
            return super().training_step(batch, batch_idx)

    trainer(2).fit(Gathers(), loader(), loader(40, shuffle=False))


def test_all_gather_between_meetings_is_refused(tmp_path: Path) -> None:
    with Forked(2, _gathers, str(tmp_path)) as forked:
        results = ended(forked)
    assert all("`all_gather` between meetings" in r.error for r in results)
    assert MisconfigurationException.__name__ in {r.kind for r in results}


class _Training(Callback):
    """Says when all have met once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            (self.folder / str(trainer.global_rank)).touch()


class _Dawdles(TorchCheckpointIO):
    """Rank 1's disk takes longer than the grace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if rank() == 1:
            (self.folder / "saving").touch()
            end = time.monotonic() + 3 * SECONDS
            while not (self.folder / "go").exists() and time.monotonic() < end:
                time.sleep(0.01)
        super().save_checkpoint(checkpoint, path, storage_options)


def _raise(*_: Any) -> None:
    raise OSError("on purpose")


class _Fails(Callback):
    """Its last word is an error of its own."""

    on_exception = _raise


class _FailsToClose(DummyLogger):
    """So is this one's."""

    finalize = _raise


class _Data(LightningDataModule):
    """And this one's."""

    on_exception = _raise

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(40, shuffle=False)


FAILS: dict[str, dict[str, Any]] = {
    "callback": {"callbacks": [_Fails()]},
    "datamodule": {},
    "logger": {"logger": _FailsToClose()},
}


def _left(folder: Path, *, fails: str, saves: str = "meeting") -> tuple[str, bool, list[str]]:
    """How the fit ended; whether the office is still open, and which threads of the carrier are left."""
    office.FAREWELL_FAILED = 0.5
    late_files.LEAVE_FAILED = 0.5
    saver = ModelCheckpoint(folder / "saved", save_on_exception=True, every_n_train_steps=10**6)
    options = dict(FAILS[fails]) if fails else {"callbacks": [saver], "plugins": [_Dawdles(folder)]}
    options["callbacks"] = [_Training(folder / "there"), *options.get("callbacks", [])]
    knobs = {"grace": 1.0, "saves": saves}
    t = trainer(2, knobs=knobs, enable_checkpointing=not fails, max_epochs=1000, **options)
    try:
        if fails == "datamodule":
            t.fit(Lit(), datamodule=_Data())
        else:
            t.fit(Lit(), loader(), loader(40, shuffle=False))
        ended = ""
    except BaseException as error:
        ended = type(error).__name__
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("control", "link"))]
    return ended, t.strategy.office.is_open, left  # type: ignore[attr-defined]


@pytest.mark.parametrize("saves", ["meeting", "cut"])
@pytest.mark.few(1)
def test_who_is_told_to_end_leaves_though_the_grace_ends_within_a_save(saves: str, tmp_path: Path) -> None:
    """Where files are written in a thread of their own, too: nobody waits for the disk as long as for a meeting."""
    (tmp_path / "there").mkdir()
    with Forked(2, partial(_left, fails="", saves=saves), tmp_path) as forked:
        until_training(tmp_path / "there", 2)
        forked.signal(0, signal.SIGTERM)
        end = time.monotonic() + SECONDS
        while not (tmp_path / "saving").exists():
            assert time.monotonic() < end, "nothing was saved"
            time.sleep(0.01)
        first = forked.result(0, SECONDS)
        if saves == "meeting":  # else its own thread hangs, and not the rank
            (tmp_path / "go").touch()
        second = forked.result(1, SECONDS)
        (tmp_path / "go").touch()
    for result in (first, second):
        assert result.value == ("SIGTERMException", False, []), result
    assert not list((tmp_path / "saved").glob("*.ckpt"))


@pytest.mark.few(2)
@pytest.mark.parametrize("fails", FAILS)
def test_a_rank_leaves_though_somebody_fails_on_the_way_out(fails: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with Forked(2, partial(_left, fails=fails), tmp_path) as forked:
        until_training(tmp_path / "there", 2)
        forked.signal(0, signal.SIGTERM)
        results = forked.results(SECONDS)
    for result in results:
        assert result.value == ("OSError", False, []), result
