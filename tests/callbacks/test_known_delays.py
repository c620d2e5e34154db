"""A delay that is known beforehand comes out as exactly that, by peer and in all; NumPy is the independent witness.

on a ruler    rank r pushes at 2^r, 3 x 2^r, 5 x 2^r ...; the last one at 8, 16, 24 ...     0 1 0 2 0 1 0 3 0 1 0 2
              so between two pushes of ranks 0, 1, 2, 3 lie 1, 3, 7, 7 of the others
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_async import DelayStats
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.gossip import Alone
from lightning_async.algorithms.training import train
from lightning_async.arrival import Arrival
from lightning_async.callbacks.watched import Watched
from lightning_async.cli.story import tell
from lightning_async.progress.stretch import Stretch
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

N, LENGTH = 4, 96
EVERY = np.array([2, 4, 8, 8])  # seconds
FIRST = np.array([1, 2, 4, 8])


def on_a_ruler() -> dict[int, list[Arrival]]:
    """What each rank tells of its own pushes: real messages, on a clock that is pretended."""
    cluster = VirtualCluster(N, latency=1e-3, jitter=0.0)
    programs = {}
    for rank, carrier in enumerate(cluster.carriers):
        parameter = nn.Parameter(torch.zeros(8))
        programs[rank] = train(
            AsyncGlobal(shards=1, attenuation="none"),
            Replica([parameter]),
            carrier,
            steps=int(LENGTH // EVERY[rank]),
            take_step=lambda step: None,
            optimizer_step=lambda parameter=parameter: parameter.data.add_(1.0),
            seconds=lambda me, step: float(EVERY[me] if step > 1 else FIRST[me]),
            rounds=Rounds(carrier),
            meets=False,
        )
    return {rank: trained.arrivals for rank, trained in cluster.run(programs).items()}


def reference() -> dict[int, np.ndarray[Any, Any]]:
    """The delay of each push: how many pushes of others lie between it and the one before."""
    times = [np.arange(FIRST[rank], LENGTH + 1, EVERY[rank]) for rank in range(N)]
    ranks = np.repeat(np.arange(N), [len(mine) for mine in times])[np.argsort(np.concatenate(times))]
    places = {rank: np.flatnonzero(ranks == rank) for rank in range(N)}
    return {rank: np.diff(place, prepend=-1) - 1 for rank, place in places.items()}


def rank_of(rank: int, arrivals: list[Arrival]) -> DelayStats:
    """The callback of one rank, which is told these at its first two meetings."""
    stats, half = DelayStats(), len(arrivals) // 2
    told = iter([arrivals[:half], arrivals[half:]])
    shown = SimpleNamespace(arrivals=lambda reader: next(told), skipped=rank, accounts=dict)
    stats._strategy = cast(Watched, shown)
    stats.begin(cast(Trainer, SimpleNamespace(world_size=N, is_global_zero=rank == 0)), Lit())
    return stats


def test_of_pushes_to_a_server() -> None:
    arrivals, wanted = on_a_ruler(), reference()
    known = {rank: wanted[rank][: len(mine)] for rank, mine in arrivals.items()}
    assert [len(known[rank]) for rank in range(N)] == (LENGTH // EVERY - 1).tolist()  # the last ones are unanswered
    assert [set(known[rank][1:].tolist()) for rank in range(N)] == [{1}, {3}, {7}, {7}]
    ranks = [rank_of(rank, arrivals[rank]) for rank in range(N)]
    for _ in range(2):
        words = {rank: json.loads(json.dumps(one.say(Stretch()))) for rank, one in enumerate(ranks)}
        figures = [one.conclude(words) for one in ranks]
    assert all(repr(one) == repr(figures[0]) for one in figures)
    by_peer = {f"from{rank}/": mine for rank, mine in known.items()}
    for whose, delays in {**by_peer, "": np.concatenate([*known.values()])}.items():
        assert figures[0][f"{whose}arrived"] == len(delays)
        assert figures[0][f"{whose}mean"] == pytest.approx(delays.mean(), rel=1e-12)
        assert figures[0][f"{whose}max"] == delays.max()
        for q in (50, 95, 99):
            assert figures[0][f"{whose}p{q}"] == np.quantile(delays, q / 100, method="inverted_cdf")
    total = ranks[0].total
    assert total is not None
    for rank in range(N):
        values, counts = np.unique(known[rank], return_counts=True)
        assert total.histogram(rank) == dict(zip(values.tolist(), counts.tolist(), strict=True))


def late(peer: int) -> int:
    """So many steps late is all that comes from this rank."""
    return 3 * peer + 2


class Injected(Alone):
    """At every step something comes from every other rank, and from each of them it is late as said above."""

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        yield from ()
        self._step = step
        others = [peer for peer in range(mail.world) if peer != mail.me]
        return [Arrival(peer, step, step - late(peer), step, 0.5, samples=4) for peer in others]


def _injected(n: int, folder: str) -> tuple[dict[str, float], int]:
    stats = DelayStats(folder=folder)
    t = trainer(n, callbacks=[stats], max_epochs=2)
    t.strategy.algorithm = Injected()  # type: ignore[attr-defined]
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return stats.figures, t.strategy.steps  # type: ignore[attr-defined]


def test_on_real_ranks(tmp_path: Path) -> None:
    ends = run(3, _injected, 3, str(tmp_path))
    figures, steps = ends[0][0], [end[1] for end in ends]
    assert all(end[0] == figures for end in ends)
    story = tell(tmp_path)
    for peer in range(3):
        assert {figures[f"from{peer}/{name}"] for name in ("mean", "max", "p50", "p95", "p99")} == {late(peer)}
        assert figures[f"from{peer}/arrived"] == sum(steps) - steps[peer]
        assert story.delays[peer] == {late(peer): sum(steps) - steps[peer]}
    every = np.repeat([late(peer) for peer in range(3)], [sum(steps) - steps[peer] for peer in range(3)])
    assert figures["mean"] == pytest.approx(every.mean())
    assert figures["p95"] == np.quantile(every, 0.95, method="inverted_cdf")
