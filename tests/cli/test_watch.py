"""The jump that is shown is the first one, not the largest that came of it."""

from __future__ import annotations

import math

import pytest

from lightning_async.arrival import Arrival, Fate
from lightning_async.cli.watch import watch
from lightning_async.strategies.course import Step


def steps(losses: list[float | None], member: int = 0) -> list[Step]:
    return [Step(member, number, [10 * number], loss) for number, loss in enumerate(losses, start=1)]


CALM = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.1]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([*CALM, 50.0, 1.0, 90000.0], "the loss jumps at member 0, step 8 by 122.0 times the range"),
        ([*CALM, math.nan, math.nan], "the loss jumps at member 0, step 8\n"),
        ([-x for x in CALM] + [50.0], "the loss jumps at member 0, step 8 by 127.0 times the range"),
        ([*CALM, 1.3, 1.0], "no loss jumps; the largest rise is at member 0, step 8 by 0.3 times the range"),
        ([1.0] * 5 + [1.1], "the loss jumps at member 0, step 6\n"),
        ([1.0] * 8, "no loss jumps; the largest rise is at member 0, step 4 by 0.0 times"),
        ([3.0, 900.0], "too few losses to compare"),
        ([None] * 9, "too few losses to compare"),
    ],
)
def test_the_first_jump(losses: list[float | None], said: str) -> None:
    assert said in watch(steps(losses), None) + "\n"


def test_a_cause_comes_before_what_came_of_it() -> None:
    mine, theirs = steps([*CALM, 60.0]), steps([*CALM, 9e9], member=1)
    assert "member 0, step 8" in watch([*mine, *theirs], None)
    assert "member 1, step 8" in watch([*theirs, *mine], None)
    assert "member 0, step 8" in watch([*theirs, *mine], 0)


def test_a_sample_that_comes_back_is_named() -> None:
    course = steps([*CALM, 60.0, 9.0, 20.0, *CALM[2:], 50.0, *CALM, 5e4])
    for number in (8, 16, 24):
        course[number - 1].samples = [number, 99]
    assert watch(course, None).endswith("\nin 3 of 3 batches with a loss of this size: 99")
    course[15].samples = [16]
    assert watch(course, None).endswith("\nin 2 of 3 batches with a loss of this size: 99")
    course[23].samples = [24]
    assert "of this size" not in watch(course, None)


def test_the_table() -> None:
    course = steps([*CALM, 60.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    course[7].own, course[7].folds = 0.5, 0.013
    course[7].samples = [3, 99]
    course[7].arrivals = [Arrival(2, 5, 5, 8, 0.1), Arrival(0, 1, 1, 8, 0.1, fate=Fate.REFUSED, factor=0.0)]
    _, head, *rows = watch(course, None).splitlines()
    assert head.split() == ["step", "loss", "own", "folds", "folded", "from", "(delay)", "samples"]
    assert [row.lstrip("> ").split()[0] for row in rows] == [str(n) for n in range(4, 13)]
    assert rows[4] == ">  8     60    5.0e-01  1.3e-02  2 (3), 0 (7, refused)  3 99"
    assert rows[0] == "   4     1.1   0.0e+00  0.0e+00  -                      40"
