"""Scenes: where the samples come from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from tests.strategies.features.fits import SAMPLES, Fitted, alike, fit, heard, held_out, rank, samples, whole
from tests.strategies.features.table import Scene, differs, refused, works
from tests.strategies.lit import INPUTS, TARGETS, Lit

SECTION = "Data"


def loaders(folder: Path) -> dict[str, Any]:
    weighted = WeightedRandomSampler([0.0] * 48 + [1.0] * 48, SAMPLES, generator=torch.Generator().manual_seed(1))
    batches = BatchSampler(SequentialSampler(range(SAMPLES)), 6, drop_last=False)
    return {
        "plain": fit(),
        "sampler": fit(data=samples(shuffle=False, sampler=weighted), max_epochs=1),
        "batches": fit(data=DataLoader(samples().dataset, batch_sampler=batches), max_epochs=1),
        "unequal": fit(data=samples(4 if rank() == 0 else 12), max_epochs=1),
        "drop": fit(data=samples(n=94, drop_last=True), max_epochs=1),
        "as is": fit(use_distributed_sampler=False, max_epochs=1),
        "reload": fit(Reloads(), data=None, reload_dataloaders_every_n_epochs=1),
        "other": fit(data=Batches(), max_epochs=1),
        "two": heard(lambda: fit(Pair(), data={"a": samples(), "b": samples()})),
        "combined": heard(lambda: fit(Pair(), data=CombinedLoader({"a": samples(), "b": samples()}, "max_size"))),
    }


class Reloads(Lit):
    """Has its own loaders, and counts how often they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> Any:
        self.asked += 1
        return samples()

    def on_train_epoch_end(self) -> None:
        self.log("asked", float(self.asked), sync_dist=True)


class Batches:
    """Not a DataLoader."""

    def __iter__(self) -> Any:
        for k in range(0, 40, 4):
            yield torch.arange(k, k + 4), INPUTS[k : k + 4], TARGETS[k : k + 4]


