"""Scenes: how much of the data a run takes, and when it validates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.strategies.features.fits import STEPS, alike, fit, heard, whole
from tests.strategies.features.table import Scene, differs, refused, works


def limits(folder: Path) -> dict[str, Any]:
    return {
        "6": fit(limit_train_batches=6),
        "0.5": fit(limit_train_batches=0.5),
        "0": fit(limit_train_batches=0),
        "val 2": fit(limit_val_batches=2, max_epochs=1, num_sanity_val_steps=0),
        "val 0.67": fit(limit_val_batches=0.67, max_epochs=1, num_sanity_val_steps=0),
        "val 0": fit(limit_val_batches=0, max_epochs=1),
        "overfit 3": fit(overfit_batches=3),
        "overfit 0.34": fit(overfit_batches=0.34),
    }


def _first(count: int) -> list[int]:
    """The first positions of the epoch, in both epochs."""
    return sorted([*range(count), *range(count)])


LIMITS = Scene(
    "Trainer",
    limits,
    [
        differs(
            "limit_train_batches",
            "6",
            "as many for every rank of a synchronous run: the first 6 n batches of the epoch, shared out by speed",
            lambda a, b: (
                alike(a["6"], b["6"]) and len(a["6"].seen + b["6"].seen) == 2 * 48 and a["6"].epochs == [6, 12]
            ),
        ),
        differs(
            "limit_train_batches",
            "0.5",
            "that part of the epoch, shared out by speed",
            lambda a, b: alike(a["0.5"], b["0.5"]) and a["0.5"].epochs == [STEPS // 2, STEPS],
        ),
        works("limit_train_batches", "0", lambda a, b: a["0"].batches == b["0"].batches == 0),
        works("limit_val_batches", "2", lambda a, b: a["val 2"].evaluated == b["val 2"].evaluated == 2),
        works("limit_val_batches", "0.67", lambda a, b: a["val 0.67"].evaluated == b["val 0.67"].evaluated == 2),
        works(
            "limit_val_batches",
            "0",
            lambda a, b: (
                a["val 0"].evaluated == 0 and alike(a["val 0"], b["val 0"]) and whole(a["val 0"], b["val 0"], 1)
            ),
        ),
        differs(
            "overfit_batches",
            "3",
            "the same 3 n batches in every epoch, shared out by speed",
            lambda a, b: (
                alike(a["overfit 3"], b["overfit 3"])
                and sorted(a["overfit 3"].seen + b["overfit 3"].seen) == _first(24)
            ),
        ),
        differs(
            "overfit_batches",
            "0.34",
            "the same part of the epoch, shared out by speed",
            lambda a, b: sorted(a["overfit 0.34"].seen + b["overfit 0.34"].seen) == _first(32),
        ),
    ],
    warnings=["You requested to overfit.*", "`Trainer.fit` stopped"],
)


def validations(folder: Path) -> dict[str, Any]:
    long = {"max_epochs": -1, "check_val_every_n_epoch": None}
    return {
        "6": fit(val_check_interval=6),
        "0.25": fit(val_check_interval=0.25),
        "across": fit(val_check_interval=10, max_steps=24, **long),
        "part": heard(lambda: fit(val_check_interval=0.5, **long)),
        "every 2": fit(check_val_every_n_epoch=2, max_epochs=4),
        **{f"sanity {k}": fit(num_sanity_val_steps=k, max_epochs=1) for k in (0, 1, -1)},
    }


def _validated(a: Any, b: Any, key: str, at: list[int]) -> bool:
    return bool(alike(a[key], b[key]) and a[key].validated == at)


VALIDATIONS = Scene(
    "Trainer",
    validations,
    [
        differs(
            "val_check_interval",
            "6",
            "every 6 n batches of all ranks; all meet for it, also in mid-epoch",
            lambda a, b: _validated(a, b, "6", [6, 12, 18, 24]),
        ),
        differs(
            "val_check_interval",
            "0.25",
            "the same for a part of the epoch",
            lambda a, b: _validated(a, b, "0.25", [3, 6, 9, 12, 15, 18, 21, 24]),
        ),
        refused(
            "val_check_interval",
            "0.5, `check_val_every_n_epoch=None`",
            "`val_check_interval` should be an integer or a time-based duration (str 'DD:HH:MM:SS', "
            "datetime.timedelta, or dict kwargs for timedelta) when `check_val_every_n_epoch=None`.",
            key="part",
        ),
        differs(
            "check_val_every_n_epoch",
            "None",
            "batches of all ranks, across epochs",
            lambda a, b: _validated(a, b, "across", [10, 20]),
        ),
        works("check_val_every_n_epoch", "2", lambda a, b: _validated(a, b, "every 2", [2 * STEPS, 4 * STEPS])),
        *[
            works(
                "num_sanity_val_steps",
                str(k),
                lambda a, b, k=k, n=n: a[f"sanity {k}"].sanity == n == b[f"sanity {k}"].sanity,
            )
            for k, n in ((0, 0), (1, 1), (-1, 3))
        ],
    ],
)


SCENES = [LIMITS, VALIDATIONS]
