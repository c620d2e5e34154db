"""Streams of other people's packages, and remote stores: each rank goes on behind the last sample that it completed.

Where a package is not installed its tests are skipped with a sentence; what stands in for them, and needs none of it,
is in `test_preempted.py`, `test_streams.py` and `stores.py`.
"""

from __future__ import annotations

import io
import os
import signal
import tarfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_async import SpeedFaults
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import assert_nothing_over, files_of
from tests.strategies.stores import DiesInTheStore, FullStore, bucket
from tests.strategies.test_checkpoints import _dies, _fills, _resumes

SAMPLES, SHARDS = 400, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*has `__len__` defined", "ignore:Neither dataset nor iter", "ignore:'set_vital'"
    ),
]


def sample(index: Any) -> Any:
    number = int(index)
    return torch.tensor(number), INPUTS[number % len(INPUTS)], TARGETS[number % len(INPUTS)]


def tars(folder: Path) -> None:
    """Shards as webdataset reads them: 50 samples each."""
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS):
                body = io.BytesIO()
                np.save(body, np.array([index]))
                entry = tarfile.TarInfo(f"{index:04d}.npy")
                entry.size = len(body.getvalue())
                tar.addfile(entry, io.BytesIO(body.getvalue()))


def chunks(folder: Path) -> None:
    """Chunks as litdata reads them."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=25)
    for index in range(SAMPLES):
        writer[index] = {"index": index}
    writer.done()
    writer.merge(1)


def shards(folder: Path) -> Any:
    """Every rank reads its own shards."""
    import webdataset

    files = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(files, nodesplitter=webdataset.split_by_node, shardshuffle=False, empty_check=False)
    return data.decode().to_tuple("npy").map(lambda found: sample(found[0][0]))


def stateful_shards(folder: Path, workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(shards(folder), batch_size=4, num_workers=workers)


def stateless_shards(folder: Path, workers: int) -> Any:
    return DataLoader(shards(folder), batch_size=4, num_workers=workers)


def streaming(folder: Path, workers: int) -> Any:
    import litdata

    class Samples(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            return sample(super().__getitem__(index)["index"])

    return litdata.StreamingDataLoader(Samples(str(folder), shuffle=False), batch_size=4, num_workers=workers)


class Streams(Lit):
    """Makes its loader when the ranks know each other: so litdata gives each its own part."""

    def __init__(self, make: Any, folder: Path, workers: int) -> None:
        super().__init__()
        self.make = lambda: make(folder, workers)
        self.saved: dict[int, int] = {}

    def train_dataloader(self) -> Any:
        return self.make()

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.saved[self.trainer.global_step] = len(self.seen)


def train(make: Any, folder: Path, workers: int, steps: int, path: str | None) -> dict[str, Any]:
    lit = Streams(make, folder, workers)
    saver = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    t = trainer(
        2,
        callbacks=[SpeedFaults(step_seconds=0.004, slow={1: 4.0}), saver],
        enable_checkpointing=True,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=10,
        check_val_every_n_epoch=None,
    )
    t.fit(lit, None, loader(24, shuffle=False), ckpt_path=path)
    return {"seen": lit.seen, "saved": lit.saved, "steps": t.global_step}


def twice(make: Any, folder: Path, workers: int) -> list[list[int]]:
    """What each rank trained on up to the checkpoint of step 20, and after the resume from it."""
    first = run(2, train, make, folder, workers, 26, None)
    again = run(2, train, make, folder, workers, 40, str(folder / "saved" / "step=20.ckpt"))
    assert [one["steps"] for one in again] == [40, 40]
    trained = [one["seen"][: one["saved"][20]] + more["seen"] for one, more in zip(first, again, strict=True)]
    assert sum(map(len, trained)) == 40 * 8
    assert len(trained[0]) > len(trained[1]), "the fast rank did not wait for the slow one"
    return trained


@pytest.mark.parametrize("workers", [0, 1])
def test_a_litdata_stream_goes_on_where_each_rank_was(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("litdata", reason="litdata is not installed")
    chunks(tmp_path)
    trained = twice(streaming, tmp_path, workers)
    assert len(set(trained[0] + trained[1])) == 40 * 8, "none twice, on either rank"


@pytest.mark.few(1)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_webdataset_goes_on_where_each_rank_was(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata, whose loader has a state, is not installed")
    tars(tmp_path)
    trained = twice(stateful_shards, tmp_path, workers)
    own = SAMPLES // 2
    for rank in range(2):
        mine = [i for shard in range(rank, SHARDS, 2) for i in range(50 * shard, 50 * (shard + 1))]
        assert trained[rank] == (mine * 2)[: len(trained[rank])], "in order, none left out, none twice in an epoch"
    assert len(set(trained[0])) == min(own, len(trained[0]))


def limited(make: Any, folder: Path, workers: int, path: str | None) -> list[int]:
    lit = Streams(make, folder, workers)
    saver = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=-1)
    t = trainer(1, callbacks=[saver], enable_checkpointing=True, max_epochs=4, limit_train_batches=6)
    t.fit(lit, None, loader(24, shuffle=False), ckpt_path=path)
    return lit.seen


@pytest.mark.few(1)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("package", ["torchdata", "litdata"])
def test_a_limited_epoch_of_a_package_loses_nothing(package: str, workers: int, tmp_path: Path) -> None:
    """The next epoch goes on behind the limit, and so does a run that is resumed there."""
    for needed in {"litdata": ["litdata"], "torchdata": ["webdataset", "torchdata.stateful_dataloader"]}[package]:
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    fill, make = {"litdata": (chunks, streaming), "torchdata": (tars, stateful_shards)}[package]
    fill(tmp_path)
    (through,) = run(1, limited, make, tmp_path, workers, None)
    (resumed,) = run(1, limited, make, tmp_path, workers, str(tmp_path / "saved" / "epoch=1.ckpt"))
    assert through == list(range(4 * 6 * 4))
    assert resumed == through[2 * 6 * 4 :]


@pytest.mark.few(0)
def test_a_stream_without_a_state_says_that_it_begins_anew(tmp_path: Path) -> None:
    """On a resume in mid-epoch; webdataset's own loaders are such."""

    class Numbers(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return map(sample, range(SAMPLES))

    def plain(folder: Path, workers: int) -> Any:
        return DataLoader(Numbers(), batch_size=4, num_workers=workers)

    run(2, train, plain, tmp_path, 0, 26, None)
    said = run(2, warned, plain, tmp_path)
    assert any("has no state, so this run begins its stream anew" in one for one in said[0])


def warned(make: Any, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        train(make, folder, 0, 30, str(folder / "saved" / "step=20.ckpt"))
    return [str(warning.message) for warning in record]


# -- a remote store ----------------------------------------------------------------------------------------------------


class Between(Callback):
    """Whether a checkpoint of this fit was recorded between two meetings."""

    def __init__(self) -> None:
        self.recorded = False

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        self.recorded = self.recorded or not trainer.strategy.meeting


def remote(root: Path, steps: int, path: str | None, later: bool, saves: str = "meeting") -> dict[str, Any]:
    bucket(root)
    lit, between = Lit(), Between()
    best = {"monitor": "step", "mode": "max"} if saves == "meeting" else {}
    saver = ModelCheckpoint("bucket://saved", filename="{step}", every_n_train_steps=5, save_last=True, **best)
    t = trainer(
        2,
        knobs={"saves": saves},
        callbacks=[SpeedFaults(step_seconds=0.004 if saves == "meeting" else 0.01, slow={1: 4.0}), between, saver],
        enable_checkpointing=True,
        max_steps=steps,
        max_epochs=-1,
        default_root_dir="bucket://saved",
        plugins=[AsyncCheckpointIO()] if later else [],
    )
    t.fit(lit, loader(), loader(24, shuffle=False), ckpt_path=path)
    end = [p.tolist() for p in lit.parameters()]
    return {"steps": t.global_step, "end": end, "best": saver.best_model_path, "cut": between.recorded}


@pytest.mark.few(1)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("path", ["bucket://saved/last.ckpt", "last"])
def test_checkpoints_in_a_remote_store_hold_every_rank(path: str, later: bool, tmp_path: Path) -> None:
    """Also where the store is known by two names: Lightning finds "last" by its path on the disk."""
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    for steps, at in ((12, None), (22, path)):
        first, second = run(2, remote, tmp_path, steps, at, later)
        assert first == second
        assert first["steps"] == steps
        assert first["best"] == f"bucket://saved/step={steps // 5 * 5}.ckpt"
        for name in ("last.ckpt", f"step={steps // 5 * 5}.ckpt"):
            save = torch.load(tmp_path / "saved" / name, weights_only=True)["lightning_async"]["save"]
            found = sorted(os.listdir(tmp_path / "saved" / f"{name}.ranks"))
            assert found == [f"{save}.rank0.ckpt", f"{save}.rank1.ckpt", "index.ckpt"]


@pytest.mark.few(0)
@pytest.mark.parametrize("path", ["bucket://saved/last.ckpt", "last"])
def test_so_do_those_of_cuts(path: str, tmp_path: Path) -> None:
    """They are written in a thread of their own, and what they replace goes."""
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    for steps, at in ((32, None), (64, path)):
        first, second = run(2, remote, tmp_path, steps, at, False, "cut")
        assert first == second
        assert (first["steps"], first["cut"]) == (steps, True)
        store, _, name = first["best"].rpartition("/")
        assert store == "bucket://saved"
        assert steps - 10 < int(name.removeprefix("step=").removesuffix(".ckpt")) <= steps
        assert {file.name for file in (tmp_path / "saved").glob("*.ckpt")} == {name, "last.ckpt"}
        for folder in (tmp_path / "saved").glob("*.ranks"):
            with suppress(OSError):  # an object store has no empty folders
                folder.rmdir()
        assert_nothing_over(tmp_path / "saved")


def in_the_bucket(root: Path, do: Any, *arguments: Any) -> Any:
    bucket(root)
    return do("bucket://saved", *arguments)


def _is_whole_and_goes_on(root: Path) -> None:
    """The save of the first epoch."""
    main = torch.load(root / "saved" / "x.ckpt", weights_only=True)
    assert main["epoch"] == 0
    own = files_of(root / "saved" / "x.ckpt")
    assert {rank: one["save"] for rank, one in own.items()} == dict.fromkeys((0, 1), main["lightning_async"]["save"])
    (epoch, first), (_, second) = run(2, in_the_bucket, root, _resumes)
    assert first == second
    assert epoch == 0


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")
@pytest.mark.parametrize(("dead", "at"), [(0, 2), (1, 0), (0, 0)], ids=["main file", "own file", "index"])
def test_a_kill_in_the_middle_of_a_write_to_a_remote_store_leaves_the_save_of_before(
    dead: int, at: int, tmp_path: Path
) -> None:
    """A store shows what came whole: Lightning writes each file in one transaction, and the main file comes last."""
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    with Forked(2, in_the_bucket, tmp_path, _dies, dead, at, 60.0, DiesInTheStore, store=True) as forked:
        forked.processes[dead].join(30)  # the other is killed with it
        assert forked.processes[dead].exitcode == -signal.SIGKILL
    assert list((tmp_path / "on its way").iterdir())
    _is_whole_and_goes_on(tmp_path)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")
@pytest.mark.parametrize(("full", "what"), [(1, "rank1"), (0, "x.ckpt")])
def test_a_remote_store_that_is_full_stops_all_ranks_and_keeps_the_save_of_before(
    full: int, what: str, tmp_path: Path
) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    with Forked(2, in_the_bucket, tmp_path, _fills, full, what, FullStore) as forked:
        results = forked.results(20)
    assert results[full].kind == "OSError"
    assert results[1 - full].kind == "PeerFailedError"
    assert all("No space left on device" in result.error for result in results)
    assert not list((tmp_path / "on its way").iterdir())
    _is_whole_and_goes_on(tmp_path)


def alone() -> list[str]:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    saver = ModelCheckpoint("memory://saved", filename="{step}", every_n_train_steps=5)
    lit = Lit()
    trainer(1, callbacks=[saver], enable_checkpointing=True, max_steps=12, max_epochs=-1).fit(lit, loader())
    saver = ModelCheckpoint("memory://saved", filename="{step}", every_n_train_steps=5, save_top_k=0)
    again = trainer(1, callbacks=[saver], enable_checkpointing=True, max_steps=20, max_epochs=-1)
    again.fit(Lit(), loader(), ckpt_path="memory://saved/step=10.ckpt")
    assert again.global_step == 20
    return [str(name) for name in fsspec.filesystem("memory").find("/")]


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_checkpoints_in_memory(tmp_path: Path) -> None:
    """Of one rank: another process has another memory."""
    (names,) = run(1, alone)
    assert [name for name in names if ".ranks" not in name] == ["/saved/step=10.ckpt"]
    assert len([name for name in names if "rank0" in name]) == 1
