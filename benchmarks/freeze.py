"""Each rank in turn is stopped for 5 s (SIGSTOP), the host of the store included: nobody else's longest step grows.

    rank 0   |-|-|-|-|-====== stopped ======-|-|-|-|-|-|-|-|-|      the store is there: no heartbeats, no claims
    rank 1   |-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|
             < as long before >< from the stop to 2 s after >       longest step of any other rank, in both windows

    limit     0: a rank that needs nobody takes its steps
    control   mode="none" under the same faults: what the store and a busy machine alone do to the steps
    ddp       everybody stands still for 5 s

A rank that sends is stopped in the middle of a message (see `midway`); one that does not, at any time. The same on four
hosts in network namespaces, whose links carry 100 Mbit/s: a model of 1.3 million weights (5 MB) takes 0.4 s to cross
one, and steps are 0.04 s long. `link busy %` is the bytes that a rank sent, over what its link carries in the time. The
run must end by itself, with all ranks equal.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.hosts import Hosts, available
from benchmarks.launch import Ranks
from benchmarks.subject import GOSSIP, NONE, Knobs, with_control
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Record, Work, fit

N = 4
SECONDS, AFTER = 5.0, 2.0
WINDOW = SECONDS + AFTER
GROWTH = 0.1
LIMIT = 300.0
MBIT = 100.0
APART = ", four hosts"
STEP = 0.04
RATE = 22.0  # batches a second of one rank, at most: some of the step is real compute
SOON = 20.0  # seconds until a rank sends its next message, at most
REST = 20.0  # seconds of training after the last fault: what is claimed ahead tapers towards the end of the epoch


@dataclass(frozen=True)
class Fault:
    """What the stop of one rank did to the others: their longest steps, in seconds."""

    rank: int
    before: float
    after: float

    @property
    def growth(self) -> float:
        """By how much the longest step grew."""
        return self.after - self.before


def work(seconds: float, knobs: Knobs | None) -> Work:
    """About so many seconds of training, on four ranks."""
    return Work(N * round(RATE * seconds), width=512, layers=6, step=STEP, midway=sends(knobs))


def sends(knobs: Knobs | None) -> bool:
    """Whether there are messages of ours while it trains, in whose middle a rank can be struck."""
    return knobs is not None and knobs != NONE


def strike(ranks: Ranks, rank: int, number: signal.Signals, knobs: Knobs | None) -> float:
    """Freeze or kill a rank, in the middle of a message where it sends any; when that was."""
    if sends(knobs):
        ranks.strike(rank, number, timeout=SOON)
        return time.monotonic()
    begin = time.monotonic()
    (ranks.stop if number == signal.SIGSTOP else ranks.kill)(rank)
    return begin


def run(quick: bool, strategy: str = GOSSIP) -> Table:
    """Stop each rank in turn, within one run of each variant."""
    rows = [Row("a rank that needs nobody", Role.LIMIT, {"growth ms": 0.0})]
    claims: list[Claim] = []
    apart = available()
    for name, knobs in with_control(strategy).items():
        victims = [1] if knobs is None else [0, 2] if quick else list(range(N))
        for where in ["", APART] if knobs is not None and apart is None else [""]:
            faults, records = _stopped(knobs, victims, apart=bool(where))
            rows += [_row(name + where, fault, records if where else ()) for fault in faults]
            if name == strategy:
                equal = len({r.digest for r in records}) == 1
                claims += [_claim(fault, where) for fault in faults]
                claims.append(Claim(f"the run ended by itself, all ranks equal{where}", equal))
    title = f"{N} ranks, each in turn stopped for {SECONDS:.0f} s: the longest step of any other rank"
    return Table(title, rows, claims, [] if apart is None else [f"not on four hosts: {apart}"])


@contextmanager
def launched(
    job: Work, knobs: Knobs | None, folder: Path | None = None, *, apart: bool, store: bool = False
) -> Iterator[Ranks]:
    """The ranks on this host, or each on one of its own; `store`: it is on none of them, but here or on a host more."""
    arguments = job.arguments(knobs, folder)
    with ExitStack() as stack:
        if apart:
            hosts = stack.enter_context(Hosts(N + store, mbit=MBIT))
            address = hosts.address(N if store else 0)
            yield stack.enter_context(
                Ranks(fit, N, arguments=arguments, address=address, spawn=hosts.spawn, store=store)
            )
        else:
            yield stack.enter_context(Ranks(fit, N, arguments=arguments, store=store))


def busy(records: Sequence[Record]) -> float:
    """Which part of what a rank's link carries was sent."""
    return fmean(r.sent * 8 / (MBIT * 1e6 * (r.end - r.start)) for r in records)


def _stopped(knobs: Knobs | None, victims: Sequence[int], *, apart: bool) -> tuple[list[Fault], list[Record]]:
    job = work(WINDOW * (len(victims) + 1) + (0 if knobs is None else REST), knobs)
    stops: list[tuple[int, float]] = []
    with launched(job, knobs, apart=apart) as ranks:
        wait_for_training(ranks)
        time.sleep(WINDOW)  # the time before the first fault is measured
        for victim in victims:
            stops.append((victim, strike(ranks, victim, signal.SIGSTOP, knobs)))
            time.sleep(SECONDS)  # the fault itself
            ranks.resume(victim)
            time.sleep(AFTER)  # the others' steps after it belong to the figure
        records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    first = stops[0][1]
    return [fault_of(dict(enumerate(records)), victim, first, stop, WINDOW) for victim, stop in stops], records


def wait_for_training(ranks: Ranks) -> None:
    """All ranks train, their links are up."""
    for rank in range(N):
        ranks.wait_for(rank, "training", timeout=120.0)


def fault_of(records: Mapping[int, Record], victim: int, first: float, stop: float, window: float) -> Fault:
    """The longest steps of the others: in as long a time before the first fault of the run, and from this one on."""
    others = [record for rank, record in records.items() if rank != victim]
    before = max(record.longest(first - window, first) for record in others)
    return Fault(victim, before, max(record.longest(stop, stop + window) for record in others))


def _row(name: str, fault: Fault, apart: Sequence[Record]) -> Row:
    more: dict[str, Cell] = {"link busy %": round(100 * busy(apart))} if apart else {}
    return Row(f"{name}, rank {fault.rank} stopped", role(name), cells(fault) | more)


def role(name: str) -> Role:
    """What a row is for, by the variant that its name begins with."""
    return {"none": Role.CONTROL, "ddp": Role.OTHER}.get(name.partition(",")[0], Role.RESULT)


def cells(fault: Fault) -> dict[str, Cell]:
    """The figures of a fault, in milliseconds."""
    return {
        "longest before ms": round(1000 * fault.before, 1),
        "longest after ms": round(1000 * fault.after, 1),
        "growth ms": round(1000 * fault.growth, 1),
    }


def _claim(fault: Fault, apart: str) -> Claim:
    where = " (the store's host)" if fault.rank == 0 else ""
    sentence = (
        f"rank {fault.rank}{where} stopped{apart}: growth at most {GROWTH * 1000:.0f} ms: {fault.growth * 1000:.0f} ms"
    )
    return Claim(sentence, fault.growth <= GROWTH)
