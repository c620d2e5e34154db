"""Two nodes of two ranks, 200 Mbit/s between them, one node 4x slower: members of two ranks against their own rates.

    node 0    rank 0 --- rank 1        20 ms of emulated compute a step        inside: the mean of gradients, each step
                |                                      200 Mbit/s, in network namespaces
    node 1    rank 2 --- rank 3        80 ms a step

    limit     every member at its own rate, all the time: measured on the control, between the meetings, all ranks at
              once, with the same Trainer
    control   mode="none", also with `inner="node"`: members that never talk, averaged at meetings
    ddp       everybody at the pace of the slow node, and all gradients over the network in every step

Samples per second are those of whole epochs with their ends. Two ranks without `inner`, one on each node, have the same
model on the same links: what an exchange of theirs carries is what two members may carry. `MB` is a body of the
method's own messages for each that was folded on the other node; `wire` is all that left the nodes, rendezvous,
heartbeats, meetings and the headers of frames included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from benchmarks.hosts import Hosts, available
from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.subject import GOSSIP, NONE, Knobs, subject
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Record, Work, fit

NODES, EACH = 2, 2
MBIT = 200.0
STEP, SLOW = 0.02, 4.0
SHARE = 0.95
ALONE = "two ranks, no inner"
LIMIT = 600.0  # seconds that a run may take
INNER: Knobs = {"inner": "node"}


@dataclass(frozen=True)
class Variant:
    """What runs: knobs (None: `ddp`), what is trained, so many ranks on each node."""

    knobs: Knobs | None
    work: Work
    each: int = EACH


def work(seconds: float) -> Work:
    """About so many seconds of training of four ranks, if each member goes its own pace."""
    slow = dict.fromkeys(range(EACH, NODES * EACH), SLOW)
    job = Work(0, width=256, layers=6, step=STEP, slow=slow)
    batches = round(seconds * sum(job.rate(rank) for rank in range(NODES * EACH)))
    return replace(job, batches=batches - batches % (NODES * EACH))


def variants(strategy: str, job: Work) -> Mapping[str, Variant]:
    """By name."""
    alone = replace(job, batches=job.batches // EACH, slow={1: SLOW})
    return {
        strategy: Variant({**subject(strategy), **INNER}, job),
        "none": Variant({**NONE, **INNER}, job),
        "ddp": Variant(None, replace(job, batches=job.batches // 4)),
        ALONE: Variant(subject(strategy), alone, each=1),
    }


ROLES = {"none": Role.CONTROL, "ddp": Role.OTHER, ALONE: Role.OTHER}


def run(quick: bool, strategy: str = GOSSIP) -> Table:
    """All variants, in turns."""
    if (reason := available()) is not None:
        raise RuntimeError(reason)
    mine = variants(strategy, work(4.0 if quick else 40.0))
    turns = repeat({name: partial(measure, variant) for name, variant in mine.items()}, 1 if quick else 3)
    own = turns.of("none", "own rates").median
    rows = [Row("sum of own rates", Role.LIMIT, {"samples/s": own, "share": 1.0})]
    rows += [Row(name, ROLES.get(name, Role.RESULT), cells(turns, name)) for name in mine]
    title = f"{NODES} nodes of {EACH} ranks, {MBIT:.0f} Mbit/s between them, one node {SLOW:g}x slower"
    notes = [f"share: of the own rates of four ranks, so not of {ALONE!r}; ddp runs for a quarter of the samples"]
    return Table(title, rows, claims(turns, strategy), notes)


def claims(turns: Turns, strategy: str) -> list[Claim]:
    """What must hold."""
    share = shares(turns, strategy)
    bodies = turns.ratio(strategy, ALONE, "exchange")
    return [
        Claim(f"samples/s are at least {SHARE:.0%} of the sum of the members' own rates: {share:.1%}", share >= SHARE),
        Claim(f"an exchange is no more bytes than between two ranks: {bodies}x", bodies.high <= 1.0),
    ]


def measure(variant: Variant) -> Measures:
    """One run; the figures by name."""
    with Hosts(NODES, mbit=MBIT) as hosts:
        spawn, n = hosts.spawn_by(variant.each), NODES * variant.each
        arguments = variant.work.arguments(variant.knobs)
        with Ranks(fit, n, arguments=arguments, address=hosts.address(0), spawn=spawn) as ranks:
            records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
        wire = sum(hosts.sent(node) for node in range(NODES))
    if len({record.digest for record in records}) > 1:
        raise RuntimeError(f"the ranks ended unequal: {[record.digest for record in records]}")
    return figures(variant, records, wire)


def figures(variant: Variant, records: list[Record], wire: int) -> Measures:
    """Of what the ranks saw and what left the nodes."""
    begin, end = min(r.start for r in records), max(r.end for r in records)
    steps, folds = sum(len(r.marks) for r in records), sum(len(r.remote) for r in records)
    return {
        "samples/s": variant.work.batch * steps / (end - begin),
        "own rates": variant.work.batch * sum(r.rate() for r in records),
        "folds": float(folds),
        "exchange": sum(r.exchanged for r in records) / max(1, folds),
        "wire": wire / max(1, folds),
        "busy": wire * 8 / (NODES * MBIT * 1e6 * (end - begin)),
        "step": wire * len(records) / steps,
        "slowest": float(min(len(r.marks) for r in records)),
    }


def shares(turns: Turns, name: str) -> float:
    """Samples per second over the own rates that `none` measured in the same turn."""
    pairs = zip(turns.measures[name], turns.measures["none"], strict=True)
    return median(mine["samples/s"] / none["own rates"] for mine, none in pairs)


def cells(turns: Turns, name: str) -> dict[str, Cell]:
    """One variant's figures."""
    talks = turns.of(name, "folds").median > 0
    return {
        "samples/s": turns.of(name, "samples/s").median,
        "share": None if name == ALONE else shares(turns, name),
        "folds": round(turns.of(name, "folds").median),
        "MB a fold": turns.of(name, "exchange").median / 1e6 if talks else None,
        "wire MB a fold": turns.of(name, "wire").median / 1e6 if talks else None,
        "wire kB a step": turns.of(name, "step").median / 1e3,
        "link busy %": round(100 * turns.of(name, "busy").median),
        "batches of slowest": round(turns.of(name, "slowest").median),
    }
