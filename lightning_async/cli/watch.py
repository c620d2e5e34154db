"""Where a loss jumps: the first batch whose loss is far above what its member was used to, and what was done around it.

    rise = (loss - largest of the 20 before) / (largest - smallest of the 20 before)    a jump: 5 and more, or no number

`own` is how far the member's optimizer moved its weights in that step, `folds` how far what came from others did, both
relative to the norm of the weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_async.strategies.course import Step

WINDOW, LEAST, SPIKE, AROUND = 20, 3, 5.0, 4
HEAD = ("", "step", "loss", "own", "folds", "folded from (delay)", "samples")


def watch(steps: Sequence[Step], member: int | None) -> str:
    """A table around the largest jump, or a sentence that there is none."""
    rises = _rises(steps if member is None else [step for step in steps if step.member == member])
    spikes = [(step, rise) for step, rise in rises if rise >= SPIKE]
    if not rises:
        return "watch: too few losses to compare"
    found, rise = spikes[0] if spikes else max(rises, key=lambda pair: pair[1])
    mine = [step for step in steps if step.member == found.member]
    at = next(i for i, step in enumerate(mine) if step is found)
    what = "the loss jumps" if spikes else "no loss jumps; the largest rise is"
    by = "" if math.isinf(rise) else f" by {rise:.1f} times the range of the batches before"
    said = f"watch: {what} at member {found.member}, step {found.step}{by}"
    lines = [said, *table(mine[max(0, at - AROUND) : at + AROUND + 1], found)]
    if spikes and found.loss is not None and found.loss > 0:
        lines += _often(steps, found.loss)
    return "\n".join(lines)


def _often(steps: Iterable[Step], size: float) -> list[str]:
    """The samples of several batches with a loss of this size: a bad one comes back with every epoch."""
    batches = [set(step.samples) for step in steps if step.loss is not None and size / 2 <= step.loss < math.inf]
    counts = Counter(sample for batch in batches for sample in batch)
    most = max(counts.values(), default=0)
    samples = [str(sample) for sample, count in counts.items() if count == most]
    return [f"in {most} of {len(batches)} batches with a loss of this size: {', '.join(samples)}"] if most > 1 else []


def table(steps: Iterable[Step], marked: Step) -> list[str]:
    """The batches, one a line."""
    rows = [HEAD, *(_row(step, step is marked) for step in steps)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]


def _row(step: Step, marked: bool) -> tuple[str, ...]:
    folded = ", ".join(f"{a.other} ({a.delay}{'' if a.factor else ', refused'})" for a in step.arrivals) or "-"
    loss = "-" if step.loss is None else f"{step.loss:.5g}"
    samples = f"batch {step.batch}" if step.batch else " ".join(map(str, step.samples))
    return (">" if marked else "", str(step.step), loss, f"{step.own:.1e}", f"{step.folds:.1e}", folded, samples)


def _rises(steps: Iterable[Step]) -> list[tuple[Step, float]]:
    """How far each loss rose above those before it; the first that is no number ends a member's list."""
    before: dict[int, list[float]] = {}
    rises = []
    for step in steps:
        known = before.setdefault(step.member, [])
        if step.loss is None or (known and not math.isfinite(known[-1])):
            continue
        if len(known) >= LEAST or not math.isfinite(step.loss):
            rises.append((step, _rise(step.loss, known[-WINDOW:])))
        known.append(step.loss)
    return rises


def _rise(loss: float, before: Sequence[float]) -> float:
    if not math.isfinite(loss):
        return math.inf
    top, spread = max(before), max(before) - min(before)
    return (loss - top) / spread if spread else math.copysign(math.inf, loss - top) if loss != top else 0.0
