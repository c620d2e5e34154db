"""Variants take turns, so that whatever else the machine does hits all of them alike, and ratios are made per turn.

turn 0:  a b c     turn 1:  b c a     turn 2:  c a b          ratio = median over turns of (b in turn t / a in turn t)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value behind it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Turns:
    """What every variant measured in every turn."""

    measures: Mapping[str, list[Measures]]

    def of(self, variant: str, key: str) -> Spread:
        """One measure of one variant."""
        return _spread([turn[key] for turn in self.measures[variant]])

    def ratio(self, variant: str, to: str, key: str) -> Spread:
        """One measure of one variant, divided by the same of another in the same turn."""
        pairs = zip(self.measures[variant], self.measures[to], strict=True)
        return _spread([mine[key] / theirs[key] for mine, theirs in pairs])


def repeat(variants: Mapping[str, Callable[[], Measures]], times: int) -> Turns:
    """Run all variants `times` times, interleaved; each returns its measures by name."""
    if times < 1 or not variants:
        raise ValueError(f"`repeat` needs variants and at least 1 turn, got {len(variants)} and {times}")
    measures: dict[str, list[Measures]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(times):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            print(f"  turn {turn + 1} of {times}: {name}", file=sys.stderr, flush=True)
            measures[name].append(variants[name]())
    return Turns(measures)


def _spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))
