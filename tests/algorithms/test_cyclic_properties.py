"""What cyclic updates promise, on the virtual cluster and on real links: the same programs, the same assertions.

1 alone: plain training, to the bit        5 with weights that stand still: the mean of all gradients, by batches
2 strict, one batch a push: 0, 1, .., n-1  6 from the order of the pushes alone: the same weights, to the bit
3 what is pushed is what was computed      7 on a quadratic: down to the floor of its noise
4 strict: delay <= n - 1, count <= bound, versions count pushes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.server_groups import Groups
from lightning_async.algorithms.server_step import ServerStep
from lightning_async.algorithms.training import Trained
from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from lightning_async.transport.virtual import VirtualCluster
from tests.algorithms.turn_world import SIZE, STEP, TARGETS, TOKENS, Member, consensus, pushes, sgd
from tests.transport.cluster_world import ClusterWorld

CARRIERS = ["virtual", "real"]
Compute = Callable[[Member, int], None]


def fit(
    carrier: str,
    n: int,
    *,
    steps: int | list[int] = 40,
    counting: bool = False,
    compute: Compute = Member.compute,
    shrink: Any = None,
    **knobs: Any,
) -> tuple[list[Member], dict[int, Trained]]:
    """Members that train for so many steps, and meet."""
    members = [Member(rank, counting=counting, **knobs) for rank in range(n)]
    each = steps if isinstance(steps, list) else [steps] * n
    for member in members if shrink is not None else ():
        member.algorithm.shrink = shrink
    world = VirtualCluster(n, latency=0.004, jitter=1.0) if carrier == "virtual" else ClusterWorld(n, silence=60.0)
    programs = {
        m.rank: m.life(world.carriers[m.rank], each[m.rank], STEP, lambda step, m=m: compute(m, step)) for m in members
    }
    if isinstance(world, VirtualCluster):
        return members, world.run(programs)
    return members, _on_links(world, programs)


def _on_links(world: ClusterWorld, programs: Mapping[int, Any]) -> dict[int, Trained]:
    going, ended = dict(programs), dict[int, Trained]()

    def advance() -> bool:
        for rank in list(going):
            try:
                next(going[rank])
            except StopIteration as end:
                ended[rank] = end.value
                del going[rank]
        return not going

    world.until(advance, limit=60)
    world.close()
    return ended


# -- 1 -----------------------------------------------------------------------------------------------------------------

MAKERS = {"sgd": sgd(), "momentum": sgd(momentum=0.9, nesterov=True), "adamw": lambda p: optim.AdamW(p, 0.01)}


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("carrier", CARRIERS)
def test_1_alone_it_is_plain_training_to_the_bit_with_the_same_optimizer_state(
    carrier: str, make: Any, token: Any
) -> None:
    (member,), trained = fit(carrier, 1, make_optimizer=make, token=token, shards=1, max_accumulate=1)
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    plain = make([parameter])
    for _ in range(trained[0].steps):
        parameter.grad = parameter.detach() - TARGETS[0]
        plain.step()
    assert torch.equal(consensus(trained), parameter)
    (state,) = plain.state.values() or [{}]
    theirs = [one for one in state.values() if isinstance(one, Tensor) and one.shape == parameter.shape]
    image = member.algorithm.state_dict()["images"]
    for tensor in theirs:  # they stand in the shard's image, behind its weights
        assert tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() in image.numpy().tobytes()


# -- 2, 3, 4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_2_strict_with_one_batch_a_push_goes_round_and_each_push_is_n_minus_1_late(carrier: str, n: int) -> None:
    _, trained = fit(carrier, n, token="strict", shards=1, max_accumulate=1)
    found = pushes(trained)[: 30 * n]  # before any member is through
    assert [rank for rank, _ in found] == [k % n for k in range(len(found))]
    assert {a.delay for _, a in found[n:]} == {n - 1}
    assert {a.samples for _, a in found} == {1}


@pytest.mark.parametrize("push", ["gradient", "delta"])
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_3_what_was_pushed_is_what_was_computed(carrier: str, token: Any, push: Any) -> None:
    knobs: dict[str, Any] = {"counting": True, "make_optimizer": sgd(1.0), "push": push}
    members, trained = fit(carrier, 3, steps=[40, 31, 17], token=token, **knobs)
    for member in members:
        assert 3 * consensus(trained)[member.rank].item() == pytest.approx(member.computed, rel=1e-12)
        assert 3 * consensus(trained)[16 + member.rank].item() == pytest.approx(member.computed, rel=1e-12)


@pytest.mark.parametrize("bound", [1, 3])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_4_strict_keeps_its_bounds_and_versions_count_pushes(carrier: str, bound: int) -> None:
    n = 4
    _, trained = fit(carrier, n, steps=[40, 30, 20, 10], token="strict", shards=1, max_accumulate=bound)
    found = [arrival for _, arrival in pushes(trained)]
    assert max(a.delay for a in found) <= n - 1
    assert max(a.samples for a in found) <= bound
    assert [a.folded for a in found] == list(range(len(found)))


# -- 5 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_5_with_weights_that_stand_still_the_applied_gradients_have_the_mean_of_all(carrier: str, token: Any) -> None:
    seen: list[tuple[Tensor, int]] = []

    def shrink(arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
        seen.append((correction.clone(), arrival.samples))
        return 1.0

    def compute(member: Member, step: int) -> None:
        member.computed += 1
        member.parameter.grad = TARGETS[member.rank] * step

    steps = [24, 16, 8]
    _, trained = fit(
        carrier, 3, steps=steps, compute=compute, shrink=shrink, token=token, shards=1, make_optimizer=sgd(0.0)
    )
    assert torch.equal(consensus(trained), torch.zeros(SIZE, dtype=torch.float64))
    applied = torch.stack([one for one, _ in seen]).sum(0) / sum(count for _, count in seen)
    mean = sum(TARGETS[r] * k for r, last in enumerate(steps) for k in range(1, last + 1)) / sum(steps)
    torch.testing.assert_close(applied, mean, rtol=1e-12, atol=1e-12)


# -- 6 -----------------------------------------------------------------------------------------------------------------


def _again(n: int, make: Any, order: list[tuple[int, Arrival]]) -> Tensor:
    """What one process makes of (member, base, count) alone."""
    whole = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    weights = torch.zeros(SIZE, dtype=torch.float64)
    server, at = ServerStep(weights, Groups(make([whole]), [(whole, 0)])), [weights.clone()]
    last: dict[int, int] = {}
    for rank, push in order:
        gradients = torch.zeros(SIZE, dtype=torch.float64)
        for _ in range(push.samples):
            gradients.add_(at[push.base] - TARGETS[rank])
        last[rank] = push.samples
        among = n * len(last) / sum(map(float, last.values()))
        server.arrive(weights, gradients, 1 / n, n, share=push.samples / n, among=among)
        at.append(weights.clone())
    return weights


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("carrier", CARRIERS)
def test_6_from_the_order_of_the_pushes_alone_come_the_same_weights_to_the_bit(carrier: str, make: Any) -> None:
    _, trained = fit(carrier, 3, steps=[40, 30, 20], make_optimizer=make, token="strict", shards=1)
    order = pushes(trained)
    assert Counter(rank for rank, _ in order).keys() == {0, 1, 2}
    assert torch.equal(_again(3, make, order), consensus(trained))


# -- 7 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("push", ["gradient", "delta"])
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_7_on_a_quadratic_it_goes_down_to_the_floor_of_its_noise(carrier: str, token: Any, push: Any) -> None:
    """L = 1 and a delay of at most n - 1: any learning rate below 1 / (2 n - 1) will do (Agarwal and Duchi 2011).

    Steps that take no time add up without end on links, while a token is on its way; no theorem bears that.
    """
    n, noise, sigma = 3, torch.Generator().manual_seed(7), 0.03
    lr = 0.9 / (2 * n - 1)

    def compute(member: Member, step: int) -> None:
        jitter = sigma * torch.randn(SIZE, dtype=torch.float64, generator=noise)
        member.parameter.grad = member.parameter.detach() - TARGETS[0] + jitter

    make = sgd(lr)
    _, trained = fit(
        carrier, n, steps=120, compute=compute, token=token, push=push, make_optimizer=make, max_accumulate=n
    )
    begin, end = TARGETS[0].square().mean(), (consensus(trained) - TARGETS[0]).square().mean()
    assert end < 1e-3 * begin
    assert end < 2 * sigma**2 * lr / n + 1e-6  # on links the draws meet in any order: every order must pass
