"""Scenes: how precise the numbers are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L

from tests.strategies.features.fits import Fitted, alike, fit
from tests.strategies.features.table import Scene, Verdict, differs, shown, works

SECTION = "Optimizers, schedules, precision"


PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true")


ALIASES = {64: "64-true", "bf16": "bf16-mixed", 32: "32-true"}


def precisions(folder: Path) -> dict[str, Any]:
    def of(precision: Any) -> Fitted:
        dtypes: set[str] = set()

        def look(trainer: L.Trainer, module: L.LightningModule) -> str:
            dtypes.update(str(p.dtype) for p in module.parameters())
            return str(trainer.precision)

        return Fitted(fit(look=look, precision=precision, max_epochs=1, gradient_clip_val=1.0), dtypes=dtypes)

    return {str(precision): of(precision) for precision in (*PRECISIONS, *ALIASES, "16-mixed")}


HALF = (
    "exchanged, averaged and stepped in float32: no step is too small to count, as one by less than half a place is "
    "under `ddp`. The weights hold the rounding of that, which costs 4 bytes a parameter, and what the optimizer "
    "remembers is float32"
)


DTYPES = {"64-true": "torch.float64", "bf16-true": "torch.bfloat16", "16-true": "torch.float16"}


def _precise(precision: str) -> Any:
    def holds(a: Any, b: Any) -> bool:
        one, other = a[precision], b[precision]
        dtype = DTYPES.get(precision, "torch.float32")
        return (
            alike(one, other)
            and one.dtypes == {dtype}
            and {*one.looked} == {precision}
            and all(map(math.isfinite, one.weights))
        )

    return holds


PRECISION = Scene(
    SECTION,
    precisions,
    [
        *[
            (
                differs("precision", f'"{p}"', HALF, _precise(p))
                if p in ("bf16-true", "16-true")
                else works("precision", f'"{p}"', _precise(p))
            )
            for p in PRECISIONS
        ],
        *[
            works(
                "precision",
                repr(alias).replace("'", '"'),
                lambda a, b, k=str(alias), p=p: {*a[k].looked} == {p},
                f'is `"{p}"`',
            )
            for alias, p in ALIASES.items()
        ],
        works(
            "precision",
            '"16-mixed"',
            lambda a, b: {*a["16-mixed"].looked} == {"bf16-mixed"},
            'on a CPU Lightning takes `"bf16-mixed"` for it',
        ),
        shown(
            "precision",
            '"16-mixed" with a scaler',
            Verdict.DIFFERS,
            "each rank has its own scale; `strategy.skipped_steps` counts what it skipped",
            "strategies/test_precision.py::test_steps_that_the_scaler_skips_are_counted_and_harm_nobody",
        ),
        shown(
            "precision",
            '"transformer-engine"',
            Verdict.REFUSED,
            "`precision='transformer-engine'` combines its scales over all ranks at every step; use "
            "`precision='bf16-true'`, or 'bf16-mixed'",
            "strategies/test_refusals.py::test_precision_that_exchanges_scales",
        ),
    ],
    warnings=[
        "You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`",
        "`precision=.*` is supported for historical",
        "16 is supported",
        ".*historical reasons.*",
    ],
)


SCENES = [PRECISION]
