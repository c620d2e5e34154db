"""What is computed of what links measured: which steps count, who is left out, where `ddp` becomes the better one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from benchmarks.__main__ import main
from benchmarks.lazy_links import PRODUCT, _left_out, _row, _whole, crossing, run, setting
from benchmarks.repeat import Turns
from benchmarks.rivals import POST_LOCAL, VARIANTS
from benchmarks.table import Role
from benchmarks.to_target import PERIOD, reached

LONG = setting(quick=False)
NEVER = float("inf")


def test_at_least_three_steps_count_and_whole_periods_of_who_has_them() -> None:
    assert sum(LONG.sizes().values()) > 25e6
    for mbit in LONG.mbits:
        steps = {variant: LONG.steps(variant, mbit) for variant in VARIANTS}
        assert min(steps.values()) >= 3
        assert steps[POST_LOCAL] == steps["lazy_sign, periodic"] == PERIOD


def test_what_would_take_minutes_a_step_has_a_row_with_its_bytes_alone() -> None:
    assert LONG.expected("ddp", 10.0) > 100
    row = _left_out(LONG, "ddp", 10.0, {"ddp": 200.0})
    assert (row.cells["s a step"], row.role) == ("> 122", Role.OTHER)
    assert row.cells[PRODUCT] == f"> {200 * LONG.expected('ddp', 10.0):.0f}"


def test_tensors_that_travel_whole_are_named() -> None:
    sentence = _whole(LONG.sizes())
    assert "14.bias (10)" in sentence
    assert "2048" not in sentence


def turns(of: Mapping[str, tuple[float, float]]) -> Turns:
    """Seconds and megabytes of a step, by variant."""
    return Turns({name: [{"step": step, "bytes": 1e6 * size}] for name, (step, size) in of.items()})


TWO = turns({"none": (0.5, 0.0), "ddp": (8.5, 100.0), "lazy_sign": (1.2, 2.5)})
"""On 100 Mbit/s: 8 s and 0.2 s for the bytes, 0.5 s and 1 s for all else."""


def test_the_crossing_is_where_what_is_saved_in_bytes_is_what_packing_costs() -> None:
    found = crossing(TWO, "lazy_sign", 100.0, {"ddp": 100.0, "lazy_sign": NEVER})
    assert found == "100 Mbit/s, lazy_sign: ddp has the shorter step from about 1560 Mbit/s on"  # 97.5 MB in 0.5 s


def test_the_target_counts_the_steps_too() -> None:
    found = crossing(TWO, "lazy_sign", 100.0, {"ddp": 100.0, "lazy_sign": 200.0})
    assert found.endswith("ddp is sooner at the target from about 507 Mbit/s on")  # 76,000 Mbit in 150 s
    assert "at no rate" in crossing(TWO, "lazy_sign", 100.0, {"ddp": 200.0, "lazy_sign": 50.0})


def test_a_product_says_that_it_is_one() -> None:
    cells = _row(TWO, "lazy_sign", 100.0, {"lazy_sign": 250.0}).cells
    assert "product" in PRODUCT
    assert (cells["steps to target"], cells[PRODUCT]) == (250, pytest.approx(300.0))
    assert cells["step / bound"] == pytest.approx(1.2 / 0.5)
    assert _row(TWO, "ddp", 100.0, {"ddp": NEVER}).cells[PRODUCT] == "never"


def test_the_bound_has_the_way_there_and_back() -> None:
    assert _row(TWO, "ddp", 100.0, {"ddp": 1.0}).cells["step / bound"] == pytest.approx(8.5 / 8.01)
    assert _row(TWO, "none", 1.0, {"none": 1.0}).cells["step / bound"] == 1.0
    assert _row(TWO, "ddp", 1000.0, {"ddp": 1.0}).cells["step / bound"] == pytest.approx(8.5 / 0.8)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [([2.0, 1.0, 0.2], PERIOD * 1.875), ([0.2], 0.0), ([2.0, 1.0], NEVER), ([2.0, 0.3, 0.5], PERIOD * 1.0)],
)
def test_reached(losses: list[float], steps: float) -> None:
    assert reached(losses, 0.3) == pytest.approx(steps)


@pytest.mark.netns
def test_no_link_of_nothing() -> None:
    with pytest.raises(ValueError, match="above 0 Mbit/s"):
        run(quick=True, link=0.0)


def test_a_benchmark_without_links_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["many", "--link", "10"]) == 2
    assert "takes no --link" in capsys.readouterr().err
