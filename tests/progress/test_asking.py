"""Who asks for a meeting gets one within a moment, however far off the next appointment is, and no count goes wrong."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

from lightning_async.progress.agenda import Agenda, Due, Item
from lightning_async.progress.progress import Outcome, Progress
from lightning_async.progress.report import Wish
from lightning_async.progress.tally import Unit
from lightning_async.transport.pages import Desk, Pages
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from lightning_async.transport.virtual_carrier import VirtualCarrier

FAR = 10**6


class Deaf(Desk):
    """Hears nothing of the board for some time, as one whose store is slow."""

    def __init__(self, carrier: VirtualCarrier, cluster: VirtualCluster, window: tuple[float, float]) -> None:
        super().__init__(Pages(carrier, 2), 1)
        self._cluster, self._window = cluster, window

    def decided(self, key: str) -> bytes | None:
        first, last = self._window
        return None if first <= self._cluster.time < last else super().decided(key)


@dataclass
class World:
    """Members, what is due, and what happens to them.

    Attributes:
        seconds: Of a batch, for each member.
        every: Batches of all between two points.
        epoch: Batches of all after which an epoch ends.
        wishes: From when on a member wishes to stop.
        dry: After how many batches a member has no more.
        deaf: Between which times a member hears nothing of the board.
        dies: When a member dies.
    """

    seconds: list[float]
    every: int = FAR
    epoch: int | None = None
    wishes: dict[int, float] = field(default_factory=dict)
    dry: dict[int, int] = field(default_factory=dict)
    deaf: dict[int, tuple[float, float]] = field(default_factory=dict)
    dies: dict[int, float] = field(default_factory=dict)

    @property
    def agenda(self) -> Agenda:
        ends = [Item(Due.END_EPOCH, Unit.BATCHES, self.epoch, in_epoch=True)] if self.epoch else []
        return Agenda([Item(Due.VALIDATE, Unit.BATCHES, self.every), *ends])

    def run(self) -> dict[int, Met]:
        """All meetings of those that live, up to the one at which a wish is said."""
        cluster = VirtualCluster(len(self.seconds))
        for rank, at in self.dies.items():
            cluster.kill(rank, at=at)
        found: dict[int, Met] = cluster.run({rank: member(cluster, rank, self) for rank in range(len(self.seconds))})
        return found


Met = list[tuple[float, Outcome, int]]
"""When a member came to each meeting, the outcome, and how many batches it had done."""


def member(cluster: VirtualCluster, rank: int, world: World) -> Generator[float | str, None, Met]:
    """Train until all stop; an ear for the wish after each batch, and all the time that it waits at a meeting."""
    carrier = cluster.carriers[rank]
    rounds, desk = Rounds(carrier), Deaf(carrier, cluster, world.deaf.get(rank, (0.0, 0.0)))
    progress = Progress(desk, n=carrier.world, agenda=world.agenda)
    wishes_from = world.wishes.get(rank, float("inf"))

    def listen() -> None:
        if cluster.time >= wishes_from:
            progress.call(Wish.STOP)

    met: Met = []
    progress.settle((yield from rounds.agree(progress.word())))
    while True:
        if not progress.ended:
            progress.batch_started()
            last = progress.is_last() or progress.own.batches + 1 == world.dry.get(rank)
            yield world.seconds[rank]
            progress.batch_ended(updates=1, samples=1)
            progress.ended = last
        listen()
        if progress.ended or (yield from progress.comes()):
            came, waiting = cluster.time, rounds.agree(progress.word())
            try:
                while True:
                    word = next(waiting)
                    listen()
                    yield word
            except StopIteration as end:
                outcome = progress.settle(end.value)
            met.append((came, outcome, progress.own.batches))
            if outcome.wishes & Wish.STOP:
                return met


def agreed(found: dict[int, Met]) -> list[Outcome]:
    lists = [[outcome for _, outcome, _ in met] for met in found.values()]
    assert all(outcomes == lists[0] for outcomes in lists), "all draw the same conclusion"
    return lists[0]


def last_came(found: dict[int, Met]) -> float:
    return max(met[-1][0] for met in found.values())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("seconds", [0.3, 10.0, 200.0])
def test_who_asks_in_the_first_stretch_does_not_wait_for_a_point_that_was_appointed_in_the_dark(
    seconds: float, rank: int
) -> None:
    found = World([seconds] * 3, every=3 * 30, wishes={rank: 2.5 * seconds}).run()
    (outcome,) = agreed(found)
    assert outcome.wishes == Wish.STOP
    assert not outcome.due, "the point is still ahead"
    assert last_came(found) <= 4 * seconds + 0.5


@pytest.mark.parametrize("slow", [0, 1])
def test_who_asks_before_any_speed_is_known_waits_for_one_batch_of_the_slowest(slow: int) -> None:
    """What one has not told yet cannot be foreseen: it was taken for as fast as it could be."""
    seconds = [0.01, 0.01]
    seconds[slow] = 20.0
    found = World(seconds, wishes={1 - slow: 0.3}).run()
    agreed(found)
    assert last_came(found) <= 20.0 + 0.5


def test_who_waits_at_a_meeting_is_heard_at_the_next() -> None:
    """Rank 0 is dry, and its word for the others' next meeting is given: it calls one, and says its wish at another."""
    found = World([0.05, 0.05], wishes={0: 5.0}, dry={0: 4}).run()
    assert [outcome.wishes for outcome in agreed(found)] == [Wish.NOTHING, Wish.STOP]
    assert last_came(found) < 5.0 + 2 * 0.6


