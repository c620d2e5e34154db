"""Virtual time to a target loss when gossip exchanges at every step, every 2nd or every 4th: what decides `period`.

As in `modes`: multiples of the limit, one rank 1x, 4x and 10x slow, the control never talks. An exchange takes its part
of a processor from the training, and of a slow network: one that makes nobody learn sooner is one too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.modes import Knobs, Setting, compared
from benchmarks.table import Table
from benchmarks.tasks import characters, digits

SMALL: Mapping[str, Knobs] = {"none": {"mode": "none"}, **{f"period {k}": {"period": k} for k in (1, 2, 4)}}
LARGE: Mapping[str, Knobs] = {
    name: knobs if name == "none" else {**knobs, "topology": "exponential"} for name, knobs in SMALL.items()
}


def settings(quick: bool) -> list[Setting]:
    """What the table is made of."""
    if quick:
        return [Setting("digits, n=4", replace(digits(), passes=3), 4, range(2), SMALL)]
    return [
        Setting("digits, n=4", digits(), 4, range(40), SMALL),
        Setting("characters, n=4", characters(3200), 4, range(5), SMALL),
        Setting("digits, n=16, exponential", replace(digits(), batch=4), 16, range(5), LARGE),
    ]


def run(quick: bool) -> Table:
    """Run every period at every speed on every task."""
    return compared("Time to a target loss by period, one rank slow", settings(quick), default="period 2")
