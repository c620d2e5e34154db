"""Which point of the agenda comes first, and whether it is near enough for an appointment. Pure arithmetic.

on the way       counts are foreseen, speeds are known: the point that comes soonest, `lead` seconds ahead
at a meeting     all know all counts: a point that is near already is appointed there, by all alike
in step          nobody's speed counts: all take the same number of steps to the next point
in the dark      nobody has told a speed: each goes no further than its equal part of the way
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_async.progress.agenda import Agenda
from lightning_async.progress.appointment import Appointment, Sight, appoint
from lightning_async.progress.report import Report
from lightning_async.progress.tally import Tally, Unit, total

LATENCY = 0.3
"""Seconds after which all that can hear have heard of an appointment."""
LEAD = 1.5
"""Seconds, besides two batches of the slowest, by which an appointment is made ahead."""
FEW = 32
"""Batches a member that are few enough to be shared out equally while no speed is known."""


def lead(reports: Mapping[int, Report]) -> float:
    """How many seconds ahead of its point an appointment is made."""
    slowest = min((report.rates[0] for report in reports.values() if report.rates[0]), default=0.0)
    return LEAD + (2.0 / slowest if slowest else 0.0)


def is_near(made: Appointment, sights: Mapping[int, Sight], reports: Mapping[int, Report]) -> bool:
    """Whether all that go on will have done their parts as soon as if it had been made on the way."""
    going = {rank: sight for rank, sight in sights.items() if sight.goes_on and sight.rate}
    ahead = [(made.parts.get(rank, 0) - sight.count) / sight.rate for rank, sight in going.items()]
    return max(ahead, default=0.0) <= lead(reports)


def on_the_way(
    agenda: Agenda,
    now: Tally,
    epoch: Tally,
    reports: Mapping[int, Report],
    sights: Callable[[Unit], Mapping[int, Sight]],
    elsewhere: Callable[[Unit], int],
) -> Appointment | None:
    """The appointment for the next point, if it is near; `now` was agreed on at the last meeting."""
    found: list[tuple[float, Unit, int]] = []
    for unit, point in agenda.points(now, epoch):
        seen = sights(unit)
        rate = sum(sight.rate * sight.weight for sight in seen.values() if sight.goes_on)
        left = point - elsewhere(unit) - sum(sight.count * sight.weight for sight in seen.values())
        found.append((left / rate if rate else 0.0 if left <= 0 else float("inf"), unit, point))
    if not found:
        return None
    seconds, unit, point = min(found)
    return appoint(unit, point, sights(unit), LATENCY, elsewhere(unit)) if seconds <= lead(reports) else None


def at_once(agenda: Agenda, now: Tally, epoch: Tally, reports: Mapping[int, Report]) -> Appointment | None:
    """The next appointment, if its point is near already: made of what all said at a meeting."""
    found: list[tuple[float, Appointment]] = []
    for unit, point in agenda.points(now, epoch):
        sights = {rank: report.sight(unit, age=0.0, live=True) for rank, report in reports.items()}
        going = [sight for sight in sights.values() if sight.goes_on]
        if not going:
            continue
        known, left = min(sight.rate for sight in going) > 0, point - now[unit]
        batches = left / sum(report.batch if unit == Unit.SAMPLES else report.weight for report in reports.values())
        ahead = left / sum(sight.rate * sight.weight for sight in going) if known else batches
        if ahead <= (lead(reports) if known else FEW):
            elsewhere = now[unit] - total(report.weighed for report in reports.values())[unit]
            found.append((ahead, appoint(unit, point, sights, 0.0, elsewhere)))
    return min(found, key=lambda one: one[0])[1] if found else None


def in_the_dark(agenda: Agenda, now: Tally, epoch: Tally, reports: Mapping[int, Report]) -> dict[Unit, int]:
    """While speeds are unknown: how much of each unit a member may do, so that all together pass no point."""
    going = [report for report in reports.values() if not report.ended]
    if not any(report.rates[0] <= 0 for report in going):
        return {}
    parts: dict[Unit, int] = {}
    for unit, point in agenda.points(now, epoch):
        part = (point - now[unit]) // sum(report.weighs(unit) for report in going)
        parts[unit] = min(part, parts.get(unit, part))
    return parts


def in_equal_parts(
    agenda: Agenda, now: Tally, epoch: Tally, reports: Mapping[int, Report], batch: int
) -> Appointment | None:
    """All stop after the same of their steps: one that went on would wait for one that stopped.

    `batch`: samples of a batch of the weight 1.
    """
    weight = sum(report.weight for report in reports.values())
    found: list[tuple[float, Unit, int, int]] = []
    for unit, point in agenda.points(now, epoch):
        each = -(-(point - now[unit]) // weight)
        found.append((each / (batch if unit == Unit.SAMPLES else 1), unit, point, each))
    if not found:
        return None
    _, unit, point, each = min(found)
    own = {rank: report.weight if unit == Unit.SAMPLES else 1 for rank, report in reports.items()}
    return Appointment(unit, point, {rank: report.tally[unit] + each * own[rank] for rank, report in reports.items()})
