"""Traffic against independent counts: a table that NumPy adds up, and slots of which every second is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_async import GossipRingStrategy, LazySignStrategy, TrafficStats
from lightning_async.algorithms.pairwise import ASK
from lightning_async.algorithms.push_sum import SHARE
from lightning_async.callbacks.watched import Watched
from lightning_async.progress.stretch import Stretch
from lightning_async.transport.mail import KIND_NAMES, Message
from lightning_async.transport.slots import Here, Inbox, Slots
from lightning_async.transport.traffic import Count
from lightning_async.transport.virtual_carrier import VirtualCarrier
from tests.algorithms import one_hot
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

N = 3
KINDS = {**KIND_NAMES, 16: "ask", 17: "answer", 18: "answer"}  # two kinds of one name are one
WHAT = ("messages_out", "bytes_out", "messages_in", "bytes_in", "numbers_out", "seconds_out")


class Clock(Here):
    """A clock that is told the time."""

    time = 0.0

    def now(self) -> float:
        return self.time


class Rank:
    """A callback, and the strategy that it reads."""

    def __init__(self) -> None:
        self.table: dict[int, dict[int, Count]] = {}
        self.strategy = SimpleNamespace(traffic=lambda: self.table, kinds=KINDS, skipped=0)
        self.stats = TrafficStats()
        self.stats._strategy = cast(Watched, self.strategy)
        self.stats.begin(cast(Trainer, SimpleNamespace(world_size=N)), Lit())

    def say(self, stretch: Stretch) -> Any:
        return json.loads(json.dumps(self.stats.say(stretch)))


def heard(ranks: list[Rank], stretches: list[Stretch]) -> dict[str, float]:
    """The figures, the same on all ranks."""
    words = {rank: one.say(stretch) for rank, (one, stretch) in enumerate(zip(ranks, stretches, strict=True))}
    figures = [one.stats.conclude(words) for one in ranks]
    assert all(one == figures[0] for one in figures)
    return figures[0]


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_merged_ranks_are_numpys(seed: int) -> None:
    draw, kinds = np.random.default_rng(seed), [0, 2, 16, 17, 18]
    ranks, grown = [Rank() for _ in range(N)], np.zeros((N, N, len(kinds), 5), dtype=np.int64)
    for meeting in range(3):
        grown += draw.integers(0, 1000, grown.shape) * (1 - np.eye(N, dtype=np.int64))[:, :, None, None]
        for rank, one in enumerate(ranks):
            one.strategy.skipped = int(draw.integers(9)) + 10 * meeting
            for peer in set(range(N)) - {rank}:
                rows = (Count(*grown[rank, peer, at].tolist()) for at in range(len(kinds)))
                one.table[peer] = dict(zip(kinds, rows, strict=True))
        found = heard(ranks, [Stretch(seconds=1.0)] * N)
    messages, out, _, came, numbers = np.moveaxis(grown, -1, 0)
    assert found["messages_sent"] == messages.sum()
    assert found["bytes_sent"] == out.sum()
    assert found["bytes_received"] == came.sum()
    for name, at in {"headers": [0], "rounds": [1], "ask": [2], "answer": [3, 4]}.items():
        assert found[f"kind/{name}/bytes_sent"] == out[:, :, at].sum()
        assert found[f"kind/{name}/messages_sent"] == messages[:, :, at].sum()
        assert found[f"kind/{name}/bytes_received"] == came[:, :, at].sum()
    for rank, peer in [(a, b) for a in range(N) for b in range(N) if a != b]:
        assert found[f"rank{rank}/to{peer}/bytes_sent"] == out[rank, peer].sum()
        assert found[f"rank{rank}/to{peer}/bytes_received"] == came[rank, peer].sum()
    assert found["compression"] == pytest.approx(4 * numbers[:, :, 2:].sum() / out[:, :, 2:].sum())
    assert found["skipped"] == sum(one.strategy.skipped for one in ranks)


TICKS = 400


def busy(slots: Slots, numbers: Iterator[int], clock: Clock, begin: int, draw: np.random.Generator) -> Any:
    """Post and fold at random, one thing a second, from `begin` on; in which seconds each kind was under way."""
    under_way, held = np.zeros((3, TICKS), dtype=bool), dict[int, int]()
    for tick in range(TICKS):
        clock.time, kind = float(begin + tick), int(draw.integers(3))
        if kind in held:
            slots.released((held.pop(kind),))
        elif draw.random() < 0.3:
            assert slots.post(Message(16 + kind, torch.zeros(5)))
            held[kind] = next(numbers)
        under_way[list(held), tick] = True
    clock.time = float(begin + TICKS)  # a meeting: nothing is in flight
    slots.released(tuple(held.values()))
    return under_way


@pytest.mark.parametrize("seed", range(3))
def test_occupancy_and_what_is_hidden_are_those_of_every_second(seed: int) -> None:
    """A second is occupied if anything was under way in it, however many kinds; hidden, if its rank trained on."""
    draw = np.random.default_rng(seed)
    ranks, clocks = [Rank() for _ in range(N)], [Clock() for _ in range(N)]
    links = {
        (rank, peer): (Slots(peer, inbox=Inbox(here=clocks[rank]), here=clocks[rank], max_bytes=1000), count(1))
        for rank in range(N)
        for peer in range(N)
        if peer != rank
    }
    for (rank, peer), (slots, _) in links.items():
        ranks[rank].table[peer] = slots.traffic
    hidden = total = 0.0
    for meeting in range(2):
        noticed = draw.uniform(0, 1, N)
        occupied = np.zeros((N, N))
        for (rank, peer), (slots, numbers) in links.items():
            occupied[rank, peer] = busy(slots, numbers, clocks[rank], 1000 * meeting, draw).any(0).sum()
        stretches = [Stretch(seconds=TICKS, exchange=part * TICKS / 4, waited=part * TICKS * 3 / 4) for part in noticed]
        found = heard(ranks, stretches)
        hidden += float((occupied.sum(1) * (1 - noticed)).sum())
        total += float(occupied.sum())
        assert found["occupancy"] == pytest.approx(occupied.max() / TICKS)
        assert found["hidden_seconds"] == pytest.approx(hidden, abs=1e-4)
        assert found["hidden_share"] == pytest.approx(hidden / total, abs=1e-6)


@pytest.mark.parametrize(("mode", "kind"), [("pairwise", ASK), ("push_sum", SHARE)])
def test_what_was_due_was_sent_or_skipped(mode: str, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow network, where the exchange before is often still under way."""
    sent, post = np.zeros(N, dtype=int), VirtualCarrier.post

    def counted(carrier: VirtualCarrier, peer: int, message: Message) -> bool:
        went = post(carrier, peer, message)
        sent[carrier.me] += went and message.kind == kind
        return went

    monkeypatch.setattr(VirtualCarrier, "post", counted)
    outcome = one_hot.run([1.0, 1.0, 3.0], mode=mode, period=2, cluster={"latency": 0.07}, meets=False)
    due = np.array([steps // 2 for steps in outcome.steps])
    skipped = np.array([algorithm.skipped for algorithm in outcome.algorithms])
    assert (skipped == due - sent).all()
    assert skipped.min() > 0


def _compressed(method: str) -> tuple[dict[str, float], dict[int, Any]]:
    words: dict[int, Any] = {}

    class Hears(TrafficStats):
        def hear(self, heard: Any) -> None:
            words.update(heard)
            super().hear(heard)

    stats = Hears()
    strategy = LazySignStrategy() if method == "lazy_sign" else GossipRingStrategy(wire=method)  # type: ignore[arg-type]
    t = trainer(2, strategy=strategy, callbacks=[stats], max_epochs=1)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return stats.figures, words


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["fp32", "bf16", "lazy_sign"])
def test_compression_is_what_numbers_would_take_over_what_they_took(method: str) -> None:
    found, words = run(2, _compressed, method)[0]
    rows = [
        (row["numbers_out"], row["bytes_out"])
        for word in words.values()
        for kinds in word["links"].values()
        for kind, row in kinds.items()
        if kind not in ("headers", "rounds", "marker", "cut")
    ]
    numbers, taken = np.array(rows).sum(0)
    assert found["compression"] == pytest.approx(4 * numbers / taken)
    if method == "lazy_sign":
        assert 4 < found["compression"] <= 32
    else:
        assert found["compression"] == {"fp32": 1, "bf16": 2}[method]
