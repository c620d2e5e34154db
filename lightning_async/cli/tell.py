"""What a replay says to people: what may differ before it begins, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
import torch

from lightning_async.strategies.course import Course, Difference
from lightning_async.transport.log import Divergence, Log
from lightning_async.version import __version__

HARMLESS = {
    "Meetings",
    "Rests",
    "Averages",
    "TQDMProgressBar",
    "RichProgressBar",
    "ModelSummary",
    "RichModelSummary",
    "ModelCheckpoint",
    "EarlyStopping",
    "LearningRateMonitor",
    "WeightAveraging",
    "EMAWeightAveraging",
    "SpeedFaults",
    "AdaptiveShrink",
    "DelayStats",
    "TrafficStats",
    "SpreadStats",
}
"""Callbacks that change nothing that is not in the log."""


def notes(header: Mapping[str, Any]) -> list[str]:
    """What may make last bits differ."""
    pairs = [("torch", str(torch.__version__)), ("lightning", lightning.__version__), ("device", "cpu")]
    pairs.append(("lightning_async", __version__))
    return [
        f"note: the run had {name} {header[name]}, its replay has {now}: last bits may differ (--tolerance)"
        for name, now in pairs
        if header[name] != now
    ]


def summary(logs: Mapping[int, Log], course: Course, member: int | None) -> str:
    """The last line of a replay without a difference."""
    loosely = f"within {course.tolerance or 0:g} (losses differ by {course.off:.2g} at most)"
    same = "to the bit" if course.tolerance is None else loosely
    until = course.until
    reached = "" if until is None or all(log.step < until for log in logs.values()) else f", until step {until}"
    whose = "the run is" if member is None else f"{logs[member].name} is"
    whose = f"as far as it was recomputed, {whose}" if course.short else whose
    counted = f"{many(len(logs), logs[0].kind)}, {many(course.taken, 'step')}, "
    counted += f"{many(course.folds, 'fold')}; compared: {many(course.losses, 'loss', 'losses')}, "
    lines = [
        f"{log.name}'s log ends behind step {log.step}: it was stopped or killed" for log in logs.values() if log.cut
    ]
    lines += [
        f"{logs[rank].name} is recomputed to step {logs[rank].step} only: what it took then was sent behind the end of "
        "a log"
        for rank in course.short
    ]
    if not course.losses + course.digests:
        whose = f"nothing to compare with was recorded (losses on a GPU are not); {whose}"
    lines.append(f"{whose} as recorded, {same}{reached}: {counted}{many(course.digests, 'digest')}")
    return "\n".join(lines)


def first_difference(difference: Difference | Divergence, logs: Mapping[int, Log]) -> str:
    """The last line of a replay that ends early."""
    said = str(difference)
    if isinstance(difference, Divergence) and difference.member is not None:
        said = f"{logs[difference.member].name}, behind step {difference.step}: {said}"
    others = sorted(set(logs[0].header["callbacks"]) - HARMLESS)
    left_out = f"\ncallbacks of the run that the replay leaves out: {', '.join(others)}" if others else ""
    return f"first difference: {said}{left_out}"


def many(number: int, one: str, more: str | None = None) -> str:
    """A number and what it counts."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"
