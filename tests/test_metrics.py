"""The figures of merged ranks are those of all arrivals in one list; NumPy is the independent witness."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lightning_async.arrival import Arrival, Fate
from lightning_async.metrics import (
    DELAY_BINS,
    EXACT,
    DelayMetric,
    delay_bins,
    delay_of,
    merged,
    pack,
)

WORLD = 5


def arrivals(seed: int, count: int, most: int = 200) -> list[Arrival]:
    draw = np.random.default_rng(seed)
    fates = list(Fate)
    return [
        Arrival(
            peer=int(draw.integers(WORLD - 1)),  # the last rank never sends
            base=0,
            launched=10,
            folded=10 + int(most * draw.random() ** 3),
            seconds=float(draw.lognormal(-3, 2)),
            factor=float(draw.choice([1.0, draw.random()])),
            fate=fates[int(draw.choice(4, p=[0.7, 0.1, 0.15, 0.05]))],
        )
        for _ in range(count)
    ]


def of(*lists: list[Arrival]) -> DelayMetric:
    """One metric a rank, through JSON, merged."""
    packed = []
    for mine in lists:
        metric = DelayMetric(WORLD, sync_on_compute=False)
        for begin in range(0, len(mine), 37):
            metric.update(mine[begin : begin + 37])
        packed.append(json.loads(json.dumps(pack(metric))))
    return merged(packed, WORLD)


def reference(found: list[Arrival]) -> dict[str, float]:
    used = [a for a in found if a.fate in (Fate.FOLDED, Fate.SHRUNK)]
    delays, ages = np.array([a.folded - a.launched for a in used]), np.array([a.seconds for a in used])
    factors = np.array([a.factor for a in used])
    figures = {fate.value: float(sum(a.fate is fate for a in found)) for fate in Fate}
    figures["arrived"] = float(sum(a.fate is not Fate.LOST for a in found))
    figures |= {"mean": delays.mean(), "max": delays.max(), "age_mean": ages.mean(), "age_max": ages.max()}
    figures |= {"factor_mean": factors.mean(), "factor_min": factors.min()}
    for q in (50, 95, 99):
        figures[f"p{q}"] = np.quantile(delays, q / 100, method="inverted_cdf")
        figures[f"age_p{q}"] = np.quantile(ages, q / 100, method="inverted_cdf")
    return figures


@pytest.mark.parametrize("seed", range(3))
def test_merged_figures_are_those_of_one_list(seed: int) -> None:
    lists = [arrivals(10 * seed + rank, count) for rank, count in enumerate((1, 700, 90, 333, 5))]
    everything = [a for mine in lists for a in mine]
    metric = of(*lists)
    for peer in (None, 0, 1, 2, 3):
        wanted = reference([a for a in everything if peer is None or a.peer == peer])
        found = metric.figures(peer)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            rough = 0.04 if name.startswith("age_p") else 1e-12  # ages have bins
            assert found[name] == pytest.approx(value, rel=rough), (peer, name)
    assert metric.figures(4)["arrived"] == 0
    assert np.isnan(metric.figures(4)["p95"])


@pytest.mark.parametrize("delay", [0, 1, 7, 40, 255])
def test_a_known_delay_comes_out_as_exactly_that(delay: int) -> None:
    """Each peer has one of its own."""
    lists = [[Arrival(peer, 0, 5, 5 + delay + peer, 0.1) for _ in range(20)] for peer in range(WORLD - 1)]
    metric = of(*lists)
    for peer in range(WORLD - 1):
        figures = metric.figures(peer)
        exact = min(delay + peer, 10**9)
        assert {figures[name] for name in ("mean", "max")} == {exact}
        if exact < EXACT:
            assert {figures[name] for name in ("p50", "p95", "p99")} == {exact}
            assert metric.histogram(peer) == {exact: 20}


def test_large_delays_are_good_to_3_percent() -> None:
    delays = torch.tensor([256, 257, 300, 1000, 4095, 4096, 10**6, 2**24 - 1, 2**30])
    bins = delay_bins(delays)
    assert int(bins.max()) == DELAY_BINS - 1
    for delay, at in zip(delays.tolist()[:-1], bins.tolist(), strict=False):
        assert delay_of(at) <= delay < delay_of(at) * 1.04
    edges = [delay_of(at) for at in range(DELAY_BINS)]
    assert edges == sorted(set(edges))
    assert delay_bins(torch.tensor(edges)).tolist() == list(range(DELAY_BINS))


def test_its_reductions_are_declared() -> None:
    metric = DelayMetric(2, sync_on_compute=False)
    assert set(metric._reductions) == {"delays", "ages", "fates", "sums", "most", "least"}
    assert all(metric._reductions.values())
    metric.update([Arrival(1, 0, 0, 3, 0.5)])
    assert metric.compute()["mean"] == 3
    metric.reset()
    assert metric.figures()["arrived"] == 0


def test_wrong_world() -> None:
    with pytest.raises(ValueError, match="`world` must be at least 1, got 0"):
        DelayMetric(0)
