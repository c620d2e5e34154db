"""Who waits at an epoch's end when loaders have workers: two ranks, one 5x slow, in short epochs, the first one too.

    limit     all ranks come to their last step at once: each has its part of the sum of speeds
    control   mode="none": the same shares, and not one message

Workers' queues are filled before the first step, when no speed is known. The gap is what lies between the beginnings of
the ranks' last steps of an epoch, in batches of the slow one. What the workers hold, and the one batch that Lightning
fetches ahead, is a rank's look-ahead: a rank that took its queue full, and then found itself slow, would be so far
behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, repeat
from benchmarks.subject import Knobs
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.work import Record, Work, fit

SLOW = 5.0
LONG, SHORT = 0.03, 0.003  # a step
BATCHES = {LONG: 100, SHORT: 1000}
LIMIT = 300.0
VARIANTS: Mapping[str, tuple[float, int, int, Knobs]] = {
    "num_workers=0": (LONG, 0, 2, {}),
    "num_workers=4": (LONG, 4, 2, {}),
    "num_workers=4, prefetch_factor=8": (LONG, 4, 8, {}),
    "none, num_workers=4": (LONG, 4, 2, {"mode": "none"}),
    "num_workers=0, 1000 of 3 ms": (SHORT, 0, 2, {}),
    "num_workers=4, 1000 of 3 ms": (SHORT, 4, 2, {}),
    "none, num_workers=4, 1000 of 3 ms": (SHORT, 4, 2, {"mode": "none"}),
}


def run(quick: bool) -> Table:
    """Two epochs of each; the quick form has half as long ones."""
    batches = {step: n // 2 if quick else n for step, n in BATCHES.items()}
    turns = repeat({name: partial(_measure, batches[VARIANTS[name][0]], *VARIANTS[name]) for name in VARIANTS}, 1)
    rows = []
    for step, n in batches.items():
        ideal = n / (1 + SLOW)
        name = f"limit, {n} of {step * 1000:g} ms"
        rows.append(Row(name, Role.LIMIT, {"look-ahead": "-", **_cells([(ideal, 0.0), (ideal, 0.0)])}))
    claims = []
    for name, (_, workers, prefetch, knobs) in VARIANTS.items():
        ahead = workers * prefetch + 1
        found = dict(turns.measures[name][0])
        epochs = [(found[f"batches {epoch}"], found[f"gap {epoch}"]) for epoch in range(2)]
        role = Role.CONTROL if knobs else Role.RESULT
        rows.append(Row(name, role, {"look-ahead": str(ahead), **_cells(epochs)}))
        gap = max(gap for _, gap in epochs)
        claims.append(
            Claim(f"{name}: last steps within 1 + {ahead} batches of the slow rank: {gap:.1f}", gap <= 1 + ahead)
        )
    title = f"2 ranks, one {SLOW:g}x slower: epochs of {batches[LONG]} batches, steps of {LONG * 1000:g} ms or as named"
    return Table(title, rows, claims)


def _measure(batches: int, step: float, workers: int, prefetch: int, knobs: Knobs) -> Measures:
    work = Work(batches, epochs=2, batch=4, step=step, slow={1: SLOW}, workers=workers, prefetch=prefetch)
    with Ranks(fit, 2, arguments=work.arguments(knobs)) as ranks:
        records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    found = {}
    for epoch in range(2):
        lasts = [_last(record, epoch) for record in records]
        found[f"gap {epoch}"] = abs(lasts[0] - lasts[1]) / (step * SLOW)
        found[f"batches {epoch}"] = float(records[1].epochs[epoch] - (records[1].epochs[epoch - 1] if epoch else 0))
    return found


def _last(record: Record, epoch: int) -> float:
    """When the last step of an epoch began: where the one before it ended."""
    end = record.epochs[epoch]
    alone = end - (record.epochs[epoch - 1] if epoch else 0) == 1
    return record.first[epoch] if alone else record.marks[end - 2]


def _cells(epochs: list[tuple[float, float]]) -> dict[str, str]:
    cells = {}
    for number, (batches, gap) in enumerate(epochs):
        cells[f"epoch {number}: slow rank's"] = f"{batches:.0f}"
        cells[f"gap {number}"] = f"{gap:.1f}"
    return cells
