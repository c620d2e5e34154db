"""Each rank in turn is killed in mid-run (SIGKILL): the others neither wait nor fail, and train on what it left.

    rank 1   |-|-|-|-|-|x
    rank 2   |-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|  MEETING of those that live, all equal, every sample seen
             < 6 s before >< 6 s after >      longest step of any other rank, in both windows

    limit     0: a rank that needs nobody takes its steps
    control   mode="none" under the same fault
    ddp       the run fails: every other rank ends with an error

The launcher hosts the store, as torchrun's agent does. With the ranks on four hosts in namespaces (see `freeze`) it is
on a fifth: rank 0 dies like any other. A rank that sends is killed in the middle of a message (see `midway`).
`link busy %` says how much of the time a rank's link carries a message out. Every rank writes down the samples it has
trained on before it says anything of them to others, so the audit also knows those of the dead: each sample of the
epoch must have been trained on at least once; what the dead had trained on since its last heartbeat is trained on
again, and counted here.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.freeze import (
    APART,
    GROWTH,
    LIMIT,
    Fault,
    busy,
    cells,
    fault_of,
    launched,
    role,
    strike,
    wait_for_training,
    work,
)
from benchmarks.hosts import available
from benchmarks.launch import Outcome
from benchmarks.subject import GOSSIP, Knobs, with_control
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Record, Work

N = 4
WINDOW = 6.0


@dataclass(frozen=True)
class Death:
    """What the death of one rank did.

    Attributes:
        fault: The others' longest steps; None where they did not survive.
        failed: How many of the others ended with an error.
        equal: Whether the others ended equal.
        missing: Samples nobody trained on.
        repeated: Samples trained on again.
        taken: Samples that the others took over from the dead.
        busy: Which part of what their links carry the others sent, on hosts of their own.
    """

    rank: int
    fault: Fault | None
    failed: int
    equal: bool
    missing: int
    repeated: int
    taken: int
    busy: float


def run(quick: bool, strategy: str = GOSSIP) -> Table:
    """Kill each rank in turn, each in a run of its own."""
    rows = [Row("a rank that needs nobody", Role.LIMIT, {"growth ms": 0.0})]
    claims: list[Claim] = []
    apart = available()
    for name, knobs in with_control(strategy).items():
        victims = [1] if knobs is None else [0, 2] if quick else list(range(N))
        for where in ["", APART] if knobs is not None and apart is None else [""]:
            for victim in victims:
                death = _killed(knobs, victim, apart=bool(where))
                rows.append(_row(name + where, death, apart=bool(where)))
                claims += _claims(death, where) if name == strategy else []
    title = f"{N} ranks, one is killed: the longest step of any other rank, and the samples it left"
    return Table(title, rows, claims, [] if apart is None else [f"not on four hosts: {apart}"])


def _killed(knobs: Knobs | None, victim: int, *, apart: bool) -> Death:
    job = work(2 * WINDOW + 6, knobs)
    with tempfile.TemporaryDirectory() as folder:
        with launched(job, knobs, Path(folder), apart=apart, store=True) as ranks:
            wait_for_training(ranks)
            time.sleep(WINDOW)  # the time before the fault is measured
            stop = strike(ranks, victim, signal.SIGKILL, knobs)
            outcomes = [o for o in ranks.outcomes(timeout=LIMIT) if o.rank != victim]
        return _death(victim, stop, outcomes, job, _seen(Path(folder)))


def _death(victim: int, stop: float, outcomes: list[Outcome], job: Work, seen: Counter[int]) -> Death:
    records = {o.rank: Record(**o.value) for o in outcomes if not o.error}
    fault = fault_of(records, victim, stop, stop, WINDOW) if len(records) == N - 1 else None
    return Death(
        victim,
        fault,
        failed=N - 1 - len(records),
        equal=len({r.digest for r in records.values()}) == 1 and len(records) == N - 1,
        missing=job.batches * job.batch - len(seen),
        repeated=sum(times - 1 for times in seen.values()),
        taken=sum(r.taken for r in records.values()),
        busy=busy(list(records.values())) if records else 0.0,
    )


def _seen(folder: Path) -> Counter[int]:
    """How often each sample was trained on; a last line that was cut off by the death does not count."""
    seen: Counter[int] = Counter()
    for file in folder.glob("*.seen"):
        text = file.read_text(encoding="ascii")
        for line in text[: text.rfind("\n") + 1].splitlines():
            seen.update(map(int, line.split()[1:]))
    return seen


def _row(name: str, death: Death, *, apart: bool) -> Row:
    figures: dict[str, Cell] = cells(death.fault) if death.fault else {}
    figures |= {"failed": death.failed, "missing": death.missing, "repeated": death.repeated, "taken over": death.taken}
    figures |= {"link busy %": round(100 * death.busy)} if apart else {}
    return Row(f"{name}, rank {death.rank} killed", role(name), figures)


def _claims(death: Death, where: str) -> list[Claim]:
    growth = death.fault.growth if death.fault else float("inf")
    who = f"rank {death.rank} killed{where}"
    return [
        Claim(f"{who}: growth at most {GROWTH * 1000:.0f} ms: {growth * 1000:.0f} ms", growth <= GROWTH),
        Claim(f"{who}: the others ended by themselves, equal", death.equal),
        Claim(f"{who}: every sample was trained on ({death.repeated} again)", death.missing == 0),
    ]
