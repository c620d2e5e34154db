"""Members of unlike speed stop together, at the right sum, whatever happens to them."""

from __future__ import annotations

import random
from collections.abc import Generator
from weakref import WeakKeyDictionary

import pytest

from lightning_async.progress.agenda import Agenda, Due, Item
from lightning_async.progress.progress import Outcome, Progress
from lightning_async.progress.report import Wish
from lightning_async.progress.tally import Tally, Unit, total
from lightning_async.transport.pages import Desk, Pages
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster


class Deaf(Desk):
    """Hears of appointments only from some moment of the cluster's time on, as one whose store is slow."""

    def __init__(self, cluster: VirtualCluster, rank: int, until: float) -> None:
        super().__init__(Pages(cluster.carriers[rank], 2), 1)
        self._cluster, self._until = cluster, until

    def decided(self, key: str) -> bytes | None:
        return super().decided(key) if self._cluster.time >= self._until else None


Met = list[tuple[float, float, Outcome, Tally]]
"""When a member came to a meeting, when it left it, the outcome, and its own count."""


truth: WeakKeyDictionary[VirtualCluster, dict[int, Tally]] = WeakKeyDictionary()
"""What each member of a cluster has really done."""
words: WeakKeyDictionary[VirtualCluster, dict[int, bytes]] = WeakKeyDictionary()
"""What each says of itself."""


def member(
    cluster: VirtualCluster,
    rank: int,
    agenda: Agenda,
    seconds: float,
    meetings: int,
    *,
    wish: tuple[int, Wish] | None = None,
    end: int | None = None,
    deaf: float = 0.0,
    weights: tuple[int, ...] = (),
) -> Generator[float | str, None, Met]:
    """Train for so many meetings; `wish`: at this batch; `end`: the epoch's last batch of this member."""
    carrier = cluster.carriers[rank]
    rounds = Rounds(carrier)
    desk = Deaf(cluster, rank, until=deaf)
    weights = weights or (1,) * len(cluster.carriers)
    samples = 8 * weights[rank]
    progress = Progress(desk, n=sum(weights), agenda=agenda, batch=samples, weight=weights[rank])
    progress.settle((yield from rounds.agree(progress.word())))
    met: Met = []
    steps = [0]
    done = truth.setdefault(cluster, {})
    while len(met) < meetings:
        if not progress.ended:
            progress.batch_started()
            yield seconds
            progress.batch_ended(updates=1, samples=samples)
            done[rank] = progress.own
            weighed = total(one.times(weights[of]) for of, one in done.items())
            told = [*zip(progress.told(), weighed, strict=True)]
            told += [(progress.told_taken(), sum(one.updates for one in done.values()))]
            assert all(a <= b for a, b in told) or len(carrier.members()) < carrier.world, "never more than was done"
            said = words.setdefault(cluster, {})
            said[rank] = progress.says()
            if len(carrier.members()) == carrier.world:
                sums, taken, _ = progress.at(said)
                assert (sums.batches, sums.samples) == (weighed.batches, weighed.samples), "exactly what was done"
                assert taken == sum(one.updates for one in done.values())
            progress.ended = progress.own.batches == end
            steps.append(progress.steps())
        if wish and progress.own.batches == wish[0]:
            progress.call(wish[1])
        comes = yield from progress.comes()
        if comes or progress.ended:
            came = cluster.time
            outcome = progress.settle((yield from rounds.agree(progress.word())))
            met.append((came, cluster.time, outcome, progress.own))
            steps.append(progress.steps())
    assert steps == sorted(steps) or len(carrier.members()) < carrier.world, "progress never goes back"
    return met


def run(
    agenda: Agenda, seconds: list[float], meetings: int, cluster: VirtualCluster | None = None, **options: object
) -> dict[int, Met]:
    cluster = cluster or VirtualCluster(len(seconds))
    programs = {r: member(cluster, r, agenda, s, meetings, **options) for r, s in enumerate(seconds)}  # type: ignore[arg-type]
    found: dict[int, Met] = cluster.run(programs)
    return found


def agreed(found: dict[int, Met]) -> list[Outcome]:
    """What all members agreed on."""
    lists = [[outcome for _, _, outcome, _ in met] for met in found.values()]
    assert all(outcomes == lists[0] for outcomes in lists), "all draw the same conclusion"
    return lists[0]


