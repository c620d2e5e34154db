"""The figures of two nodes: what is summed, what is divided by what, and what a claim needs."""

from __future__ import annotations

import pytest

from benchmarks.repeat import Turns
from benchmarks.two_layers import ALONE, Variant, claims, figures, variants, work
from benchmarks.work import Record


def record(rate: float, seconds: float, *, exchanged: int = 0, folds: int = 0) -> Record:
    marks = [k / rate for k in range(1, round(rate * seconds) + 1)]
    remote = [(0.0, 0)] * folds
    return Record(start=0.0, end=seconds, marks=marks, epochs=[len(marks)], exchanged=exchanged, remote=remote)


def test_own_rates_are_summed_and_an_exchange_is_bytes_over_folds() -> None:
    job = work(10.0)
    fast, slow = record(50.0, 10.0, exchanged=3000, folds=2), record(12.5, 10.0, exchanged=1000, folds=2)
    found = figures(Variant({}, job), [fast, record(50.0, 10.0), slow, record(12.5, 10.0)], 8000)
    assert found["own rates"] == pytest.approx(job.batch * 125.0)
    assert found["samples/s"] == pytest.approx(job.batch * 125.0)
    assert (found["folds"], found["exchange"], found["wire"]) == (4, 1000, 2000)
    assert found["step"] == pytest.approx(8000 / 312.5)


def test_each_member_has_as_long_to_train_with_and_without_inner() -> None:
    mine = variants("gossip_ring", work(10.0))
    inside, alone = mine["gossip_ring"], mine[ALONE]
    rates = [sum(v.work.rate(rank) for rank in range(2 * v.each)) for v in (inside, alone)]
    assert inside.work.batches / rates[0] == pytest.approx(alone.work.batches / rates[1])
    assert (inside.knobs, alone.knobs) == ({"inner": "node"}, {})


@pytest.mark.parametrize(("share", "ratio", "met"), [(0.95, 1.0, True), (0.94, 1.0, False), (0.95, 1.01, False)])
def test_claims(share: float, ratio: float, met: bool) -> None:
    mine = {"samples/s": 100 * share, "exchange": 1000 * ratio, "wire": 1.0}
    measures = {"gossip_ring": [mine], "none": [{"own rates": 100.0}], ALONE: [{"exchange": 1000.0, "wire": 1.0}]}
    assert all(claim.met for claim in claims(Turns(measures), "gossip_ring")) == met
