"""Sent plus rest is all there was, weights are equal everywhere, and with what is held back they follow exact steps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_async.algorithms.training import train
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.sign_twin import Twin
from tests.algorithms.sign_twin import train as train_twin
from tests.algorithms.sign_world import LIVES, Member, life, members, on_virtual, quadratic

RULES = ["always", "accumulate", "periodic", "paper", "innovation"]
KEEPING = ["always", "accumulate", "periodic"]
SMALL: dict[str, Any] = {"block": 16, "min_size": 0}
D = 96


def world(
    n: int, rule: str, *, steps: int = 60, noise: float = 0.5, carrier: str = "virtual", **knobs: Any
) -> list[Member]:
    some = members(n, [(D,)], rule=rule, history=5, max_skip=3, **{**SMALL, **knobs})
    gradient, _ = quadratic(n, D, noise=noise)
    LIVES[carrier](some, gradient, steps=steps, lr=schedule)
    return some


def schedule(k: int) -> float:
    return 0.1 / (1 + k / 20)


def mean_rest(some: list[Member], k: int) -> Tensor:
    """The mean of what the ranks hold back after step k, and what the servers do."""
    rest = sum(m.rests[k] for m in some) / len(some)
    assert isinstance(rest, Tensor)
    for m in some:
        base, server = m.servers[k]
        rest[base : base + server.numel()] += server
    return rest


# -- the laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("rule", KEEPING)
@pytest.mark.parametrize(("n", "carrier"), [(2, "virtual"), (3, "virtual"), (3, "real")])
def test_weights_and_what_is_held_back_follow_exact_steps(n: int, rule: str, form: str, carrier: str) -> None:
    some = world(n, rule, form=form, carrier=carrier)
    gradient, _ = quadratic(n, D, noise=0.5)
    start = members(1, [(D,)])[0].flat()
    for k in range(60):
        before = start if k == 0 else some[0].weights[k - 1]
        held = torch.zeros(D) if k == 0 else mean_rest(some, k - 1)[:D]
        exact = sum(gradient(r, k + 1, before) for r in range(n)) / n
        expected = before + held - schedule(k + 1) * exact
        torch.testing.assert_close(some[0].weights[k] + mean_rest(some, k)[:D], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.few(4)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("carrier", LIVES)
def test_weights_are_the_same_on_all_ranks_after_every_step(rule: str, form: str, carrier: str) -> None:
    some = world(4, rule, form=form, carrier=carrier, steps=60 if carrier == "virtual" else 12)
    for m in some[1:]:
        assert all(torch.equal(a, b) for a, b in zip(m.weights, some[0].weights, strict=True))


@pytest.mark.few(4)
@pytest.mark.parametrize("carrier", LIVES)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("rule", ["paper", "innovation"])
def test_what_all_have_of_each_other_is_the_same_everywhere_at_all_times(rule: str, form: str, carrier: str) -> None:
    """The mirrors: each rank's last sheet where it is used again, each server's, the sum of all that was agreed on."""
    some = world(3, rule, form=form, steps=30, threshold=0.6, carrier=carrier)
    for k in range(30):
        kept: dict[Any, list[Tensor]] = {}
        for m in some:
            for what, mirror in m.mirrors[k].items():
                kept.setdefault(what, []).append(mirror)
        assert all(torch.equal(mirror, mirrors[0]) for mirrors in kept.values() for mirror in mirrors)
        shared = 1 + 3 + 6 if form == "slices" else 1 + 3  # common, means, sheets to others: at two ranks or at all
        assert sum(len(mirrors) > 1 for mirrors in kept.values()) == shared - (rule == "paper")
    assert any(m.algorithm.skipped for m in some)


@pytest.mark.few(8)
@pytest.mark.parametrize(("carrier", "ahead"), [("virtual", 0), ("virtual", 1), ("virtual", 2), ("real", 1)])
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("rule", RULES)
def test_the_twin_takes_the_same_path(rule: str, form: str, carrier: str, ahead: int) -> None:
    follows(form, carrier, rule=rule, history=5, max_skip=3, ahead=ahead, threshold=0.6)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("rule", "news"), [("accumulate", "change"), ("accumulate", "backlog"), ("innovation", "change")]
)
def test_the_twin_takes_the_same_path_with_weights_and_errors_in_the_trigger(rule: str, news: str) -> None:
    """And both tell on who sends."""
    knobs: dict[str, Any] = {"rule": rule, "news": news, "history": 5, "max_skip": 7, "threshold": 0.6}
    plain = follows("slices", "virtual", **knobs)
    for more in ({"history_weights": [4.0, 2, 0, 0, 1]}, {"error_weight": 0.2}):
        assert follows("slices", "virtual", **knobs, **more) != plain


def follows(form: str, carrier: str, *, rule: str, **knobs: Any) -> list[list[bool]]:
    """Who sent in each round, of a run in which the twin took the same path."""
    n, steps = 3, 30
    some = members(n, [(D,)], form=form, rule=rule, **SMALL, **knobs)
    gradient, _ = quadratic(n, D, noise=0.3)
    LIVES[carrier](some, gradient, steps=steps, lr=schedule)
    twin = Twin(n, D, block=16, slices=form == "slices", rule=rule, **knobs)
    path = train_twin(
        twin,
        lambda m, k, w: gradient(m, k, torch.from_numpy(w)).numpy(),
        members(1, [(D,)])[0].flat().numpy(),
        [schedule(k) for k in range(1, steps + 1)],
    )
    for k in range(steps):
        np.testing.assert_allclose(some[1].weights[k].numpy(), path[k], rtol=1e-9, atol=1e-9)
    if rule in ("accumulate", "paper", "innovation"):
        share = np.mean(twin.sent)
        assert 0.1 < share < 1.0, share  # both happened
    return [sent.tolist() for sent in twin.sent]


# -- the limits: what it must equal ------------------------------------------------------------------------------------


def exact_sgd(n: int, steps: int, noise: float) -> Tensor:
    gradient, _ = quadratic(n, D, noise=noise)
    w = members(1, [(D,)])[0].flat()
    for k in range(1, steps + 1):
        w = w - schedule(k) * sum(gradient(r, k, w) for r in range(n)) / n
    return w


@pytest.mark.few(4)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("compress", ["update", "gradient"])
@pytest.mark.parametrize(("n", "carrier"), [(1, "virtual"), (2, "virtual"), (4, "virtual"), (3, "real")])
def test_with_whole_numbers_it_is_synchronous_sgd(n: int, compress: str, form: str, carrier: str) -> None:
    some = world(n, "always", compressor="none", compress=compress, form=form, carrier=carrier)
    torch.testing.assert_close(some[0].weights[-1], exact_sgd(n, 60, 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_warm_up_takes_the_steps_of_synchronous_sgd(rule: str) -> None:
    """While it lasts; then signs begin, with nothing held back."""
    some = world(3, rule, warm_up=20)
    torch.testing.assert_close(some[0].weights[19], exact_sgd(3, 20, 0.5), rtol=1e-12, atol=1e-12)
    assert not (some[0].weights[-1] - exact_sgd(3, 60, 0.5)).abs().max() < 1e-6
    assert all(torch.equal(m.weights[-1], some[0].weights[-1]) for m in some)


def test_who_hears_a_part_late_has_those_that_came_early_to_the_warm_up() -> None:
    """Ranks 0 and 2 do not hear each other's part of the last whole round for a second; rank 1 hears both, goes on."""
    ends = []
    for seconds in (0.0, 1.0):
        some = members(3, [(D,)], form="gather", warm_up=2, **SMALL)
        virtual = VirtualCluster(3, patience=5.0, limit=20.0)
        if seconds:
            virtual.cut(0, 2, seconds=seconds, at=0.03)
        virtual.run({c.me: life(some[c.me], c, quadratic(3, D)[0], steps=6) for c in virtual.carriers})
        assert (virtual.time > 1.0) == bool(seconds)
        ends.append(some[0].flat())
    assert torch.equal(*ends)


