"""Tasks on real threads: each once, none before those it needs, errors come back, and nothing runs after `close`."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random
import threading
from collections.abc import Iterator

import pytest
import torch

from lightning_async.inner.tasks import Tasks
from lightning_async.inner.threads import Threads


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(3)
    yield made
    made.close()


def test_each_task_once_and_none_before_those_it_needs(threads: Threads) -> None:
    for seed in range(50):
        rng, done = random.Random(seed), list[int]()
        needs = [rng.sample(range(task), min(task, rng.randint(0, 3))) for task in range(30)]
        tasks = Tasks([rng.random() for _ in range(30)], needs)
        threads.run([lambda task=task, done=done: done.append(task) for task in range(30)], tasks)  # type: ignore[misc]
        assert sorted(done) == list(range(30))
        assert all(done.index(other) < done.index(task) for task, before in enumerate(needs) for other in before)


def test_tasks_run_at_the_same_time(threads: Threads) -> None:
    together = threading.Barrier(3)
    threads.run([lambda: together.wait(10.0) and None] * 3)


def test_the_first_error_comes_back_and_the_rest_is_dropped(threads: Threads) -> None:
    done = []

    def fails() -> None:
        raise ZeroDivisionError("in a task")

    with pytest.raises(ZeroDivisionError, match="in a task"):
        threads.run([fails, lambda: done.append(1)], Tasks([1.0, 1.0], [(), (0,)]))
    assert not done
    threads.run([lambda: done.append(2)])
    assert done == [2]


def test_a_task_may_run_tasks(threads: Threads) -> None:
    done = []
    threads.run([lambda: threads.run([lambda: done.append(1)] * 4)] * 4)
    assert len(done) == 16


def test_gradients_are_recorded_as_in_the_caller(threads: Threads) -> None:
    seen = []
    with torch.no_grad():
        threads.run([lambda: seen.append(torch.is_grad_enabled())])
    threads.run([lambda: seen.append(torch.is_grad_enabled())])
    assert seen == [False, True]


def test_torch_keeps_its_own_threads_and_a_task_has_one() -> None:
    before, seen = torch.get_num_threads(), []
    threads = Threads(2)
    threads.run([lambda: seen.append(torch.get_num_threads())] * 4)
    assert seen == [1] * 4
    assert torch.get_num_threads() == before
    threads.close()
    threads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inner")]


def test_closed_threads_begin_again(threads: Threads) -> None:
    done = []
    for _ in range(2):
        threads.run([lambda: done.append(1)])
        threads.close()
    assert done == [1, 1]


def _in_a_fork(threads: Threads, pipe: object) -> None:
    done = []
    threads.run([lambda: done.append(1)])
    threads.close()
    pipe.send(done)  # type: ignore[attr-defined]


def test_a_forked_process_has_threads_of_its_own(threads: Threads) -> None:
    threads.run([lambda: None])
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_in_a_fork, args=(threads, theirs))
    process.start()
    assert mine.poll(30.0)
    assert mine.recv() == [1]
    process.join(30.0)
    assert process.exitcode == 0


def test_copies_share_the_threads_and_pickles_their_number(threads: Threads) -> None:
    assert copy.deepcopy({"threads": threads})["threads"] is threads
    assert pickle.loads(pickle.dumps(threads)).count == 3


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_count_is_checked(count: object) -> None:
    with pytest.raises(ValueError, match="`inner_threads` must be an integer of at least 1"):
        Threads(count)  # type: ignore[arg-type]
