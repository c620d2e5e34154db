"""A call holds for all or for nobody: who hears of it too late makes it void, and nobody waits for ever."""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest

from lightning_async.progress.agenda import Agenda, Due, Item
from lightning_async.progress.progress import Progress
from lightning_async.progress.report import Wish
from lightning_async.progress.tally import Unit
from lightning_async.transport.pages import Desk, Pages
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from lightning_async.transport.virtual_carrier import VirtualCarrier


class Deaf(Desk):
    """Hears of appointments and calls only from some moment on, as one whose store is slow."""

    def __init__(self, carrier: VirtualCarrier, until: float) -> None:
        super().__init__(Pages(carrier, 2), 1)
        self._until = until

    def decided(self, key: str) -> bytes | None:
        return super().decided(key) if self.now() >= self._until else None


def in_step(
    cluster: VirtualCluster,
    rank: int,
    agenda: Agenda,
    seconds: float,
    *,
    wish: int | None,
    deaf: float,
    end: int | None,
) -> Generator[float | str, None, tuple[int, Wish, float]]:
    """Take steps together with all until a meeting; wishes to stop from step `wish` on; `end`: has no more batches."""
    carrier = cluster.carriers[rank]
    meetings, steps = Rounds(carrier), Rounds(carrier, channel=1)
    desk = Deaf(carrier, deaf)
    progress = Progress(desk, n=len(cluster.carriers), agenda=agenda, in_step=True)
    progress.settle((yield from meetings.agree(progress.word())))
    while True:
        progress.batch_started()
        yield seconds
        for word in steps.barrier():
            progress.heed()
            yield word
        progress.batch_ended(updates=1, samples=1)
        if wish is not None and progress.own.batches >= wish:
            progress.call(Wish.STOP)
        progress.ended = progress.own.batches == end
        comes = progress.ended or (yield from progress.comes())
        if comes:
            came = cluster.time
            outcome = progress.settle((yield from meetings.agree(progress.word())))
            return progress.own.batches, outcome.wishes, came


def run(
    n: int,
    every: int = 10**6,
    *,
    wish: tuple[int, int] | None = None,
    deaf: dict[int, float] | None = None,
    end: int | None = None,
    seconds: float = 0.05,
) -> dict[int, tuple[int, Wish, float]]:
    cluster = VirtualCluster(n)
    agenda = Agenda([Item(Due.VALIDATE, Unit.BATCHES, every * n)])
    programs = {
        r: in_step(
            cluster,
            r,
            agenda,
            seconds * (1 + r % 2),
            wish=wish[1] if wish and wish[0] == r else None,
            deaf=(deaf or {}).get(r, 0.0),
            end=end if r == 0 else None,
        )
        for r in range(n)
    }
    found: dict[int, tuple[int, Wish, float]] = cluster.run(programs)
    assert len({batches for batches, _, _ in found.values()}) == 1, "all stop after the same step"
    return found


@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_that_wishes_to_stop_stops_all_long_before_the_next_point(n: int) -> None:
    found = run(n, wish=(n - 1, 20))
    for batches, wishes, came in found.values():
        assert wishes == Wish.STOP
        assert batches < 20 + 20
        assert came < 5


@pytest.mark.parametrize("seed", range(20))
def test_a_call_that_is_heard_late_comes_to_nothing_and_is_made_again(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(2, 5)
    deaf = {rank: rng.uniform(0, 8) for rank in rng.sample(range(n), rng.randint(1, n))}
    found = run(n, wish=(rng.randrange(n), rng.randint(1, 40)), deaf=deaf)
    assert all(wishes == Wish.STOP for _, wishes, _ in found.values())
    assert all(came < 8 + 10 for _, _, came in found.values())


def test_a_point_comes_before_a_call() -> None:
    found = run(3, every=22, wish=(1, 20), deaf={2: 3.0})
    assert {batches for batches, _, _ in found.values()} == {22}


def test_one_that_has_no_more_batches_is_not_waited_for_for_ever() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 has no more batches in this epoch \(after 7\) while rank"):
        run(3, end=7)
