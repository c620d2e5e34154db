"""What a meeting costs at 25 million weights: two ranks on one machine, the consensus and all that goes with it.

    limit     four copies of the weights in memory: a rank sends a half, gets a half, and writes the mean back
    control   mode="none": the same meetings, of replicas that sent each other nothing in between

A meeting is counted from a rank's last step of an epoch to the consensus: it holds the wait for the other rank's last
step, the mail that is drained, the mean of the weights, and how far the replicas are apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean, median

from benchmarks.launch import Ranks
from benchmarks.overhead import physical
from benchmarks.repeat import Measures, repeat
from benchmarks.subject import Knobs
from benchmarks.table import Role, Row, Table
from benchmarks.work import Record, Work, fit

N = 2
LIMIT = 300.0
COPIES = 4
VARIANTS: Mapping[str, Knobs] = {"gossip_ring": {}, "none": {"mode": "none"}}


def run(quick: bool) -> Table:
    """Several short epochs, of nothing but their own compute."""
    work = Work(N * 6, epochs=3 if quick else 6, width=2048, layers=7, step=0.0)
    turns = repeat({name: partial(_measure, knobs, work) for name, knobs in VARIANTS.items()}, 1 if quick else 2)
    rows = [Row("limit", Role.LIMIT, {"meeting s": COPIES * physical(work)})]
    for name in VARIANTS:
        cells = {key: turns.of(name, key).median for key in ("meeting s", "longest s", "step s")}
        rows.append(Row(name, Role.CONTROL if name == "none" else Role.RESULT, cells))
    return Table(f"{N} ranks, 25 M weights: a meeting", rows)


def _measure(knobs: Knobs, work: Work) -> Measures:
    with Ranks(fit, N, arguments=work.arguments(knobs)) as ranks:
        records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    seconds = [seconds for record in records for seconds in record.meetings]
    return {
        "meeting s": median(seconds),
        "longest s": max(seconds),
        "step s": fmean(1 / record.rate() for record in records),
    }
