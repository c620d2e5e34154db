"""Scenes: loaders whose samples are shared out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from tests.strategies.features.fits import PACE, SAMPLES, alike, fit, free, heard, rank, samples, whole
from tests.strategies.features.table import Scene, differs, refused, works
from tests.strategies.lit import INPUTS, TARGETS, Lit

SECTION = "Data"


def loaders(folder: Path) -> dict[str, Any]:
    weighted = WeightedRandomSampler([0.0] * 48 + [1.0] * 48, SAMPLES, generator=torch.Generator().manual_seed(1))
    batches = BatchSampler(SequentialSampler(range(SAMPLES)), 6, drop_last=False)
    return {
        "plain": fit(pace=PACE),
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
            lambda a, b: (
                whole(a["plain"], b["plain"], 2) and alike(a["plain"], b["plain"]) and free(a["plain"], b["plain"])
            ),
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
            lambda a, b: (
                min(a["sampler"].seen + b["sampler"].seen) >= 48
                and len(a["sampler"].seen + b["sampler"].seen) == SAMPLES
            ),
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
            lambda a, b: alike(a["unequal"], b["unequal"]) and whole(a["unequal"], b["unequal"], 1),
            "each sample counts the same; a step of the run is one batch of each, and all ranks foresee the same",
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
            lambda a, b: (
                a["reload"].metrics["asked"] == 2.0
                and alike(a["reload"], b["reload"])
                and whole(a["reload"], b["reload"], 2)
            ),
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


SCENES = [LOADERS]
