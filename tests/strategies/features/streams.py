"""Scenes: streams, data modules, and steps that fetch by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from tests.strategies.features.fits import Fitted, alike, fit, heard, held_out, rank, samples, whole
from tests.strategies.features.table import Scene, differs, refused, works
from tests.strategies.lit import INPUTS, TARGETS, Lit

SECTION = "Data"


class Stream(IterableDataset[Any]):
    """This rank's own samples."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        for k in range(self.length):
            yield k % 240, INPUTS[k % 240], TARGETS[k % 240]


class Sized(Stream):
    """One that says how long it is."""

    def __len__(self) -> int:
        return self.length


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
        "known part": fit(data=DataLoader(Sized(40), batch_size=4), limit_train_batches=0.5),
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
        differs(
            "IterableDataset",
            "with `__len__` and `limit_train_batches=0.5`",
            "that part of each rank's own, added up: so many batches of all ranks. Streams must be equally long",
            lambda a, b: (
                alike(a["known part"], b["known part"]) and a["known part"].batches + b["known part"].batches == 20
            ),
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
                alike(a["module"], b["module"])
                and whole(a["module"], b["module"], 1)
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
            "ends the epoch of that rank alone; what it had claimed by then is left out, the rest goes to the others",
            lambda a, b: alike(a["skips"], b["skips"]) and len(a["skips"].validated) == 2,
        ),
    ],
    warnings=[
        "Found `dataloader_iter` argument",
        "You are using the `dataloader_iter` step flavor",
        "You defined a `validation_step`",
        "This process .* is multi-threaded",
        "Your `IterableDataset` has `__len__` defined",
    ],
)


SCENES = [STREAMS]