def test_an_appointment_that_is_near_is_not_called_off() -> None:
    found = World([0.05, 0.05], every=200, wishes={1: 4.5}).run()
    (outcome,) = agreed(found)
    assert (outcome.now.batches, outcome.due, outcome.wishes) == (200, Due.VALIDATE, Wish.STOP)


def anything(seed: int) -> World:
    """Members of any speeds; points near and far; wishes, the deaf, the dead and the dry at any time."""
    rng = random.Random(seed)
    n = rng.randint(2, 5)
    seconds = [rng.choice([0.02, 0.2, 1.0, 5.0]) for _ in range(n)]
    wishing = rng.sample(range(n), rng.randint(1, 2))
    world = World(seconds, every=n * rng.choice([3, 11, 30, 100]))
    world.wishes = {rank: rng.uniform(0.0, rng.choice([1.0, 40.0])) for rank in wishing}
    others = [rank for rank in range(n) if rank not in wishing]
    if rng.random() < 0.5:
        rank, begin = rng.randrange(n), rng.uniform(0.0, 40.0)
        world.deaf[rank] = begin, begin + rng.uniform(0.0, 10.0)
    if rng.random() < 0.3:
        world.epoch = world.every * rng.randint(1, 3)
    if rng.random() < 0.3:
        world.dry[rng.randrange(n)] = rng.randint(1, 60)
    if others and rng.random() < 0.4:
        world.dies[rng.choice(others)] = rng.uniform(0.5, 40.0)
    return world


@pytest.mark.few(2)
@pytest.mark.parametrize("first", range(0, 400, 50))
def test_in_any_world_who_asks_is_heard_soon_and_all_count_the_same(first: int) -> None:
    for seed in range(first, first + 50):
        world = anything(seed)
        found = world.run()
        outcomes = agreed(found)
        assert outcomes[-1].wishes == Wish.STOP, f"seed {seed}"
        before = 0
        for k, outcome in enumerate(outcomes):
            done = sum(met[k][2] for met in found.values())
            assert world.dies or outcome.now.batches == done, f"seed {seed}: meeting {k}"
            assert bool(outcome.due & Due.VALIDATE) == (outcome.now.batches // world.every > before // world.every)
            before = outcome.now.batches
        asked = min(at for rank, at in world.wishes.items() if rank in found)
        deaf = max((last for _, last in world.deaf.values()), default=0.0)
        dead = 30.0 + 2.0 if world.dies else 0.0  # seconds after which silence is taken for death
        step = max(world.seconds)
        assert last_came(found) <= max(asked, deaf) + dead + 2 * (2.5 + 3 * step), f"seed {seed}: {world}"