@pytest.mark.parametrize("carrier", LIVES)
def test_without_a_bar_every_rank_sends_whenever_anything_changed(carrier: str) -> None:
    always, lazy = world(3, "always", steps=30), world(3, "accumulate", threshold=0.0, steps=30, carrier=carrier)
    assert torch.equal(always[0].weights[-1], lazy[0].weights[-1])


@pytest.mark.few(3)
@pytest.mark.parametrize("carrier", LIVES)
@pytest.mark.parametrize("rule", ["accumulate", "paper", "innovation"])
def test_over_a_bar_that_nobody_reaches_the_clock_alone_sends(rule: str, carrier: str) -> None:
    some = world(3, rule, threshold=1e30, carrier=carrier)
    fired = some[0].algorithm.trigger.fired
    assert fired["trigger"] == 0
    assert fired["clock"] == (60 - 5 + 1) // 4  # first rounds aside: one in max_skip + 1, said one round ahead
    assert fired["skipped"] == 60 - 5 + 1 - fired["clock"]


@pytest.mark.parametrize("carrier", LIVES)
@pytest.mark.parametrize("rule", ["accumulate", "paper", "innovation"])
def test_no_rank_is_silent_for_longer_than_max_skip(rule: str, carrier: str) -> None:
    some = members(2, [(D,)], rule=rule, history=3, max_skip=2, threshold=2.0, **SMALL)
    sends: list[bool] = []
    begin = some[0].algorithm.begin

    def watched(*arguments: Any) -> None:
        begin(*arguments)
        decide = some[0].algorithm.trigger.decide

        def noted(*arguments: Any) -> bool:
            sends.append(decide(*arguments))
            return sends[-1]

        some[0].algorithm.trigger.decide = noted  # type: ignore[method-assign]

    some[0].algorithm.begin = watched  # type: ignore[method-assign]
    LIVES[carrier](some, quadratic(2, D, noise=0.2)[0], steps=40)
    silent = max(len(run) for run in "".join("+-"[not sent] for sent in sends).split("+"))
    assert silent == 2 if rule != "innovation" else silent <= 2