@pytest.mark.few(2)
@pytest.mark.parametrize("slowness", [1, 4, 10])
@pytest.mark.parametrize("every", [4, 40, 4000])
def test_all_stop_at_exactly_the_point_and_within_two_batches_of_the_slowest(every: int, slowness: int) -> None:
    seconds = [0.02, 0.02, 0.02, 0.02 * slowness]
    found = run(Agenda([Item(Due.VALIDATE, Unit.BATCHES, every)]), seconds, meetings=3)
    outcomes = agreed(found)
    assert [outcome.now.batches for outcome in outcomes] == [every, 2 * every, 3 * every]
    assert all(outcome.due == Due.VALIDATE for outcome in outcomes)
    for k in range(1, 3):  # at the first one no speed was known where there was no time to hear of any
        came = [met[k][0] for met in found.values()]
        assert max(came) - min(came) <= 2 * max(seconds) + 0.001


@pytest.mark.parametrize("faster", [[0], [0, 1]])
def test_no_point_is_passed_by_those_that_get_faster_all_of_a_sudden(faster: list[int]) -> None:
    """At the meeting it was far off, and by the next look around it would have been far behind."""
    cluster = VirtualCluster(2)
    for rank in faster:
        cluster.slow(rank, 1 / 200, at=11.0)
    found = run(Agenda([Item(Due.VALIDATE, Unit.BATCHES, 40)]), [0.5, 0.5], meetings=3, cluster=cluster)
    first, second, third = agreed(found)
    assert first.now.batches == 40
    assert 80 <= second.now.batches <= 82, "one more of each, at most"
    assert 120 <= third.now.batches <= 122
    assert second.due == third.due == Due.VALIDATE


def test_whatever_is_sooner_comes_first_though_no_speed_is_known() -> None:
    items = [Item(Due.STOP, Unit.UPDATES, 40, once=True), Item(Due.VALIDATE, Unit.SAMPLES, 160)]
    outcomes = agreed(run(Agenda(items), [0.1, 0.1], meetings=2))
    assert [(o.now.updates, o.due) for o in outcomes] == [(20, Due.VALIDATE), (40, Due.STOP | Due.VALIDATE)]


def test_whatever_is_sooner_comes_first() -> None:
    items = [Item(Due.VALIDATE, Unit.BATCHES, 300), Item(Due.STOP, Unit.UPDATES, 700, once=True)]
    outcomes = agreed(run(Agenda(items), [0.1, 0.2], meetings=3))
    assert [(o.now.updates, o.due) for o in outcomes] == [(300, Due.VALIDATE), (600, Due.VALIDATE), (700, Due.STOP)]


def test_while_no_speed_is_known_the_nearest_point_comes_first() -> None:
    agenda = Agenda([Item(Due.NOTHING, Unit.UPDATES, 48, once=True), Item(Due.VALIDATE, Unit.BATCHES, 20)])
    outcomes = agreed(run(agenda, [0.001, 0.003], meetings=3))
    assert [outcome.now.batches for outcome in outcomes] == [20, 40, 48]


