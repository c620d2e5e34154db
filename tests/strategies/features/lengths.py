"""Scenes: how long a run lasts."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.strategies.features.fits import PACE, STEPS, Fitted, alike, fit, free, whole
from tests.strategies.features.table import Scene, differs, works
from tests.strategies.lit import Lit

OF_THE_RUN = "counts steps of the run: one of every rank"


def lasts(folder: Path) -> dict[str, Any]:
    return {
        "epochs": fit(max_epochs=2, pace=PACE),
        "none": fit(max_epochs=0),
        "steps": fit(max_steps=10, max_epochs=-1),
        "no steps": fit(max_steps=0, max_epochs=-1),
        "both": fit(max_steps=10, max_epochs=2),
    }


LASTS = Scene(
    "Trainer",
    lasts,
    [
        works(
            "max_epochs",
            "2",
            lambda a, b: (
                alike(a["epochs"], b["epochs"])
                and whole(a["epochs"], b["epochs"], 2)
                and a["epochs"].epoch == 2
                and free(a["epochs"], b["epochs"])
            ),
            "the fast rank waits for nobody in them, and trains on more",
        ),
        works("max_epochs", "0", lambda a, b: a["none"].seen == b["none"].seen == [] and a["none"].epoch == 0),
        works("max_epochs", "-1", lambda a, b: alike(a["steps"], b["steps"])),
        differs(
            "max_steps",
            "10",
            OF_THE_RUN,
            lambda a, b: (
                all(one[k].global_step == 10 for one in (a, b) for k in ("steps", "both"))
                and a["steps"].batches + b["steps"].batches == 20
            ),
        ),
        works("max_steps", "0", lambda a, b: a["no steps"].batches == b["no steps"].batches == 0),
    ],
    warnings=["`max_epochs=0`.*", "`Trainer.fit` stopped"],
)


class Stops(Lit):
    """Wants to stop after its second batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.seen) >= 8:
            self.trainer.should_stop = True


def at_least(folder: Path) -> dict[str, Any]:
    return {
        "at once": fit(Stops(), max_epochs=5),
        "epochs": fit(Stops(), min_epochs=2, max_epochs=5),
        "steps": fit(Stops(), min_steps=STEPS + 3, max_epochs=5),
    }


AT_LEAST = Scene(
    "In the LightningModule",
    at_least,
    [
        differs(
            "self.trainer.should_stop = True",
            "",
            "on one rank stops all ranks: at the meeting where they are, or at one within the next batches",
            lambda a, b: alike(a["at once"], b["at once"]) and a["at once"].epoch == 1,
        ),
        works("min_epochs", "2", lambda a, b: alike(a["epochs"], b["epochs"]) and 2 <= a["epochs"].epoch < 5),
        differs(
            "min_steps",
            str(STEPS + 3),
            OF_THE_RUN,
            lambda a, b: alike(a["steps"], b["steps"]) and STEPS + 3 <= a["steps"].global_step < 5 * STEPS,
        ),
    ],
)


def in_time(folder: Path) -> dict[str, Any]:
    def timed(limit: Any) -> Fitted:
        start = time.monotonic()
        found = fit(max_epochs=-1, max_time=limit)
        return Fitted(found, seconds=time.monotonic() - start)

    found = {"interval": timed(timedelta(seconds=0.3))}
    for limit in ("00:00:00:00", {"seconds": 0}):
        found[str(limit)] = timed(limit)
    found["validation"] = fit(max_steps=120, max_epochs=-1, val_check_interval=timedelta(seconds=0.05))
    return found


BY_ONE_CLOCK = "the first rank's clock speaks for all"


IN_TIME = Scene(
    "Trainer",
    in_time,
    [
        differs(
            "max_time",
            "timedelta(seconds=0.3)",
            f"{BY_ONE_CLOCK}; all stop at one meeting",
            lambda a, b: alike(a["interval"], b["interval"]) and 0.3 <= a["interval"].seconds < 10,
        ),
        differs(
            "max_time",
            '"00:00:00:00"',
            BY_ONE_CLOCK,
            lambda a, b: alike(a["00:00:00:00"], b["00:00:00:00"]) and a["00:00:00:00"].global_step <= 2 * STEPS,
        ),
        differs(
            "max_time",
            '{"seconds": 0}',
            BY_ONE_CLOCK,
            lambda a, b: alike(a["{'seconds': 0}"], b["{'seconds': 0}"]),
        ),
        differs(
            "val_check_interval",
            "timedelta(seconds=0.05)",
            f"{BY_ONE_CLOCK}; all validate at one meeting",
            lambda a, b: alike(a["validation"], b["validation"]) and len(a["validation"].validated) >= 2,
        ),
    ],
)


SCENES = [LASTS, AT_LEAST, IN_TIME]
