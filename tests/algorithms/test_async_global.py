"""The laws of the asynchronous global update on the virtual cluster: W counts every sample once, and nobody waits."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.shards import ANSWER, LAST, PUSH
from lightning_async.algorithms.sync_global import SyncGlobal
from lightning_async.algorithms.training import train
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier, Letter, Mail, Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.one_hot import Outcome, run

EXACT: dict[str, Any] = {"attenuation": "none", "shards": 1}


def go(speeds: list[float], **options: Any) -> Outcome:
    return run(speeds, make=AsyncGlobal, **options)


def arrivals(outcome: Outcome, rank: int) -> list[Arrival]:
    return outcome.trained[rank].arrivals


def lost(outcome: Outcome, rank: int) -> int:
    """Samples of a member that are in nobody's weights."""
    return sum(a.samples for a in arrivals(outcome, rank) if a.fate in (Fate.LOST, Fate.REFUSED))


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.few(5)
@pytest.mark.parametrize("local_steps", ["speed", "epoch", 1, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_n_equal_members_move_w_by_the_mean_of_their_steps(n: int, local_steps: Any) -> None:
    outcome = go([1.0] * n, seconds=2.0, local_steps=local_steps, cluster={"latency": 0.01, "jitter": 1.0, "seed": n})
    torch.testing.assert_close(outcome.sample_weights, torch.ones(n), rtol=1e-5, atol=0)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "knobs", [{}, {"wire": "bf16"}, {"wire": "sign"}, {"local_steps": "speed", "attenuation": "poly"}], ids=str
)
@pytest.mark.parametrize("slow", [1.0, 4.0, 10.0])
def test_one_sample_moves_w_equally_whatever_the_speed(slow: float, knobs: dict[str, Any]) -> None:
    outcome = go([1, 1, 1, slow], cluster={"latency": 0.01, "jitter": 1.0}, **knobs)
    torch.testing.assert_close(outcome.sample_weights, torch.ones(4), rtol=5e-3, atol=0)


def test_one_sample_moves_w_equally_whatever_the_batch_size() -> None:
    outcome = go([1, 1, 4], masses=[3 * UNIT, UNIT, 2 * UNIT])
    torch.testing.assert_close(outcome.sample_weights, torch.tensor([3.0, 1.0, 2.0]) * 3 / 6, rtol=5e-3, atol=0)


class Told(AsyncGlobal):
    """It notes how many answers each step folded, and how many shards it pushed."""

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        self.folds, self.pushes = list[int](), list[int]()
        super().begin(replica, mail, mass, rounds)

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        asked = self._asked
        arrivals = yield from super().after_step(replica, mail, step)
        self.folds.append(len(arrivals))
        self.pushes.append(self._asked - asked + len(arrivals))
        return arrivals

    @property
    def _asked(self) -> int:
        return sum(exchange.asked > 0 for exchange in self.exchanges)


@pytest.mark.parametrize(("most", "answers"), [(1, 1), (16, 1), (17, 2), (32, 2), (1000, 4)])
def test_what_would_make_a_step_long_is_left_to_the_next(
    most: int, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shards of 16 numbers are all answered before the next step."""
    monkeypatch.setattr("lightning_async.algorithms.async_global.MOST", most)
    outcome = run([1.0] * 4, seconds=1.0, make=Told, cluster={"latency": 0.001})
    assert all(max(member.folds) == max(member.pushes) == answers for member in outcome.algorithms)
    assert all(member._unfolded == [] for member in outcome.algorithms)
    torch.testing.assert_close(outcome.sample_weights, torch.ones(4), rtol=1e-5, atol=0)


def test_all_members_end_with_the_same_w_to_the_bit() -> None:
    for knobs in ({}, {"wire": "bf16"}, {"outer_momentum": 0.9, "outer_lr": 0.3}, {"attenuation": "paper"}):
        outcome = go([1, 1, 2, 5], cluster={"latency": 0.02, "jitter": 1.0}, **knobs)
        assert all(
            torch.equal(t.consensus, outcome.consensus) for t in outcome.trained.values() if t.consensus is not None
        )


def test_who_is_late_is_who_pushed_not_who_owns() -> None:
    outcome = go([1, 1, 1, 4], local_steps=4, attenuation="none", cluster={"latency": 0.01})
    told = [(rank, a) for rank in range(4) for a in arrivals(outcome, rank)]
    assert all(a.peer == rank for rank, a in told)
    assert {a.owner for _, a in told} == {a.other for _, a in told} == {0, 1, 2, 3}
    delays = [[a.delay for _, a in told if a.peer == rank] for rank in range(4)]
    means = [sum(of) / len(of) for of in delays]
    assert means[3] > 2 * max(means[:3])


def test_late_corrections_count_less_and_what_counts_sums_to_the_whole() -> None:
    """With a fixed number of steps the slow member is late; by the paper's and by the other laws it counts for less."""
    fair = go([1, 1, 1, 10], local_steps=4, attenuation="none").sample_weights
    torch.testing.assert_close(fair, torch.ones(4), rtol=1e-5, atol=0)
    for attenuation in ("poly", "exp", "paper"):
        weights = go([1, 1, 1, 10], local_steps=4, attenuation=attenuation).sample_weights
        assert weights[3] < 0.95 * weights[0]


# -- limits ------------------------------------------------------------------------------------------------------------


def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    return model, torch.randn(60, 8, 5, generator=generator), torch.randn(60, 8, 1, generator=generator)


def descend(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_one_member_is_plain_training_to_the_bit(optimizer: Any, wire: Any) -> None:
    model, x, y = problem(1)
    twin, *_ = problem(1)
    knobs = {"lr": 0.05, "momentum": 0.9} if optimizer is torch.optim.SGD else {"lr": 0.01}
    mine, theirs = optimizer(model.parameters(), **knobs), optimizer(twin.parameters(), **knobs)
    cluster = VirtualCluster(1)
    carrier, replica, algorithm = (
        cluster.carriers[0],
        Replica(model.parameters()),
        AsyncGlobal(local_steps=3, wire=wire),
    )

    def life() -> Any:
        algorithm.begin(replica, carrier, UNIT, Rounds(carrier))
        for step in range(60):
            yield 0.02
            descend(model, x[step], y[step])
            mine.step()
            carrier.at(step + 1)
            yield from algorithm.after_step(replica, carrier, step + 1)
            if step % 20 == 19:
                consensus = yield from algorithm.meet(replica, carrier)
                replica.stand_in(consensus)
                replica.stay()
                algorithm.resume(replica, adopted=True)

    cluster.run({0: life()})
    for step in range(60):
        descend(twin, x[step], y[step])
        theirs.step()
    assert torch.equal(weights_of(model), weights_of(twin))


def test_sgwu_with_one_local_sgd_step_is_synchronous_sgd() -> None:
    n, steps, lr = 4, 60, 0.05
    twin, *_ = problem(0)
    cluster, models, programs = VirtualCluster(n), [], {}
    for r, carrier in enumerate(cluster.carriers):
        model, x, y = problem(r)
        models.append(model)
        optimizer = torch.optim.SGD(model.parameters(), lr)
        programs[r] = train(
            SyncGlobal(local_steps=1),
            Replica(model.parameters()),
            carrier,
            steps=steps,
            take_step=lambda k, m=model, x=x, y=y: descend(m, x[k - 1], y[k - 1]),
            optimizer_step=optimizer.step,
            seconds=lambda me, k: 0.02,
            rounds=Rounds(carrier),
        )
    cluster.run(programs)
    optimizer = torch.optim.SGD(twin.parameters(), lr)
    batches = [problem(r)[1:] for r in range(n)]
    for step in range(steps):
        descend(twin, torch.cat([x[step] for x, _ in batches]), torch.cat([y[step] for _, y in batches]))
        optimizer.step()
    for model in models:
        torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-6, atol=1e-6)


def test_sgwu_weighs_by_accuracy() -> None:
    """W = sum Q_j W_j / sum Q_j: a convex combination."""
    qualities = [0.2, 0.6, 0.8]

    def make(**knobs: Any) -> SyncGlobal:
        algorithm = SyncGlobal(**knobs)
        algorithm.accuracy = iter(qualities[len(made) : len(made) + 1] * 10_000).__next__
        made.append(algorithm)
        return algorithm

    made: list[SyncGlobal] = []
    outcome = run([1, 1, 1], seconds=0.2, make=make, local_steps=2)
    expected = torch.tensor([q / sum(qualities) * steps for q, steps in zip(qualities, outcome.steps, strict=True)])
    torch.testing.assert_close(outcome.consensus[::16][:3], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_sgwu_is_a_convex_combination(seed: int) -> None:
    """Whatever the accuracies: no number of W is outside what the members have, and equal members change nothing."""
    chance, lengths = random.Random(seed), [1, 3, 10, 2]

    def make(**knobs: Any) -> SyncGlobal:
        algorithm, quality = SyncGlobal(**knobs), 10 ** chance.uniform(-3, 3)
        algorithm.accuracy = lambda: quality
        return algorithm

    outcome = run(lengths, seconds=0.4, make=make, local_steps=None)
    for r, steps in enumerate(outcome.steps):  # each moved a number of its own from 0 to its steps
        assert 0 <= outcome.consensus[16 * r].item() <= steps
    shares = [outcome.consensus[16 * r].item() / steps for r, steps in enumerate(outcome.steps)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)


def test_sgwu_at_meetings_only_waits_for_nobody_before_and_counts_every_sample_alike() -> None:
    """IDPA gives unlike numbers of batches: a member that is ten times slower takes a tenth of the steps."""
    outcome = run([1, 1, 4, 10], make=SyncGlobal, local_steps=None)
    assert all(one.waits == 0 for one in outcome.trained.values())
    torch.testing.assert_close(outcome.sample_weights, torch.ones(4), rtol=1e-5, atol=0)


# -- nobody waits ------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_the_slow_the_frozen_or_the_dead() -> None:
    def faults(cluster: VirtualCluster) -> None:
        cluster.freeze(0, 1.0, at=0.5)
        cluster.kill(2, at=1.0)
        cluster.cut(1, seconds=0.7, at=1.5)

    outcome = go([1, 1, 1, 10, 1], faults=faults, cluster={"silence": 0.3})
    assert set(outcome.trained) == {0, 1, 3, 4}
    assert all(t.waits == 0 for t in outcome.trained.values())
    for r in (1, 3, 4):
        offset = outcome.cluster.carriers[r].now() - outcome.cluster.time
        assert outcome.trained[r].stepped - offset == pytest.approx(outcome.steps[r] * 0.02 * [1, 1, 1, 10, 1][r])


def test_nobody_waits_for_who_comes_late() -> None:
    outcome = go([1] * 4, faults=lambda cluster: cluster.join(1, at=3.0), cluster={"silence": 0.3, "patience": 1.0})
    assert all(t.waits == 0 for t in outcome.trained.values())
    assert outcome.trained[1].consensus is not None


def test_256_members_with_speeds_over_a_factor_10() -> None:
    """None waits, delays stay in proportion, and bytes per member and exchange do not grow with their number."""
    found = {}
    for n in (16, 256):
        chance, sent = random.Random(n), [0, 0]
        speeds = [10 ** chance.random() for _ in range(n)]
        cluster = VirtualCluster(n, latency=0.005, seed=n)
        send = cluster._wire.send

        def counted(link: Any, packet: Any, send: Any = send, sent: list[int] = sent) -> None:
            sent[0] += 0 if packet.message.body is None else packet.message.body.numel() * 4
            sent[1] += packet.message.kind == PUSH
            send(link, packet)

        cluster._wire.send = counted  # type: ignore[method-assign]
        algorithms = [AsyncGlobal(local_steps="speed", shards=4) for _ in range(n)]
        parameters = [nn.Parameter(torch.zeros(4096)) for _ in range(n)]

        def move(r: int, parameters: list[nn.Parameter] = parameters) -> None:
            parameters[r].data += 1.0

        programs = {
            r: train(
                algorithms[r],
                Replica([parameters[r]]),
                carrier,
                steps=max(4, int(40 / speeds[r])),
                take_step=lambda k: None,
                optimizer_step=lambda r=r, move=move: move(r),
                seconds=lambda me, k, speeds=speeds: 0.02 * speeds[me],
                rounds=Rounds(carrier, channel=1),
                meets=False,
            )
            for r, carrier in enumerate(cluster.carriers)
        }
        trained = cluster.run(programs)
        assert all(t.waits == 0 for t in trained.values())
        found[n] = 4 * sent[0] / sent[1]
        assert max(a.delay for t in trained.values() for a in t.arrivals) < 6 * n
    assert found[256] < 1.1 * found[16]
    assert found[256] < 1.1 * 2 * 4 * 4096  # a ring all-reduce sends twice the weights


# -- takeover ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(18))
def test_whatever_freezes_what_is_missing_is_what_was_counted(seed: int) -> None:
    """The owner of the only shard freezes and is taken over, perhaps twice: all other samples are in W, once."""
    chance = random.Random(seed)
    every, latency = (1, 5, 20)[seed % 3], chance.choice([0.001, 0.02, 0.1])

    def faults(cluster: VirtualCluster) -> None:
        when = chance.uniform(0.3, 1.5)
        cluster.freeze(0, chance.uniform(0.5, 1.5), at=when)
        if seed % 2 == 0:
            cluster.freeze(1, 0.6, at=when + 0.35 + 6 * latency + chance.uniform(0.0, 1.0))  # its first mirror has left

    outcome = go(
        [1, 1, 2, 1, 3],
        local_steps=chance.choice([1, 3, 7]),
        faults=faults,
        mirror_every=every,
        cluster={"latency": latency, "jitter": 1.0, "seed": seed, "silence": 0.3},
        **EXACT,
    )
    n = len(outcome.steps)
    for r in range(n):
        missing = lost(outcome, r)
        assert outcome.consensus[16 * r].item() * n == pytest.approx(outcome.steps[r] - missing, rel=1e-5)
    count = sum(a.fate is Fate.LOST for r in range(n) for a in arrivals(outcome, r))
    assert count <= (1 + (seed % 2 == 0)) * every


@pytest.mark.few(2)
@pytest.mark.parametrize(("every", "latency"), [(1, 0.002), (5, 0.002), (20, 0.002), (5, 0.2)])  # ten steps
@pytest.mark.parametrize("dead", range(4))
def test_with_an_owner_at_most_so_many_arrivals_die(dead: int, every: int, latency: float) -> None:
    outcome = go(
        [1] * 4,
        local_steps=1,
        attenuation="none",
        faults=lambda cluster: cluster.kill(dead, at=1.0),
        mirror_every=every,
        cluster={"silence": 0.3, "latency": latency, "jitter": 1.0},
    )
    count = sum(a.fate is Fate.LOST for r in outcome.trained for a in arrivals(outcome, r))
    assert len(outcome.trained) == 3
    assert count <= every
    for r in outcome.trained:
        assert outcome.trained[r].waits == 0
        assert any(a.delay >= 0 and a.owner != dead for a in arrivals(outcome, r))


def test_an_owner_that_wakes_finds_that_it_is_none_any_more() -> None:
    outcome = go([1] * 4, faults=lambda c: c.freeze(1, 1.0, at=1.0), cluster={"silence": 0.3}, **EXACT, seconds=3)
    assert {a.owners.owner(0) for a in outcome.algorithms} == {0}  # nothing of member 0's was taken over
    outcome = go([1] * 4, faults=lambda c: c.freeze(0, 1.0, at=1.0), cluster={"silence": 0.3}, **EXACT, seconds=3)
    assert {a.owners.owner(0) for a in outcome.algorithms} == {1}
    assert len({a.exchanges[0].place for a in outcome.algorithms}) == 1
    late = [a.owner for a in arrivals(outcome, 0)]
    assert set(late) == {0, 1}


def test_who_is_cut_off_takes_nothing_over() -> None:
    outcome = go([1] * 4, faults=lambda c: c.cut(3, seconds=1.0, at=1.0), cluster={"silence": 0.3}, **EXACT)
    assert {a.owners.owner(0) for a in outcome.algorithms} == {0}
    torch.testing.assert_close(outcome.sample_weights, torch.ones(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("when", [3.95, 4.0, 4.002, 4.01, 4.03, 4.05, 4.1, 4.2])
def test_an_owner_that_dies_in_a_meeting_is_taken_over_there(when: float) -> None:
    outcome = go(
        [1, 1, 1, 1.01],
        seconds=4.0,
        faults=lambda cluster: cluster.kill(0, at=when),
        cluster={"silence": 0.3, "latency": 0.02, "jitter": 1.0},
        **EXACT,
    )
    ends = [t.consensus for r, t in outcome.trained.items() if r != 0]
    assert len(ends) == 3
    assert all(torch.equal(end, ends[0]) for end in ends)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 4, 12])
def test_a_bound_that_is_kept_by_waiting_is_kept(bound: int) -> None:
    n = 4
    outcome = go([1, 1, 1, 8], local_steps=2, on_late="wait", max_delay=bound, cluster={"latency": 0.01, "jitter": 1.0})
    for r in range(n):
        assert max(a.delay for a in arrivals(outcome, r)) <= bound + 2 * (n - 1)
        assert all(a.fate is Fate.FOLDED for a in arrivals(outcome, r))
        assert all(a.samples > 0 for a in arrivals(outcome, r))  # a word that nothing is left to push is no arrival
    assert outcome.trained[0].waits > 0
    assert outcome.trained[3].waits == 0


def to_the_meeting(algorithm: AsyncGlobal, carrier: Carrier, steps: int) -> Program:
    """So many steps, and then a wait for the others, without a look at the mail."""
    replica, rounds = Replica([nn.Parameter(torch.zeros(64))]), Rounds(carrier)
    algorithm.begin(replica, carrier, UNIT, Rounds(carrier, channel=1))
    for step in range(1, steps + 1):
        yield 0.02 * (1 + carrier.me)
        carrier.at(step)
        yield from algorithm.after_step(replica, carrier, step)
    yield from algorithm.stop(replica, carrier)
    yield from rounds.barrier()
    return (yield from algorithm.meet(replica, carrier))


@pytest.mark.few(8)
@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("when", [0.05, 0.3, 0.9, 2.5])
@pytest.mark.parametrize("dead", [None, 0, 1, 2])
def test_with_a_bound_nobody_waits_for_who_waits_in_a_meeting_or_is_dead(
    dead: int | None, when: float, every: int | None
) -> None:
    """Members 0 and 1 end first, and wait for the last one before they meet, without a look at their mail. That they do
    may have been known to the dead owner alone."""
    n, cluster = 3, VirtualCluster(3, latency=0.01, silence=0.3, limit=60.0)
    if dead is not None:
        cluster.kill(dead, at=when)

    def life(carrier: Carrier) -> Program:
        algorithm = AsyncGlobal(local_steps=1, on_late="wait", max_delay=1, shards=1, mirror_every=every)
        return (yield from to_the_meeting(algorithm, carrier, 5 if carrier.me < 2 else 100))

    ends = cluster.run({c.me: life(c) for c in cluster.carriers})
    assert set(ends) == set(range(n)) - {dead}
    assert cluster.time < 60


def test_with_a_bound_nobody_waits_for_who_was_found_in_an_heirs_books() -> None:
    """Member 0's last push is in a mirror, and its answer lost with the owner: the heir must hear that it pauses."""
    n, dead, cluster, struck = 4, 2, VirtualCluster(4, latency=0.01, silence=0.3, limit=60.0), list[float]()

    def life(carrier: Carrier) -> Program:
        algorithm = AsyncGlobal(local_steps=1, on_late="wait", max_delay=1, mirror_every=1)
        make = algorithm._service

        def watched(*arguments: Any) -> Any:
            service = make(*arguments)

            def serve(letter: Letter) -> Any:
                answers = list(service(letter))
                if carrier.me == dead and letter.peer == 0 and letter.message.kind == LAST and not struck:
                    struck.append(cluster.time)
                    cluster.kill(dead, at=cluster.time + 0.05)  # the mirror has left
                    return [one for one in answers if one[1].kind != ANSWER]
                return answers

            return serve

        algorithm._service = watched  # type: ignore[method-assign]
        return (yield from to_the_meeting(algorithm, carrier, 30 if carrier.me else 5))

    ends = cluster.run({c.me: life(c) for c in cluster.carriers})
    assert struck
    assert set(ends) == set(range(n)) - {dead}


def test_late_ones_are_dropped_and_counted() -> None:
    outcome = go([1, 1, 1, 10], local_steps=2, on_late="drop", max_delay=4, cluster={"latency": 0.01}, **EXACT)
    assert lost(outcome, 3) > 0
    for r in range(4):
        assert outcome.consensus[16 * r].item() * 4 == pytest.approx(outcome.steps[r] - lost(outcome, r), rel=1e-5)


@pytest.mark.parametrize("make", [partial(AsyncGlobal, attenuation="none"), SyncGlobal])
def test_a_member_that_is_not_finite_is_refused_counted_and_given_the_weights(make: Any) -> None:
    n, cluster = 3, VirtualCluster(3, latency=0.01)
    parameters = [nn.Parameter(torch.zeros(64)) for _ in range(n)]
    replicas = [Replica([p]) for p in parameters]

    def step(r: int, k: int) -> None:
        parameters[r].data += 1.0
        if r == 1 and k == 10:
            parameters[r].data[7] = float("nan")

    programs = {
        r: train(
            make(local_steps=2),
            replicas[r],
            carrier,
            steps=40,
            take_step=lambda k, r=r: step(r, k),
            optimizer_step=lambda: None,
            seconds=lambda me, k: 0.02,
            rounds=Rounds(carrier),
        )
        for r, carrier in enumerate(cluster.carriers)
    }
    trained = cluster.run(programs)
    refused = [a for t in trained.values() for a in t.arrivals if a.fate is Fate.REFUSED]
    assert refused[0].samples == 2
    assert all(torch.isfinite(replica.flat).all() for replica in replicas)
    assert torch.isfinite(trained[0].consensus).all()
    assert trained[0].consensus.min() > 30


# -- knobs -------------------------------------------------------------------------------------------------------------

KNOBS: list[tuple[dict[str, Any], str]] = [
    ({"local_steps": 0}, "`local_steps` must be an integer of at least 1, 'speed' or 'epoch', got 0"),
    ({"local_steps": True}, "`local_steps` must be an integer of at least 1, 'speed' or 'epoch', got True"),
    ({"local_steps": "often"}, "`local_steps` must be an integer of at least 1, 'speed' or 'epoch', got 'often'"),
    ({"pace": 0}, "`pace` must be an integer of at least 1, got 0"),
    ({"attenuation": "log"}, "`attenuation` must be one of 'poly', .*, 'paper', got 'log'"),
    ({"strength": -1.0}, "`strength` must be a number of at least 0, got -1.0"),
    ({"attenuation": "paper", "strength": 1.0}, "`strength` has no meaning with attenuation='paper'"),
    ({"max_delay": 0}, "`max_delay` must be an integer of at least 1, or None for no bound, or 'auto', got 0"),
    ({"on_late": "wait", "max_delay": None}, "on_late='wait' needs a `max_delay`"),
    ({"on_late": "cry"}, "`on_late` must be 'shrink', 'drop' or 'wait', got 'cry'"),
    ({"outer": "adam"}, "`outer` must be one of 'sum', 'nesterov', 'delayed_nesterov', got 'adam'"),
    ({"outer_lr": -1}, "`outer_lr` must be a number above 0, got -1"),
    ({"outer_momentum": 1.5}, "`outer_momentum` must be at least 0 and below 1, got 1.5"),
    ({"shards": 0}, "`shards` must be an integer of at least 1, or None for as many as members, at most 8, got 0"),
    ({"mirror_every": 0}, "`mirror_every` must be an integer of at least 1, or None for eight for each member, got 0"),
    ({"wire": "fp8"}, "`wire` must be 'fp32', 'bf16' or 'sign', got 'fp8'"),
]


@pytest.mark.parametrize(("knobs", "sentence"), KNOBS)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AsyncGlobal(**knobs)


def test_a_member_pushes_to_itself_as_often_as_to_the_others() -> None:
    """On slow links: else its own shard would count so many versions of its own that the others looked late there."""
    n = 4  # shards of 64 bytes
    outcome = go([1.0] * n, seconds=6.0, attenuation="none", cluster={"latency": 0.01, "bandwidth": 64 / 0.05})
    for rank in range(n):
        delays = [a.delay for a in arrivals(outcome, rank) if a.owner != rank]
        own = sum(a.owner == rank for a in arrivals(outcome, rank))
        assert len(delays) > 9
        assert own <= len(delays) / (n - 1) + 2
        assert max(delays) <= 3 * (n - 1)