@pytest.mark.few(6)
@pytest.mark.parametrize("seed", range(24))
def test_any_speeds_any_points(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    items = [Item(Due.VALIDATE, rng.choice(list(Unit)), n * rng.randint(1, 300)) for _ in range(rng.randint(1, 3))]
    seconds = [rng.choice([0.01, 0.1, 0.5, 3.0]) for _ in range(n)]
    found = run(Agenda(items), seconds, meetings=6, cluster=VirtualCluster(n, latency=rng.choice([1e-4, 0.05])))
    outcomes = agreed(found)
    assert sum(outcome.due == Due.VALIDATE for outcome in outcomes) >= len(outcomes) - 1, "one in the dark at most"
    for outcome in outcomes:
        if not outcome.due:
            continue
        over = min(outcome.now[i.unit] % i.every / (8 if i.unit == Unit.SAMPLES else 1) for i in items)
        slack = n if any(i.unit == Unit.SAMPLES for i in items) else 0
        assert over <= slack, f"seed {seed}: {outcome} for {items}"


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(24))
def test_any_speeds_any_weights(seed: int) -> None:
    """Batches of 8 to 32 samples: a point is passed by less than the lightest of them that goes on."""
    rng = random.Random(seed)
    n = rng.randint(2, 5)
    weights = tuple(rng.choice([(1, 3), (2, 3), (1, 2, 4)][seed % 3]) for _ in range(n))
    items = [Item(Due.VALIDATE, unit, sum(weights) * rng.randint(1, 300)) for unit in (Unit.BATCHES, Unit.UPDATES)]
    seconds = [rng.choice([0.01, 0.1, 0.5, 3.0]) for _ in range(n)]
    cluster = VirtualCluster(n, latency=rng.choice([1e-4, 0.05]))
    outcomes = agreed(run(Agenda(items), seconds, meetings=6, cluster=cluster, weights=weights))
    assert sum(outcome.due == Due.VALIDATE for outcome in outcomes) >= len(outcomes) - 1, "one in the dark at most"
    for outcome in outcomes:
        assert outcome.now.samples == 8 * outcome.now.batches
        if outcome.due:
            assert min(outcome.now[i.unit] % i.every for i in items) < min(weights), f"{outcome} for {items}"


@pytest.mark.few(0)
@pytest.mark.parametrize("every", [33 * 4, 100 * 4, 300 * 4, 1000 * 4])
@pytest.mark.parametrize("slowness", [1, 4])
def test_no_point_is_passed_before_anybody_has_heard_of_a_speed(every: int, slowness: int) -> None:
    seconds = [0.002, 0.002, 0.002, 0.002 * slowness]  # the first notes come after 0.5 s
    outcomes = agreed(run(Agenda([Item(Due.VALIDATE, Unit.BATCHES, every)]), seconds, meetings=4))
    found = [outcome.now.batches for outcome in outcomes if outcome.due]
    assert found == [every * (k + 1) for k in range(len(found))]
    assert len(found) >= 3


@pytest.mark.few(4)
@pytest.mark.parametrize("seed", range(20))
def test_an_appointment_that_one_hears_of_late_is_kept_late_by_that_one_alone(seed: int) -> None:
    rng = random.Random(seed)
    cluster = VirtualCluster(4)
    agenda = Agenda([Item(Due.VALIDATE, Unit.BATCHES, 400)])
    late, deaf = rng.randrange(4), rng.uniform(4.0, 9.0)
    programs = {r: member(cluster, r, agenda, 0.05 * (1 + r % 2), 3, deaf=deaf if r == late else 0.0) for r in range(4)}
    found: dict[int, Met] = cluster.run(programs)
    outcomes = agreed(found)
    assert [bool(outcome.due) for outcome in outcomes] == [True] * 3, "no point is lost and none comes twice"
    own = 20.0 / (1 + late % 2)  # its batches in a second
    assert outcomes[0].now.batches - 400 <= max(0.0, deaf - 4.0) * own + 2
    assert outcomes[-1].now.batches % 400 == 0, "the next points are kept exactly"
    came = [met[0][0] for rank, met in found.items() if rank != late]
    assert max(came) - min(came) <= 0.2 + 0.001, "the others came on time"


def test_a_member_that_dies_leaves_the_others_to_meet() -> None:
    cluster = VirtualCluster(3)
    cluster.kill(2, at=3.0)
    found = run(Agenda([Item(Due.VALIDATE, Unit.BATCHES, 300)]), [0.05, 0.05, 0.05], meetings=4, cluster=cluster)
    outcomes = agreed(found)
    assert len(outcomes) == 4
    assert 2 not in found


def test_a_frozen_member_is_not_counted_on() -> None:
    cluster = VirtualCluster(3)
    cluster.freeze(2, at=1.0, seconds=8.0)
    found = run(Agenda([Item(Due.VALIDATE, Unit.BATCHES, 600)]), [0.05, 0.05, 0.05], meetings=1, cluster=cluster)
    (outcome,) = agreed(found)
    assert outcome.now.batches >= 600
    own = {rank: met[0][3].batches for rank, met in found.items()}
    assert own[2] < 150
    assert max(found[2][0][0] - found[0][0][0], 0) < 1.0


