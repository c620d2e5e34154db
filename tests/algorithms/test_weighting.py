"""Gamma: sums to 1 over the members at one instant, and a healthy run of any size is never shrunk."""

from __future__ import annotations

import itertools
import math

import pytest

from lightning_async.algorithms.weighting import (
    FREE_ROUNDS,
    Attenuation,
    excess_rounds,
    excess_versions,
    law,
    normalised,
    paper,
)

LAWS: list[Attenuation] = ["poly", "exp", "hinge", "none"]


@pytest.mark.parametrize("bases", [[5, 5, 5, 5], [0, 3, 50, 100], [100, 99, 1, 0]])
def test_the_papers_gammas_of_all_members_sum_to_1_and_grow_with_the_version(bases: list[int]) -> None:
    gammas = {k: paper(k, 100, bases, len(bases)) for k in bases}
    assert sum(gammas[k] for k in bases) == pytest.approx(1.0)
    values = [gammas[k] for k in sorted(gammas)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert paper(7, 7, [7, 7, 7], 3) == pytest.approx(1 / 3)
    assert paper(0, 0, [0, 0, 0, 0], 4) == 0.25


@pytest.mark.parametrize(("lag", "gamma"), [(0, 0.252), (5, 0.243), (20, 0.216), (99, 0.111)])
def test_the_papers_figures(lag: int, gamma: float) -> None:
    """Computed by hand: four members at version 100, one of them late, the others one version behind."""
    assert paper(100 - lag, 100, [100 - lag, 99, 99, 99], 4) == pytest.approx(gamma, abs=0.002)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64, 256])
@pytest.mark.parametrize("name", LAWS)
def test_n_equal_members_move_the_server_as_far_as_one_synchronous_step(name: Attenuation, n: int) -> None:
    last: dict[int, float] = {}
    total = 0.0
    for arrival in range(5 * n):
        delay = min(arrival, n - 1)
        last[arrival % n] = 8.0 * law(name)(excess_rounds(delay, n))
        total += normalised(last[arrival % n], last.values(), n)
    assert total == pytest.approx(5.0)


@pytest.mark.parametrize("n", [1, 2, 4, 256])
def test_an_order_that_changes_from_round_to_round_is_nobodys_fault(n: int) -> None:
    """First in one round, last in the next: all others are served twice in between."""
    assert excess_versions(2 * (n - 1), n) == 0
    assert excess_versions(2 * (n - 1) + 3, n) == 3
    assert excess_rounds(2 * (n - 1) + n, n) == 1.0


@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_1_in_time_and_never_rises(name: Attenuation) -> None:
    values = [law(name)(x / 4) for x in range(100)]
    assert values[0] == 1.0
    assert all(0 < b <= a <= 1 for a, b in itertools.pairwise(values))


def test_the_laws_are_those_of_the_literature() -> None:
    assert law("poly", 0.5)(3.0) == pytest.approx(0.5)
    assert law("exp", 0.7)(2.0) == pytest.approx(math.exp(-1.4))
    assert law("hinge", 10.0)(FREE_ROUNDS) == 1.0
    assert law("hinge", 10.0)(FREE_ROUNDS + 2) == pytest.approx(1 / 21)
    assert law("none")(100.0) == 1.0


def test_one_member_alone_counts_fully_to_the_bit() -> None:
    for weight in (3, 0.1, 7 * 2**32):
        assert normalised(weight, [weight], 1) == 1.0
