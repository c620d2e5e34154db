"""What a run says before its first step that it will hold and send is what it then holds and sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, LazySignStrategy
from lightning_async.algorithms.pairwise import ANSWER, ASK
from lightning_async.algorithms.shards import ANSWER as SERVED
from lightning_async.algorithms.shards import PUSH
from lightning_async.transport.mail import CONTRIBUTION, RESULT
from tests.strategies.ranks import run
from tests.strategies.weighing import Weighed, weigh

CASES: dict[str, tuple[int, Callable[[], Any]]] = {
    "pairwise, 2": (2, GossipRingStrategy),
    "pairwise, 3": (3, GossipRingStrategy),
    "pairwise, bf16": (3, lambda: GossipRingStrategy(wire="bf16")),
    "pairwise, exponential": (4, lambda: GossipRingStrategy(topology="exponential")),
    "push_sum": (3, lambda: GossipRingStrategy(mode="push_sum")),
    "sync": (3, lambda: GossipRingStrategy(mode="sync")),
    "none": (2, lambda: GossipRingStrategy(mode="none")),
    "async_global": (3, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal")),
    "async_global, bf16": (2, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal", wire="bf16")),
    "async_global, sign": (2, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal", wire="sign")),
    "async_global, momentum": (2, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal", outer_momentum=0.9)),
    "async_global, sync": (3, lambda: AsyncGlobalStrategy(mode="sync", local_steps=4)),
    "cyclic_delay": (3, CyclicDelayStrategy),
    "cyclic_delay, delta": (2, lambda: CyclicDelayStrategy(push="delta")),
    "lazy_sign, gather": (2, LazySignStrategy),
    "lazy_sign, slices": (3, LazySignStrategy),
    "lazy_sign, innovation": (3, lambda: LazySignStrategy(rule="innovation")),
    "lazy_sign, deadline": (3, lambda: LazySignStrategy(deadline=1.0)),
    "lazy_sign, warm_up": (2, lambda: LazySignStrategy(warm_up=1000)),
    "lazy_sign, whole": (2, lambda: LazySignStrategy(compressor="none")),
}
ADAM = {"pairwise, 2", "cyclic_delay", "cyclic_delay, delta"}
ROUNDED = {"async_global, bf16", "async_global, sign"}
"""The last answers before a meeting are as long as the weights there, so their mean says nothing of the others."""


def exchanged(weighed: Weighed, case: str) -> float:
    """The bytes of one exchange: of gossip to one peer, whoever's turn it is; else to all."""
    kinds = {CONTRIBUTION + 2, RESULT + 2} if case == "async_global, sync" else {ASK, ANSWER}
    if case.startswith(("async_global", "cyclic_delay")) and case != "async_global, sync":
        kinds = {PUSH} if case in ROUNDED else {PUSH, SERVED}
    sizes = {kind: [size / n for (_, k), (n, size) in weighed.sent.items() if k == kind] for kind in kinds}
    turns = case.startswith("p")  # pairwise, push_sum
    return sum(sum(each) / (len(each) if turns else 1) for each in sizes.values() if each)


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES)
def test_a_member_holds_and_sends_what_it_says(case: str) -> None:
    members, make = CASES[case]
    found = run(members, weigh, make, torch.optim.Adam if case in ADAM else torch.optim.SGD)
    said = found[0].said
    assert max(one.held for one in found) == pytest.approx(said.device + said.host, rel=0.05)
    if case in ROUNDED:
        answers = found[0].weights / members / 2
        assert exchanged(found[0], case) + answers == pytest.approx(said.wire, rel=0.05)
    else:
        assert exchanged(found[0], case) == pytest.approx(said.wire, rel=0.05)
