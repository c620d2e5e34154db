"""What was trained before counts at the same step of the run, whoever goes on; samples are samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_async.progress.tally import Tally
from lightning_async.strategies.earlier import Earlier


def standing(steps: int = 0, batches: int = 0, in_epoch: int = 0, *, goes_on: bool = False) -> Any:
    """A Trainer whose loops stand there."""
    epoch = SimpleNamespace(ready=1, started=1, processed=0 if goes_on else 1)
    progress = SimpleNamespace(total=SimpleNamespace(ready=batches), current=SimpleNamespace(ready=in_epoch))
    loop = SimpleNamespace(
        restarting=goes_on,
        epoch_progress=SimpleNamespace(current=epoch),
        epoch_loop=SimpleNamespace(batch_progress=progress),
    )
    return SimpleNamespace(global_step=steps, fit_loop=loop)


SAVED = {
    "n": 2,
    "members": 2,
    "agreed": [20, 10, 160],
    "epoch": [8, 4, 64],
    "evened": 4,
    "taken": 6,
    "steps_of": [9, 2],
}


def test_nothing_came_before() -> None:
    earlier = Earlier()
    assert earlier.sums(standing(), 4, 4) == (Tally(), Tally(), 0, 0)
    assert (earlier.waited, earlier.scheduled(3)) == (False, 3)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_checkpoint_stands_at_the_same_step_for_any_members(n: int) -> None:
    earlier = Earlier()
    earlier.load(SAVED)
    before, epoch, evened, taken = earlier.sums(standing(5, 10), n, n)
    assert before == (10 * n, 5 * n, 160)
    assert epoch == (4 * n, 2 * n, 64)
    assert (evened, taken) == (2 * n, 3 * n)
    assert earlier.was_alike(n, [9, 2]) == (n == 2)
    assert not earlier.was_alike(2, [9, 1])


def test_a_checkpoint_of_plain_lightning_is_what_its_loops_say() -> None:
    """Three batches of five are of the epoch that goes on: before it were two."""
    earlier = Earlier()
    assert earlier.sums(standing(5, 5, 3, goes_on=True), 2, 2) == (Tally(10, 10), Tally(4, 10), 0, 10)
    assert earlier.sums(standing(5, 5, 3), 2, 2).epoch == Tally(10, 10)


def test_a_second_fit_goes_on_from_the_first_one_until_a_checkpoint_is_loaded() -> None:
    earlier: Any = Earlier()
    earlier.load(SAVED)
    earlier.close(SimpleNamespace(agreed=Tally(30, 12, 240), n=2, taken=11))
    earlier.close(None)  # a teardown comes twice
    assert earlier.sums(standing(6, 99), 2, 2) == (Tally(30, 12, 240), Tally(30, 12, 240), 0, 11)
    assert earlier.sums(standing(0, 7), 2, 2).before == Tally(14, 0), "another Trainer's"
    earlier.loaded()
    assert earlier.sums(standing(6, 9), 2, 2).before == Tally(18, 12)