# -- convergence -------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(("form", "steps"), [("gather", 300), ("slices", 400)])
def test_innovation_converges_linearly(form: str, steps: int) -> None:
    """To the last bits of double precision, at a constant learning rate, with ranks that differ and stay silent."""
    knobs = {"rule": "innovation", "history": 5, "max_skip": 20, "threshold": 0.3, "block": 8, "min_size": 0}
    some = members(3, [(D,)], form=form, **knobs)
    gradient, best = quadratic(3, D)
    on_virtual(some, gradient, steps=steps, lr=lambda k: 0.2)
    assert (some[0].flat() - best).norm() < 1e-12 * best.norm()
    assert sum(one.algorithm.trigger.fired["skipped"] for one in some) > steps / 10


@pytest.mark.parametrize(("stretch", "within"), [(1.0, 0.05), (1.6, 0.1)])
def test_signs_with_feedback_come_close_where_the_ranks_differ(stretch: float, within: float) -> None:
    """Without momentum a larger scale only holds back more."""
    some = members(4, [(D,)], stretch=stretch, **SMALL)
    gradient, best = quadratic(4, D)
    on_virtual(some, gradient, steps=150, lr=lambda k: 0.5 / (1 + k / 10))
    assert (some[0].flat() - best).norm() < within * best.norm()


@pytest.mark.parametrize("carrier", LIVES)
def test_the_counter_example_to_signs_without_feedback(carrier: str) -> None:
    """Karimireddy et al. (2019): rare large gradients outweigh many small ones, and a plain sign does not see it.

    4 with a chance of 1/4, else -1: downhill is towards less, by 1/4 a step.
    """

    def gradient(rank: int, k: int, w: Tensor) -> Tensor:
        rare = torch.rand(8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) < 0.25
        return torch.where(rare, 4.0, -1.0).double()

    assert sum(gradient(0, k, torch.zeros(8)).sign().mean() for k in range(400)) < -100  # its signs point uphill
    some = members(2, [(8,)], block=8, min_size=0)
    start = some[0].flat()
    steps = 400 if carrier == "virtual" else 150
    LIVES[carrier](some, gradient, steps=steps, lr=lambda k: 0.01)
    assert (some[0].flat() - start).mean() < -0.7 * steps / 400


# -- silence costs no wait ---------------------------------------------------------------------------------------------

ROUND_TRIP = 0.05


@pytest.mark.parametrize(
    ("knobs", "step"),
    [
        ({"rule": "periodic"}, 0.001),
        ({"rule": "accumulate", "ahead": 1}, 0.03),
        ({"rule": "accumulate", "ahead": 6}, 0.005),
        ({"rule": "paper", "ahead": 1}, 0.03),
        ({"rule": "innovation", "ahead": 1}, 0.03),
    ],
)
def test_a_round_in_which_nobody_sends_costs_no_wait(knobs: dict[str, Any], step: float) -> None:
    """A message takes 25 ms: a silent round takes no longer than its computing, one that is sent two messages more."""
    max_skip, history = 7, 6
    some = members(3, [(D,)], form="slices", max_skip=max_skip, history=history, threshold=1e30, **SMALL, **knobs)
    wires = {"latency": ROUND_TRIP / 2, "jitter": 0.0}
    on_virtual(some, quadratic(3, D)[0], steps=80, seconds=lambda me, k: step, cluster=wires)
    for m in some:
        took = [b - a for a, b in itertools.pairwise(m.times[history:-1])]
        silent = [seconds for seconds in took if seconds < step + 1e-9]
        sent = [seconds for seconds in took if seconds >= step + 1e-9]
        assert len(silent) >= len(took) * max_skip // (max_skip + 1) - 1
        assert max(sent) <= step + ROUND_TRIP + 1e-6


def test_without_notice_every_round_waits_for_a_word() -> None:
    some = members(3, [(D,)], rule="accumulate", ahead=0, threshold=1e30, history=1, **SMALL)
    wires = {"latency": ROUND_TRIP / 2, "jitter": 0.0}
    on_virtual(some, quadratic(3, D)[0], steps=20, seconds=lambda me, k: 0.03, cluster=wires)
    assert min(b - a for a, b in itertools.pairwise(some[0].times[:-1])) > 0.03 + 0.9 * ROUND_TRIP / 2