@pytest.mark.parametrize("rank", [0, 3])
def test_a_wish_of_one_is_heard_by_all_within_a_moment(rank: int) -> None:
    cluster = VirtualCluster(4)
    agenda = Agenda([Item(Due.VALIDATE, Unit.BATCHES, 10**6)])
    programs = {
        r: member(cluster, r, agenda, 0.05 * (1 + 3 * (r == 3)), 1, wish=(40, Wish.STOP) if r == rank else None)
        for r in range(4)
    }
    found: dict[int, Met] = cluster.run(programs)
    (outcome,) = agreed(found)
    assert outcome.wishes == Wish.STOP
    assert outcome.first == (Wish.STOP if rank == 0 else Wish.NOTHING)
    came = [met[0][0] for met in found.values()]
    assert max(came) - 40 * 0.05 * (1 + 3 * (rank == 3)) < 1.2


def test_whoever_has_ended_its_epoch_comes_to_the_others_meetings() -> None:
    cluster = VirtualCluster(2)
    agenda = Agenda([Item(Due.VALIDATE, Unit.BATCHES, 50)])
    programs = {
        0: member(cluster, 0, agenda, 0.05, 6, end=30),
        1: member(cluster, 1, agenda, 0.05, 6, end=190),
    }
    found: dict[int, Met] = cluster.run(programs)
    outcomes = agreed(found)
    assert [o.now.batches for o in outcomes] == [50, 80, 100, 150, 200, 220]
    assert [o.ended for o in outcomes] == [False] * 5 + [True]
    assert [bool(o.due) for o in outcomes] == [True, False, True, True, True, False]


def epochs(
    cluster: VirtualCluster, rank: int, ends: list[list[int]], whole: list[int]
) -> Generator[float | str, None, list[int]]:
    """Epochs of so many batches, every fourth a step, and a last one of the rest; `whole`: what each is said to be."""
    rounds = Rounds(cluster.carriers[rank])
    progress = Progress(Desk(Pages(cluster.carriers[rank], 2), 1), n=len(cluster.carriers), agenda=Agenda(), batch=8)
    progress.settle((yield from rounds.agree(progress.word())))
    steps, taken = [0], 0
    for batches, said in zip(ends[rank], whole, strict=True):
        progress.length = said
        for number in range(1, batches + 1):
            progress.batch_started()
            yield 0.2
            updates = int(number % 4 == 0 or number == batches)
            taken += updates
            progress.batch_ended(updates=updates, samples=8)
            steps.append(progress.steps())
        progress.ended, progress.whole = True, said
        outcome = progress.settle((yield from rounds.agree(progress.word())))
        assert outcome.ended
        steps.append(progress.steps())
        assert progress.about() == outcome.now.updates // 2 == steps[-1]
    told = yield from rounds.agree(str(taken).encode())
    assert progress.told().updates == sum(map(int, told.values())), "what was taken, however it was counted"
    assert steps == sorted(steps)
    return [steps[-1], progress.evened]


@pytest.mark.parametrize(
    ("ends", "whole", "steps", "evened"),
    [
        ([[43, 43], [13, 13]], [7, 7], 14, -2),
        ([[45, 45], [15, 15]], [8, 8], 16, 0),
        ([[40, 40], [20, 20]], [8, 8], 16, 2),
        ([[43, 43], [13, 13]], [7, 0], 14, -1),
        ([[43, 43], [13, 13]], [0, 0], 15, 0),
    ],
)
def test_a_whole_epoch_counts_for_its_steps_and_another_for_those_that_were_taken(
    ends: list[list[int]], whole: list[int], steps: int, evened: int
) -> None:
    """The second to last: 7 in the first epoch, and 15 updates of two members in the second."""
    cluster = VirtualCluster(2)
    found: dict[int, list[int]] = cluster.run({rank: epochs(cluster, rank, ends, whole) for rank in (0, 1)})
    assert found == {0: [steps, evened], 1: [steps, evened]}


def test_an_epoch_of_which_members_say_unlike_things_counts_for_what_was_taken() -> None:
    cluster = VirtualCluster(2)
    programs = {rank: epochs(cluster, rank, [[43], [13]], [7 + rank]) for rank in (0, 1)}
    found: dict[int, list[int]] = cluster.run(programs)
    assert found == {0: [7, 0], 1: [7, 0]}
