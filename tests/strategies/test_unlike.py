"""A batch weighs as many samples as it has; with equal batches each weighs one, and a step is one of each member."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.strategies.unlike import Sizes


def told(mine: int, said: Mapping[int, str]) -> Sizes:
    """Sizes of a member that heard this."""
    sizes = Sizes()
    sizes._batch = mine

    class Rounds:
        def agree(self, word: bytes, *, what: str) -> Any:
            yield from ()
            assert word.decode() in said.values()
            return {rank: other.encode() for rank, other in said.items()}

    length = next((int(word.split()[1]) for word in said.values() if word.startswith(f"{mine} ")), None)
    rounds: Any = Rounds()
    for _ in sizes.tell_sizes(rounds, length, speaks=True):
        pass
    return sizes


def test_all_weights_times_the_grain_are_the_samples() -> None:
    sizes = told(4, {0: "8", 1: "8", 2: "4", 3: ""})  # rank 3 has a speaker
    assert [sizes.weight_of(rank) for rank in range(3)] == [2, 2, 1]
    assert (sizes.weight, sizes.mass) == (1, 4 * UNIT)
    assert sizes.usual == pytest.approx(20 / 3)
    assert sizes.step_of(3) == 5


def test_of_equal_batches_each_weighs_one() -> None:
    sizes = told(6, {0: "6", 1: "6"})
    assert (sizes.weight, sizes.weight_of(1), sizes.step_of(2), sizes.usual) == (1, 1, 2, 6.0)
    assert sizes.length_of_all(1.0, 1) is None


@pytest.mark.parametrize(
    ("limit", "accumulated", "batches"),
    [(1.0, 1, 7), (1.0, 4, 8), (3, 1, 3), (7, 1, 7), (9, 1, 7)],
)
def test_the_run_has_the_streams_of_all(limit: float, accumulated: int, batches: int) -> None:
    """Of 10 and 4 batches: together 14, 7 steps of both; by fours 3 + 1 steps, of which the last ones are shorter."""
    assert told(8, {0: "8 10", 1: "8 4"}).length_of_all(limit, accumulated) == batches


def test_where_one_has_no_length_there_is_none() -> None:
    assert told(8, {0: "8 10", 1: "8"}).length_of_all(1.0, 1) is None
    assert told(8, {0: "8 10", 1: "8 10"}).length_of_all(1.0, 1) is None


def test_what_was_said_is_forgotten_with_the_run() -> None:
    sizes = told(4, {0: "8", 1: "4"})
    sizes.forget()
    assert (sizes.weight, sizes.usual, sizes.weight_of(0)) == (1, 4.0, 1)
