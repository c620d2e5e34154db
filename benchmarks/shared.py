"""Two ranks of one host exchange vectors and average them: bodies through memory, beside gloo over loopback.

    limit     three copies of the vector: into the slot, into the memory, out of it
    control   gloo over loopback: the same links, with `shared_memory=False`

An exchange is a message of each to the other, taken, averaged into the own vector, and given back. CPU ms are of both
processes, all threads. Vectors up to 64 KiB lie in the header in both variants: there nothing can be gained.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, repeat
from benchmarks.table import Role, Row, Table
from lightning_async.transport.cluster import ClusterCarrier
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Message

KIND = FIRST_FREE_KIND
LIMIT = 300.0
WARM = 5
VARIANTS = {"gloo": False, "memory": True}


def run(quick: bool) -> Table:
    """All sizes."""
    rows: list[Row] = []
    for numel in (1 << 10, 1 << 16, 1 << 20) if quick else (1 << 10, 1 << 16, 1 << 20, 1 << 23, 25_000_000):
        count = max(5, min(200, (20 << 20) // numel))
        variants = {name: partial(_measure, shared, numel, count) for name, shared in VARIANTS.items()}
        turns = repeat(variants, 1 if quick else 5)
        rows.append(Row(f"{numel} floats: limit", Role.LIMIT, {"ms": 3000 * _copy_seconds(numel)}))
        for name in VARIANTS:
            cells = {"ms": 1000 * turns.of(name, "seconds").median, "CPU ms": 1000 * turns.of(name, "cpu").median}
            ratios = {f"{what} / gloo": str(turns.ratio(name, "gloo", key)) for what, key in _KEYS.items()}
            role = Role.CONTROL if name == "gloo" else Role.RESULT
            rows.append(Row(f"{numel} floats: {name}", role, {**cells, **ratios}))
    return Table("2 ranks of one host: one exchange each way", rows)


_KEYS = {"ms": "seconds", "CPU ms": "cpu"}


def _measure(shared: bool, numel: int, count: int) -> Measures:
    with Ranks(exchange, 2, arguments={"shared": shared, "numel": numel, "count": count}, store=True) as ranks:
        found = ranks.values(timeout=LIMIT)
    return {"seconds": max(one["seconds"] for one in found), "cpu": sum(one["cpu"] for one in found)}


def exchange(shared: bool, numel: int, count: int) -> dict[str, float]:
    """One rank: so many exchanges with the other."""
    me = int(os.environ["RANK"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    carrier = ClusterCarrier(
        store=store, me=me, world=2, run="shared", peers=[1 - me], interface="lo", shared_memory=shared
    )
    carrier.start()
    own, begin, cpu = torch.ones(numel), 0.0, 0.0
    for step in range(WARM + count):
        if step == WARM:
            begin, cpu = time.perf_counter(), time.process_time()
        _once(carrier, own)
    found = {"seconds": (time.perf_counter() - begin) / count, "cpu": (time.process_time() - cpu) / count}
    carrier.close(linger=5.0)
    return found


def _once(carrier: ClusterCarrier, own: torch.Tensor) -> None:
    other = 1 - carrier.me
    _until(carrier, partial(carrier.post, other, Message(KIND, own)))
    letters: list[Letter] = []

    def taken() -> bool:
        letters.extend(carrier.take(KIND))
        return bool(letters)

    _until(carrier, taken)
    body = letters[0].message.body
    assert body is not None  # every message here has one
    own.lerp_(body, 0.5)
    carrier.folded(letters[0])


def _until(carrier: ClusterCarrier, done: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT / 2
    while not done():
        if time.monotonic() > end:
            raise TimeoutError("the other rank did not answer")
        carrier.wait(0.1)


def _copy_seconds(numel: int) -> float:
    """One copy of a vector by one thread."""
    source, target = torch.ones(numel).numpy(), torch.zeros(numel).numpy()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - start)
    return min(seconds)
