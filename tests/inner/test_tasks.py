"""The law of a list schedule: it keeps the order, uses each thread once at a time, and stays below Graham's bound."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from lightning_async.inner.tasks import Tasks


def some(seed: int) -> tuple[Tasks, int]:
    rng = random.Random(seed)
    n = rng.randint(1, 60)
    needs = [rng.sample(range(task), min(task, rng.choice([0, 0, 1, 1, 2, 3]))) for task in range(n)]
    return Tasks([rng.choice([0.1, 1.0, rng.uniform(0, 5)]) for _ in range(n)], needs), rng.randint(1, 8)


def test_schedules_keep_the_order_and_stay_below_grahams_bound() -> None:
    for seed in range(300):
        tasks, threads = some(seed)
        slots = tasks.schedule(threads)
        for task, before in enumerate(tasks.needs):
            assert all(slots[other].end <= slots[task].start for other in before), f"seed {seed}"
            assert slots[task].end == slots[task].start + tasks.costs[task]
        for thread in range(threads):
            mine = sorted(slot for slot in slots if slot.thread == thread)
            assert all(a.end <= b.start for a, b in pairwise(mine)), f"seed {seed}"
        makespan = max(slot.end for slot in slots)
        assert makespan <= tasks.bound(threads) * (1 + 1e-9), f"seed {seed}"
        assert makespan >= max(tasks.critical_path(), sum(tasks.costs) / threads) * (1 - 1e-9), f"seed {seed}"


def test_one_thread_does_all_and_enough_threads_take_the_critical_path() -> None:
    for seed in range(50):
        tasks, _ = some(seed)
        assert max(slot.end for slot in tasks.schedule(1)) == pytest.approx(sum(tasks.costs))
        assert max(slot.end for slot in tasks.schedule(len(tasks))) == pytest.approx(tasks.critical_path())


def test_the_task_farthest_from_the_end_goes_first() -> None:
    tasks = Tasks([1.0, 1.0, 5.0], [(), (), (1,)])
    assert tasks.upward() == [1.0, 6.0, 5.0]
    assert [slot.start for slot in tasks.schedule(1)] == [6.0, 0.0, 1.0]


def test_tasks_come_after_those_they_need() -> None:
    with pytest.raises(ValueError, match=r"a task needs tasks of smaller numbers only, and 0 needs \[1\]"):
        Tasks([1.0, 1.0], [(1,), ()])


def test_no_tasks_take_no_time() -> None:
    assert Tasks([], []).schedule(2) == []
    assert Tasks([], []).critical_path() == 0.0