class Pair(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"], batch_idx)


SHARED = "each sample once an epoch, shared out by speed: the loader has no `len`"
LOADERS = Scene(
    SECTION,
    loaders,
    [
        differs(
            "use_distributed_sampler",
            "True",
            SHARED + ' and knows no `DistributedSampler`; `balance="equal"` shares out equally',
            lambda a, b: whole(a["plain"], b["plain"], 2) and alike(a["plain"], b["plain"]),
        ),
        works(
            "use_distributed_sampler",
            "False",
            lambda a, b: (
                {*Counter(a["as is"].seen).values()} == {*Counter(b["as is"].seen).values()} == {1}
                and len(a["as is"].seen) == SAMPLES
            ),
            "the loader stays as it is: each rank trains on all of it",
        ),
        works(
            "DataLoader",
            "a sampler of the user's",
            lambda a, b: min(a["sampler"].seen + b["sampler"].seen) >= 48,
            "its order, the same on every rank, is shared out",
        ),
        works(
            "DataLoader",
            "a batch sampler of the user's",
            lambda a, b: whole(a["batches"], b["batches"], 1),
            "its batches are shared out whole",
        ),
        works("DataLoader", "`drop_last=True`", lambda a, b: len({*a["drop"].seen, *b["drop"].seen}) == 92),
        works(
            "DataLoader",
            "another `batch_size` on each rank",
            lambda a, b: whole(a["unequal"], b["unequal"], 1),
            "each sample counts the same",
        ),
        differs(
            "DataLoader",
            "not one, but something to iterate over",
            "with a warning: every rank trains on all that it yields (`ddp` says nothing)",
            lambda a, b: a["other"].seen == b["other"].seen == list(range(40)),
        ),
        works(
            "reload_dataloaders_every_n_epochs",
            "1",
            lambda a, b: a["reload"].metrics["asked"] == 2.0 and whole(a["reload"], b["reload"], 2),
        ),
        *[
            refused(
                "several training loaders",
                name,
                "several training loaders cannot be shared out by one share: put the data sets into one DataLoader, or "
                "set `use_distributed_sampler=False` and give each rank its part of each",
                key=key,
            )
            for name, key in (("a dictionary or list", "two"), ("`CombinedLoader`", "combined"))
        ],
    ],
    warnings=[".*is not a DataLoader: every rank trains on all.*"],
)


class Stream(IterableDataset[Any]):
    """This rank's own samples."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        for k in range(self.length):
            yield k % 240, INPUTS[k % 240], TARGETS[k % 240]


class Data(L.LightningDataModule):
    """A data module with all its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.called.append("setup")

    def train_dataloader(self) -> Any:
        return samples()

    def val_dataloader(self) -> Any:
        return [held_out(), held_out(16)]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def teardown(self, stage: str) -> None:
        self.called.append("teardown")


class TwoSets(Lit):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Draws(Lit):
    """Takes the iterator in the place of a batch."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        x = batch[1]
        self.seen += batch[0].tolist()
        return (self.layer(x) - batch[2]).square().mean()


class Skips(Lit):
    """Rank 0 skips the rest of its epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.trainer.global_rank == 0 and batch_idx == 3 else None


def streams(folder: Path) -> dict[str, Any]:
    data = Data()
    module = fit(TwoSets(), data=data, validation=None, max_epochs=1)
    lengths = 40 if rank() == 0 else 16
    return {
        "stream": fit(data=DataLoader(Stream(40), batch_size=4), max_epochs=1),
        "uneven": fit(data=DataLoader(Stream(lengths), batch_size=4), max_epochs=1),
        "limited": fit(data=DataLoader(Stream(10**6), batch_size=4), limit_train_batches=6),
        "module": Fitted(module, called=data.called),
        "workers": fit(data=samples(num_workers=1), max_epochs=1),
        "iterator": fit(Draws(), max_epochs=2),
        "skips": fit(Skips(), max_epochs=2),
        "none": fit(validation=None),
        "part": heard(lambda: fit(data=DataLoader(Stream(40), batch_size=4), limit_train_batches=0.5)),
        "val part": heard(lambda: fit(data=DataLoader(Stream(40), batch_size=4), val_check_interval=0.5)),
    }


STREAMS = Scene(
    SECTION,
    streams,
    [
        works(
            "IterableDataset",
            "",
            lambda a, b: alike(a["stream"], b["stream"]) and a["stream"].seen == b["stream"].seen == list(range(40)),
            "each rank reads its own stream",
        ),
        differs(
            "IterableDataset",
            "of unequal lengths",
            "a rank that runs dry comes to the others' meetings until theirs end (`ddp` hangs)",
            lambda a, b: alike(a["uneven"], b["uneven"]) and (a["uneven"].batches, b["uneven"].batches) == (10, 4),
        ),
        differs(
            "IterableDataset",
            "with `limit_train_batches=6`",
            "6 n batches of all ranks",
            lambda a, b: alike(a["limited"], b["limited"]) and a["limited"].batches + b["limited"].batches == 24,
        ),
        refused(
            "IterableDataset",
            "with `limit_train_batches=0.5`",
            "is a part of an epoch whose length nobody knows; give a number of batches",
            key="part",
        ),
        refused(
            "IterableDataset",
            "with `val_check_interval=0.5`",
            "is a part of an epoch whose length nobody knows; give a number of batches",
            key="val part",
        ),
        works(
            "LightningDataModule",
            "",
            lambda a, b: (
                whole(a["module"], b["module"], 1)
                and a["module"].called == ["prepare_data", "setup", "teardown"]
                and b["module"].called == ["setup", "teardown"]
            ),
        ),
        works(
            "val_dataloaders",
            "several",
            lambda a, b: (
                {name: value for name, value in a["module"].metrics.items() if name.startswith("val/")}
                == {name: value for name, value in b["module"].metrics.items() if name.startswith("val/")}
                and {"val/dataloader_idx_0", "val/dataloader_idx_1"} <= {*a["module"].metrics}
            ),
        ),
        works("val_dataloaders", "None", lambda a, b: alike(a["none"], b["none"]) and whole(a["none"], b["none"], 2)),
        works("DataLoader", "`num_workers=1`", lambda a, b: whole(a["workers"], b["workers"], 1)),
        works(
            "training_step",
            "takes `dataloader_iter`",
            lambda a, b: alike(a["iterator"], b["iterator"]) and whole(a["iterator"], b["iterator"], 2),
        ),
        differs(
            "on_train_batch_start",
            "returns -1",
            "ends the epoch of that rank alone; the others train on what it leaves",
            lambda a, b: alike(a["skips"], b["skips"]) and len(a["skips"].validated) == 2,
        ),
    ],
    warnings=[
        "Found `dataloader_iter` argument",
        "You are using the `dataloader_iter` step flavor",
        "You defined a `validation_step`",
        "This process .* is multi-threaded",
    ],
)

SCENES = [LOADERS, STREAMS]
