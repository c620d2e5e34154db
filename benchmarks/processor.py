"""What an exchange of small shards costs: processor time of a step, by the threads that spend it.

    limit     one rank alone with as many steps: no strategy costs less
    control   mode="none": the same steps, and not one message; beyond it is what an exchange costs
    other     gossip_ring, over links of the same kind

Four ranks, steps of sleep, a model of 9 kB a shard: all that a step costs is overhead. Processor time counts whatever
else the machine does much less than seconds do; variants take turns all the same.

    training    the thread that trains: fold, push, and the headers that it writes
    service     what merges on arrival, and answers
    links       a sender and a receiver for each peer
    gloo        its own thread, that reads and writes the sockets
    control     heartbeats, decisions
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks import work as works
from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.subject import Knobs
from benchmarks.table import Cell, Role, Row, Table
from benchmarks.work import Record, Work

N = 4
LIMIT = 600.0
WHO = ("training", "service", "links", "gloo", "control")
VARIANTS: Mapping[str, Knobs] = {
    "async_global": {"strategy": "async_global"},
    "gossip_ring": {},
    "none": {"mode": "none"},
}
ALONE = "alone"
ROLES = {ALONE: Role.LIMIT, "gossip_ring": Role.OTHER, "none": Role.CONTROL}


def run(quick: bool) -> Table:
    """All variants, in turns."""
    work = Work(N * (100 if quick else 250), step=0.02)
    variants = {name: partial(measure, knobs, work) for name, knobs in VARIANTS.items()}
    variants[ALONE] = partial(measure, VARIANTS["none"], replace(work, batches=work.batches // N), 1)
    turns = repeat(variants, 1 if quick else 4)
    rows = [Row(name, ROLES.get(name, Role.RESULT), _cells(turns, name)) for name in variants]
    return Table(f"{N} ranks, nothing wrong: milliseconds of processor time of a step of one rank", rows, [])


def measure(knobs: Knobs, work: Work, n: int = N) -> Measures:
    """Milliseconds by thread, and how often a thread went to sleep, of a step."""
    with Ranks(fit, n, arguments=work.arguments(knobs)) as ranks:
        found = ranks.values(timeout=LIMIT)
    records = [Record(**one["record"]) for one in found]
    figures = {"all": fmean(1000 * record.cpu / len(record.marks) for record in records)}
    for who in WHO:
        figures[who] = fmean(1000 * x["threads"][who] / len(r.marks) for x, r in zip(found, records, strict=True))
    figures["switches"] = fmean(x["switches"] / len(r.marks) for x, r in zip(found, records, strict=True))
    figures["folded"] = fmean(record.folded / len(record.marks) for record in records)
    return figures


def _cells(turns: Turns, name: str) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"all": str(turns.of(name, "all"))}
    cells |= {who: round(turns.of(name, who).median, 3) for who in WHO}
    return cells | {
        "sleeps": round(turns.of(name, "switches").median, 1),
        "folds a step": round(turns.of(name, "folded").median, 2),
        "all / none": str(turns.ratio(name, "none", "all")),
    }


# -- one rank ---------------------------------------------------------------------------------------------------------


def fit(work: dict[str, Any], knobs: Knobs | None, folder: str | None) -> dict[str, Any]:
    """Train on this rank, and look at its threads before and after."""
    threads = Threads()
    record = works.fit(work, knobs, folder, more=[threads])
    return {"record": record, "threads": threads.spent, "switches": threads.switches}


class Threads(Callback):
    """Whose processor time the training took.

    Attributes:
        spent: Seconds, by whose they were.
        switches: How often a thread of this process went to sleep.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.switches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here."""
        self._before = now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """To here; a thread that began meanwhile began from nought."""
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        self.spent = dict.fromkeys(WHO, 0.0)
        for thread, (seconds, switches) in now().items():
            first, already = self._before.get(thread, (0.0, 0))
            self.spent[_who(names.get(thread))] += seconds - first
            self.switches += switches - already


def now() -> dict[int, tuple[float, int]]:
    """Seconds of processor time of each thread of this process, and how often it went to sleep."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            nanoseconds = int((task / "schedstat").read_text(encoding="ascii").split()[0])
            lines = (task / "status").read_text(encoding="utf-8").splitlines()
            sleeps = next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
            found[int(task.name)] = nanoseconds * 1e-9, sleeps
    return found


def _who(name: str | None) -> str:
    """Python does not know gloo's threads."""
    if name is None:
        return "gloo"
    beginnings = {"MainThread": "training", "service": "service", "link": "links"}
    return next((who for beginning, who in beginnings.items() if name.startswith(beginning)), "control")