def test_a_jitter_of_links_changes_no_weights() -> None:
    ends = []
    for seed in range(3):
        some = members(3, [(D,)], rule="accumulate", history=3, threshold=0.5, **SMALL)
        wires = {"latency": 0.02, "jitter": 5.0, "seed": seed, "bandwidth": 1e5}
        on_virtual(some, quadratic(3, D, noise=0.3)[0], steps=40, cluster=wires)
        ends.append(some[0].flat())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


# -- what is not a number, and what has no gradient --------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "always"])
def test_a_nan_of_a_tensor_that_travels_whole_stops_a_silent_round_too(rule: str, ahead: int) -> None:
    """Before it is kept at home, where it would stay for ever."""
    some = members(2, [(D,), (8,)], rule=rule, ahead=ahead, history=2, threshold=1e30, **{**SMALL, "min_size": 16})

    def gradient(rank: int, k: int, w: Tensor) -> Tensor:
        g = w.clone()
        if (rank, k) == (1, 5):
            g[D] = float("nan")
        return g

    with pytest.raises(RuntimeError, match="the update of rank 1 in round 5 has a NaN or an infinity"):
        on_virtual(some, gradient, steps=20)
    assert some[1].algorithm.signs.rest.vector.isfinite().all()
    assert some[1].algorithm.skipped > 0


@pytest.mark.few(4)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("compress", ["update", "gradient"])
@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_without_a_gradient_is_left_alone(rule: str, compress: str, form: str) -> None:
    """On no rank: the optimizer does not see it, so decay does not either. On one: all have the mean of all moves."""
    some = members(
        3,
        [(48,), (D,), (8,)],
        rule=rule,
        compress=compress,
        form=form,
        **{**SMALL, "min_size": 16, "history": 3, "max_skip": 2},
        optimizer=lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.5),
    )
    start = [p.detach().clone() for p in some[0].parameters]

    def lived(m: Member, carrier: Carrier) -> Program:
        def take_step(k: int) -> None:
            used = {1, 2} if m.rank == 0 else {1}  # of the last one rank 0 has gradients alone, of the first nobody
            for i, p in enumerate(m.parameters):
                p.grad = p.detach() - m.rank if i in used else None

        yield from train(
            m.algorithm,
            m.replica,
            carrier,
            steps=12,
            take_step=take_step,
            optimizer_step=m.optimizer.step,
            seconds=lambda me, k: 0.02,
            rounds=Rounds(carrier),
        )
        if compress == "gradient":
            assert m.parameters[0].grad is None

    virtual = VirtualCluster(3, patience=5.0)
    virtual.run({c.me: lived(some[c.me], c) for c in virtual.carriers})
    for m in some:
        assert torch.equal(m.parameters[0], start[0])
        assert not torch.equal(m.parameters[1], start[1])
        assert not torch.equal(m.parameters[2], start[2])
        assert torch.equal(m.flat(), some[0].flat())


# -- those who end early or die ----------------------------------------------------------------------------------------


def test_a_rank_that_ends_early_stops_the_others_with_a_sentence() -> None:
    some, gradient = members(3, [(D,)], **SMALL), quadratic(3, D)[0]
    virtual = VirtualCluster(3, patience=5.0)
    lives = {c.me: life(some[c.me], c, gradient, steps=20 - 5 * (c.me == 1)) for c in virtual.carriers}
    with pytest.raises(RuntimeError, match=r"rank 1 has no more batches.*balance='equal'"):
        virtual.run(lives)


def test_silent_ranks_that_meet_after_different_rounds_are_told() -> None:
    some, gradient = members(2, [(D,)], rule="periodic", max_skip=50, **SMALL), quadratic(2, D)[0]
    virtual = VirtualCluster(2, patience=5.0)
    lives = {c.me: life(some[c.me], c, gradient, steps=20 + c.me) for c in virtual.carriers}
    with pytest.raises(RuntimeError, match=r"different numbers of rounds \(rank 0 after 20, rank 1 after 21\)"):
        virtual.run(lives)


@pytest.mark.parametrize("rule", ["always", "accumulate"])
def test_a_rank_that_dies_stops_the_others_with_a_sentence(rule: str) -> None:
    some, gradient = members(3, [(D,)], rule=rule, **SMALL), quadratic(3, D)[0]
    virtual = VirtualCluster(3, patience=5.0)
    virtual.kill(2, at=0.3)
    with pytest.raises(RuntimeError, match="rank 2 is gone, and lazy_sign cannot go on without it"):
        virtual.run({c.me: life(some[c.me], c, gradient, steps=200) for c in virtual.carriers})
