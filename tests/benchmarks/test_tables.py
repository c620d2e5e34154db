"""What tables must have, in small: each task asked for, NumPy beside the loops, the busiest rank beside the mean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import delays, many, signs
from benchmarks.tasks import characters


@pytest.mark.parametrize("seeds", [1, 4, 10])
def test_delays_have_both_optimizers_however_few_the_seeds(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delays, "digits", lambda: replace(characters(64), name="digits"))  # needs no scikit-learn
    assert [(task.name, len(chosen)) for task, chosen in delays._tasks(False, seeds)] == [
        ("digits", seeds),
        ("characters", max(1, seeds // 5)),
    ]


def test_delays_without_seeds() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        delays._tasks(False, 0)


def test_signs_have_numpy_beside_the_loops() -> None:
    pytest.importorskip("numba")
    for threads in (1, 2):
        measured = signs._turns(100_000, threads, quick=True).measures
        assert {"pack", "add", "pack, NumPy", "add, NumPy"} < set(measured)


def test_numpys_rows_are_numpys() -> None:
    bench = signs.Bench(100_000, 1)
    packed = {}
    for name, press in (("plain", bench.plain), ("quickest", bench.quickest)):
        bench.press = press
        bench.rest.zero_()
        bench.pack()
        packed[name] = bench.sheets[0].bits(0).copy()
    assert {type(own) for own, _ in bench.plain._benches} == {signs.NumpySigns}
    assert (packed["plain"] == packed["quickest"]).all()


def test_the_busiest_rank_sends_no_less_than_the_mean_and_more_where_it_has_a_shard_for_others() -> None:
    four, sixteen = many._measure(4, many.SPEED), many._measure(16, many.SPEED)
    for found in (four, sixteen):
        assert many._number(found[many.BUSIEST]) >= many._number(found[many.SENT])
    assert many._number(sixteen[many.BUSIEST]) > many._number(four[many.BUSIEST])
