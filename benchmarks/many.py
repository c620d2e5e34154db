"""Up to 256 ranks of `async_global`, speeds over a factor of 10: who waits, what travels, what a sample counts.

    limit     a ring all-reduce sends nearly twice the weights for each rank, all the same; and nobody waits
    control   mode="none": no messages, one meeting

On the virtual cluster, each rank with `local_steps="speed"`. Every step of rank r adds 1 to a number of its own, so the
consensus says what one sample of each rank counts: 1 is fair. An exchange is a push and an answer of each shard. Beside
what a rank sends on average stands what the busiest one sends: who owns a shard also answers all others.
Everything follows from the seed; nothing is timed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.subject import NONE, Knobs, algorithm
from benchmarks.table import Cell, Claim, Role, Row, Table
from lightning_async.algorithms.shards import MANY, PUSH
from lightning_async.algorithms.training import Trained, train
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

SIZES, WEIGHTS, STEPS, STEP, LATENCY = (4, 16, 64, 256), 4096, 400, 0.02, 0.005
FACTOR, GROWTH, UNFAIR = 10.0, 1.1, 0.1
SPEED: Knobs = {"strategy": "async_global", "local_steps": "speed"}
SENT, BUSIEST = "weights sent", "by the busiest"


def run(quick: bool) -> Table:
    """One row a size, and one of the control at the largest."""
    torch.set_num_threads(1)
    sizes = SIZES[:-1] if quick else SIZES
    found = {n: _measure(n, SPEED) for n in sizes}
    rows = [Row("ring all-reduce", Role.LIMIT, {"waits": 0, SENT: 2.0, BUSIEST: 2.0, "a sample counts": "1.00"})]
    rows.append(Row(f"{sizes[-1]} ranks, none", Role.CONTROL, _measure(sizes[-1], NONE)))
    rows += [Row(f"{n} ranks", Role.RESULT, cells) for n, cells in found.items()]
    waits = sum(_number(cells["waits"]) for cells in found.values())
    grown = _number(found[sizes[-1]][SENT]) / _number(found[sizes[0]][SENT])
    busiest = _number(found[sizes[0]][BUSIEST]) / 2.0
    unfair = max(_number(cells["most unfair"]) for cells in found.values())
    claims = [
        Claim("no rank ever waited between meetings", waits == 0),
        Claim(
            f"bytes of a rank in an exchange, on average, do not grow with their number: {grown:.2f}x", grown <= GROWTH
        ),
        Claim(f"where each has a shard, the busiest sends no more than a ring does: {busiest:.2f}x", busiest <= GROWTH),
        Claim(f"one sample counts the same on every rank, within 10 %: {unfair:.1%}", unfair <= UNFAIR),
    ]
    notes = [
        f"{SENT}: all that crossed the network while all trained, mirrors too, for an exchange of all shards.",
        f"{BUSIEST}: what one rank put onto the network, at most, for an exchange of the average rank; there are "
        f"at most {MANY} shards, whose owners answer all the others.",
        "a sample counts: on the rank where it counts least, and most. late: the latest push, in rounds of all ranks.",
    ]
    return Table(f"{sizes[0]} to {sizes[-1]} ranks, speeds over a factor of {FACTOR:g}", rows, claims, notes)


def _measure(n: int, knobs: Knobs) -> dict[str, Cell]:
    chance = random.Random(n)
    speeds = [FACTOR ** chance.random() for _ in range(n)]
    steps = [max(4, int(STEPS / speed)) for speed in speeds]
    cluster = VirtualCluster(n, latency=LATENCY, seed=n)
    sent = _counted(cluster, until=STEP * min(k * speed for k, speed in zip(steps, speeds, strict=True)))
    programs, parameters = {}, [nn.Parameter(torch.zeros(WEIGHTS)) for _ in range(n)]
    for r, carrier in enumerate(cluster.carriers):
        programs[r] = train(
            algorithm(knobs),
            Replica([parameters[r]]),
            carrier,
            steps=steps[r],
            take_step=lambda k: None,
            optimizer_step=_adding(parameters[r], WEIGHTS // n * r),
            seconds=lambda me, k: STEP * speeds[me],
            rounds=Rounds(carrier),
        )
    trained: dict[int, Trained] = cluster.run(programs)
    consensus = trained[0].consensus
    assert consensus is not None
    counts = [consensus[WEIGHTS // n * r].item() * n / steps[r] for r in range(n)]
    return {
        "waits": sum(one.waits for one in trained.values()),
        **(_travelled(trained, sent, n) if sent else {}),
        "a sample counts": f"{min(counts):.2f} to {max(counts):.2f}",
        "most unfair": max(abs(count - 1) for count in counts),
    }


def _travelled(trained: dict[int, Trained], sent: Counter[str], n: int) -> dict[str, Cell]:
    folded = [a for one in trained.values() for a in one.arrivals if a.fate is not Fate.LOST]
    shards = min(MANY, n)
    return {
        "exchanges": round(len(folded) / shards / n, 1),
        SENT: sum(sent[f"bytes of {r}"] for r in range(n)) / (4 * WEIGHTS) / (sent["pushes"] / shards),
        BUSIEST: max(sent[f"bytes of {r}"] for r in range(n)) / (4 * WEIGHTS) / (sent["pushes"] / shards / n),
        "late": max(a.delay for a in folded) / n,
    }


def _counted(cluster: VirtualCluster, *, until: float) -> Counter[str]:
    """What crosses the wires up to this time."""
    sent: Counter[str] = Counter()
    send = cluster._wire.send

    def counting(link: Any, packet: Any) -> None:
        body = packet.message.body
        if cluster.time < until:
            sent[f"bytes of {packet.sender}"] += 0 if body is None else body.numel() * body.element_size()
            sent["pushes"] += packet.message.kind == PUSH
        send(link, packet)

    cluster._wire.send = counting  # type: ignore[method-assign]
    return sent


def _adding(parameter: nn.Parameter, at: int) -> Callable[[], None]:
    def add() -> None:
        parameter.data[at] += 1.0

    return add


def _number(cell: Cell) -> float:
    assert isinstance(cell, (int, float))
    return float(cell)
