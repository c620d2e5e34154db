"""Loaders in the shapes of webdataset, torchdata and litdata, none of which is needed: each rank goes on where it was.

    webdataset    shards, dealt out to ranks and workers as they are read; no length; no state
    torchdata     a DataLoader with a state, which its next iterator consumes; one after that begins anew
    litdata       samples dealt out when the data set is made; a length; the loader has the state, the data set none

(The packages themselves are in `test_packages.py`.)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_async import SpeedFaults
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer
from tests.strategies.ranks import run

SAMPLES, SHARD, BATCH, SAVED, LAST = 400, 25, 4, 20, 40
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:.*not resumable",
    "ignore:.*has `__len__` defined",
    "ignore:.*is not a DataLoader. every rank trains on all",
)


def place() -> tuple[int, int]:
    """This rank's, as such packages find it out by themselves."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def sample(number: int) -> Any:
    return number, INPUTS[number % len(INPUTS)], TARGETS[number % len(TARGETS)]


class Shards(IterableDataset[Any]):
    """Every rank reads shards of its own, and each of its workers some of them."""

    def __iter__(self) -> Iterator[Any]:
        rank, world = place()
        worker = get_worker_info()
        mine = range(rank, SAMPLES // SHARD, world)[worker.id if worker else 0 :: worker.num_workers if worker else 1]
        return (sample(shard * SHARD + k) for shard in mine for k in range(SHARD))


class Unsized(Shards):
    """Its length is an error, as that of a pipeline whose parts have none."""

    def __len__(self) -> int:
        raise NotImplementedError("the length of a stream")


class Pipeline:
    """Not a DataLoader: it has one, and passes its batches on."""

    def __init__(self, data: Any, workers: int) -> None:
        self.loader = DataLoader(data, batch_size=BATCH, num_workers=workers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        raise TypeError("a pipeline has no length")


class Snapshots(DataLoader[Any]):
    """How many batches its iterator has yielded is its state. Whoever loads one skips as many."""

    skip = yielded = 0

    def __iter__(self) -> Iterator[Any]:
        self.yielded, self.skip = self.skip, 0
        for batch in islice(super().__iter__(), self.yielded, None):
            self.yielded += 1
            yield batch
        self.yielded = 0

    def state_dict(self) -> dict[str, Any]:
        return {"_num_yielded": self.yielded, "_iterator_finished": not self.yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = self.yielded = state["_num_yielded"]


class Dealt(IterableDataset[Any]):
    """Deals out the samples when it is made: made too early, it would give all ranks the same."""

    def __init__(self) -> None:
        rank, world = place()
        self.mine = range(rank, SAMPLES, world)
        self.first = 0

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        batches = range(self.first, len(self.mine), BATCH)[
            worker.id if worker else 0 :: worker.num_workers if worker else 1
        ]
        return (sample(self.mine[k]) for first in batches for k in range(first, min(first + BATCH, len(self.mine))))


class Streaming(DataLoader[Any]):
    """Counts its epochs and the samples that it yielded; a loaded state is for the next iterator."""

    epoch = yielded = 0
    restored = False

    def __iter__(self) -> Iterator[Any]:
        if not self.restored:
            self.epoch, self.yielded = self.epoch + 1, 0
        self.restored, self.dataset.first = False, self.yielded  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.yielded += len(batch[0])
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"current_epoch": self.epoch, "num_samples_yielded": self.yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.yielded, self.restored = state["current_epoch"], state["num_samples_yielded"], True


SHAPES: dict[str, Any] = {
    "torchdata over webdataset": lambda workers: Snapshots(Shards(), batch_size=BATCH, num_workers=workers),
    "torchdata, unsized": lambda workers: Snapshots(Unsized(), batch_size=BATCH, num_workers=workers),
    "litdata": lambda workers: Streaming(Dealt(), batch_size=BATCH, num_workers=workers),
    "webdataset": lambda workers: DataLoader(Unsized(), batch_size=BATCH, num_workers=workers),
    "webdataset's loader": lambda workers: Pipeline(Shards(), workers),
}


class Streams(Lit):
    """Makes its loader where the ranks know each other."""

    def __init__(self, shape: str, workers: int) -> None:
        super().__init__()
        self.shape, self.workers = shape, workers
        self.saved: dict[int, int] = {}

    def train_dataloader(self) -> Any:
        return SHAPES[self.shape](self.workers)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.saved[self.trainer.global_step] = len(self.seen)


def fit(shape: str, workers: int, folder: Path, steps: int, path: str | None) -> dict[str, Any]:
    lit = Streams(shape, workers)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    t = trainer(
        2,
        callbacks=[SpeedFaults(step_seconds=0.004, slow={1: 4.0}), saver],
        enable_checkpointing=True,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=10,
        check_val_every_n_epoch=None,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(lit, None, loader(24, shuffle=False), ckpt_path=path)
    said = [str(warning.message) for warning in caught]
    return {"seen": lit.seen, "saved": lit.saved, "steps": t.global_step, "said": said}


def interrupted(shape: str, workers: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank trained on up to the checkpoint, and after the resume from it."""
    first = run(2, fit, shape, workers, folder, SAVED + 6, None)
    again = run(2, fit, shape, workers, folder, LAST, str(folder / f"step={SAVED}.ckpt"))
    assert [one["steps"] for one in again] == [LAST, LAST]
    ends = [
        {"before": one["seen"][: one["saved"][SAVED]], "after": more["seen"], "said": more["said"]}
        for one, more in zip(first, again, strict=True)
    ]
    assert sum(len(end["before"]) for end in ends) == SAVED * 2 * BATCH
    assert sum(len(end["after"]) for end in ends) == (LAST - SAVED) * 2 * BATCH
    return ends


def order(shape: str, rank: int, workers: int) -> list[int]:
    """A rank's epoch, as its loader yields it by itself."""
    before = dict(os.environ)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    try:
        return [int(number) for batch in SHAPES[shape](workers) for number in batch[0]]
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.few(0)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shape", ["torchdata over webdataset", "torchdata, unsized", "litdata"])
def test_a_loader_with_a_state_goes_on_behind_the_last_batch_of_each_rank(
    shape: str, workers: int, tmp_path: Path
) -> None:
    for rank, end in enumerate(interrupted(shape, workers, tmp_path)):
        trained, epoch = end["before"] + end["after"], order(shape, rank, 0)
        assert trained == (epoch * 2)[: len(trained)], "in order, none left out, none twice in an epoch"
        assert not [said for said in end["said"] if "begins its stream anew" in said]


@pytest.mark.few(0)
@pytest.mark.parametrize("shape", ["webdataset", "webdataset's loader"])
def test_a_loader_without_a_state_begins_anew_and_says_so(shape: str, tmp_path: Path) -> None:
    for rank, end in enumerate(interrupted(shape, 0, tmp_path)):
        epoch = order(shape, rank, 0)
        for trained in (end["before"], end["after"]):
            assert trained == (epoch * 2)[: len(trained)]
        said = [said for said in end["said"] if "has no state, so this run begins its stream anew" in said]
        assert len(said) == (rank == 0)
