"""What a run says before its first step that it will hold and send is what it then holds and sends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_async import (
    AsyncGlobalStrategy,
    CyclicDelayStrategy,
    DelayedPipelineStrategy,
    GossipRingStrategy,
    LazySignStrategy,
)
from lightning_async.algorithms.gossip import Mode
from lightning_async.algorithms.pairwise import ANSWER, ASK
from lightning_async.algorithms.shards import ANSWER as SERVED
from lightning_async.algorithms.shards import PUSH
from lightning_async.strategies import refusals
from lightning_async.strategies.account import Account, Model, account, model_of, short, staged, wider_state
from lightning_async.strategies.first_line import learning
from lightning_async.strategies.waiting import PeerFailedError
from lightning_async.transport.cluster import PIECE, link_bytes, piece_of
from lightning_async.transport.mail import CONTRIBUTION, FIRST_FREE_KIND, LONGEST, RESULT
from lightning_async.transport.pieces import LEAST
from tests.strategies.ranks import run
from tests.strategies.weighing import Weighed, weigh

STAGING = 2_000_000
"""Bytes a link, in place of 17.8 MB: with two of them a member of this test holds a third less."""
CASES: dict[str, tuple[int, Callable[[], Any]]] = {
    "pairwise, 2": (2, GossipRingStrategy),
    "pairwise, 3": (3, GossipRingStrategy),
    "pairwise, bf16": (3, lambda: GossipRingStrategy(wire="bf16")),
    "pairwise, staging": (3, lambda: GossipRingStrategy(staging=STAGING)),
    "pairwise, exponential": (4, lambda: GossipRingStrategy(topology="exponential")),
    "push_sum": (3, lambda: GossipRingStrategy(mode="push_sum")),
    "sync": (3, lambda: GossipRingStrategy(mode="sync")),
    "none": (2, lambda: GossipRingStrategy(mode="none")),
    "pairwise, inner": (4, lambda: GossipRingStrategy(inner_size=2)),
    "async_global": (3, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal")),
    "async_global, bf16": (2, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal", wire="bf16")),
    "async_global, sign": (2, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal", wire="sign")),
    "async_global, momentum": (2, lambda: AsyncGlobalStrategy(local_steps=4, balance="equal", outer_momentum=0.9)),
    "async_global, sync": (3, lambda: AsyncGlobalStrategy(mode="sync", local_steps=4)),
    "cyclic_delay": (3, lambda: CyclicDelayStrategy(push="gradient")),
    "cyclic_delay, delta": (2, CyclicDelayStrategy),
    "lazy_sign, gather": (2, LazySignStrategy),
    "lazy_sign, slices": (3, LazySignStrategy),
    "lazy_sign, innovation": (3, lambda: LazySignStrategy(rule="innovation")),
    "lazy_sign, deadline": (3, lambda: LazySignStrategy(deadline=1.0)),
    "lazy_sign, warm_up": (2, lambda: LazySignStrategy(warm_up=1000)),
    "lazy_sign, whole": (2, lambda: LazySignStrategy(compressor="none")),
}
ADAM = {"pairwise, 2", "cyclic_delay", "cyclic_delay, delta"}
WARM = {"lazy_sign, warm_up"}
"""It tells what is sent behind the warm-up; this run is all warm-up, in which whole numbers are sent."""
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


@pytest.mark.few(1)
@pytest.mark.parametrize("case", CASES)
def test_a_member_holds_and_sends_what_it_says(case: str) -> None:
    members, make = CASES[case]
    found = run(members, weigh, make, torch.optim.Adam if case in ADAM else torch.optim.SGD)
    said = found[0].said
    assert max(one.held for one in found) == pytest.approx(said.device + said.host, rel=0.05)
    if case in ROUNDED:
        answers = found[0].weights / members / 2
        assert exchanged(found[0], case) + answers == pytest.approx(said.wire, rel=0.05)
    elif case in WARM:
        assert exchanged(found[0], case) == pytest.approx(found[0].weights, rel=0.05)
    else:
        assert exchanged(found[0], case) == pytest.approx(said.wire, rel=0.05)


@pytest.mark.few(0)
@pytest.mark.parametrize("mode", ["pairwise", "none"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_half_precision_weights_are_stepped_in_float32_which_is_counted(optimizer: Any, mode: str) -> None:
    """The vector beside them, Adam's two moments in twice as many bytes, and the third where steps are averaged."""
    members = partial(GossipRingStrategy, mode=mode)  # type: ignore[arg-type]
    found = run(2, weigh, members, optimizer, "bf16-true")
    said, w = found[0].said, found[0].weights
    moments = (2 / 2 + (mode != "none")) if optimizer is torch.optim.Adam else 0
    assert said.device == pytest.approx((1 + moments + (mode != "none")) * w, rel=0.01)
    assert max(one.held for one in found) == pytest.approx(said.device + said.host, rel=0.05)


@pytest.mark.few(0)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_cut_is_counted_with_what_optimizers_remember(optimizer: Any, tmp_path: Path) -> None:
    """From the first cut on, where the first rank writes it: three vectors and the sum in double precision."""
    folder = str(tmp_path)
    first, *_ = run(3, weigh, partial(GossipRingStrategy, saves="cut", mode="none"), optimizer, "32-true", folder)
    assert first.held == pytest.approx(first.said.device + first.said.host, rel=0.05)
    without = run(3, weigh, partial(GossipRingStrategy, mode="none"), optimizer)[0].said
    moments = 2 * (optimizer is torch.optim.Adam)
    assert first.said.host - without.host == pytest.approx((6 + moments) * first.weights, rel=0.01)


def test_an_optimizer_that_cannot_be_asked_what_it_remembers_is_counted_as_if_it_remembered_nothing() -> None:
    class Asks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise LookupError("a table of the user's")

    parameters = [torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16)), torch.nn.Parameter(torch.zeros(3))]
    assert wider_state(Asks(parameters, lr=0.1, momentum=0.9), torch.float32) == 0
    assert wider_state(torch.optim.SGD(parameters, lr=0.1), torch.float32) == 0
    assert wider_state(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), torch.float32) == 20
    assert wider_state(torch.optim.Adam(parameters), torch.float32) == 40


@pytest.mark.few(0)
@pytest.mark.parametrize("staging", [None, STAGING])
@pytest.mark.parametrize("semantics", ["stash", "recompute"])
def test_a_stage_holds_and_sends_what_it_says(semantics: Any, staging: int | None) -> None:
    found = run(3, weigh, lambda: DelayedPipelineStrategy(stages="net", semantics=semantics, staging=staging))
    assert "accumulate_grad_batches=4" in found[0].line
    for one in found:
        assert one.held == pytest.approx(one.said.device + one.said.host, rel=0.05)
        sizes = {
            peer: [size / n for (p, kind), (n, size) in one.sent.items() if p == peer and kind >= FIRST_FREE_KIND]
            for peer, _ in one.sent
        }
        assert sum(max(each, default=0) for each in sizes.values()) == pytest.approx(one.said.wire, rel=0.05)


SIZES: dict[str, Callable[[], Any]] = {
    "gossip_ring": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": partial(CyclicDelayStrategy, push="gradient"),
    "lazy_sign": LazySignStrategy,
}


class Allocates(TorchDispatchMode):
    """The longest tensor that was made, of those that are no mere sizes."""

    longest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, torch.Tensor) and not one.is_meta:
                self.longest = max(self.longest, one.numel())
        return found


BILLION: dict[str, Callable[..., Any]] = {
    **{f"gossip_ring {mode}": partial(GossipRingStrategy, mode=mode) for mode in get_args(Mode)},
    "async_global": AsyncGlobalStrategy,
    "async_global sync": partial(AsyncGlobalStrategy, mode="sync", local_steps=4),
    "cyclic_delay gradient": partial(CyclicDelayStrategy, push="gradient"),
    "cyclic_delay delta": CyclicDelayStrategy,
    "lazy_sign": LazySignStrategy,
    "lazy_sign deadline": partial(LazySignStrategy, deadline=1.0),
    "delayed_pipeline": partial(DelayedPipelineStrategy, stages="0"),
}


@pytest.mark.parametrize("name", BILLION)
def test_the_links_of_a_billion_parameters_fit_the_staging_that_was_given(name: str) -> None:
    """Beside what the method itself holds, whose rows are in the table, nothing grows with the model."""
    with Allocates() as made:
        with torch.device("meta"):
            module = torch.nn.Sequential(*(torch.nn.Linear(8192, 8192) for _ in range(15)))
        model = model_of(module.parameters())
        assert model.nbytes > 4e9
        said = [of_a_billion(BILLION[name](staging=staging), model) for staging in (STAGING, 2 * STAGING, None)]
    few, twice, usual = (one.host for one in said)
    ready = few - 3 * link_bytes(piece_of(STAGING), near=True)
    assert ready == twice - 3 * link_bytes(piece_of(2 * STAGING), near=True) == usual - 3 * link_bytes(PIECE, near=True)
    assert 3 * (STAGING - 4 * LEAST) < few - ready <= 3 * STAGING, "four pieces, in whole numbers of the shortest"
    assert len({(one.device, one.wire) for one in said}) == 1
    assert made.longest <= 1000, "told by sizes alone"


def of_a_billion(strategy: Any, model: Model) -> Account:
    """Four members, or stages, on one host."""
    piece = strategy.office.piece
    if isinstance(strategy, DelayedPipelineStrategy):
        sizes = {"held": 4, "semantics": strategy.semantics, "edges": [10**6] * 2}
        return staged(model.nbytes // 4, model.nbytes, 4, piece=piece, **sizes)  # type: ignore[arg-type]
    return account(strategy.algorithm, model, 4, piece=piece)


@pytest.mark.parametrize("staging", [0, 1_314_815, 2e6, True])
def test_less_than_a_link_needs_is_refused(staging: Any) -> None:
    assert link_bytes(LEAST, near=True) == 1_314_816
    with pytest.raises(ValueError, match="`staging` must be an integer of at least 1314816 "):
        GossipRingStrategy(staging=staging)


@pytest.mark.parametrize("name", SIZES)
def test_of_a_billion_parameters_it_says_what_the_table_says(name: str) -> None:
    """By a module on the meta device, for four members; `docs/launching.md` has the table."""
    with torch.device("meta"):
        module = torch.nn.Sequential(*(torch.nn.Linear(8192, 8192) for _ in range(15)))
    model = model_of(module.parameters(), remembered=1 if name == "cyclic_delay" else 0)
    w, n = sum(p.numel() for p in module.parameters()) * 4, 4
    assert w > 4e9
    s, r, links = w / 32, 4 * w * 3 / 4, 3 * 17.9e6
    device, host, wire = {
        "gossip_ring": (w, 2 * r + 4 * w, 2 * w),
        "async_global": (2 * w, r + 3 * w * 7 / 4 + 6 * w / 4, 2 * w * 3 / 4),
        "cyclic_delay": (4 * w, r + 3 * w * 7 / 4 + 6 * 2 * w / 4, 2 * w * 3 / 4),
        "lazy_sign": (2 * w + w / 4 + 3 * s, r + 4 * s * 3 / 4, 2 * s * 3 / 4),
    }[name]
    said = account(SIZES[name]().algorithm, model, n)
    assert said.device == pytest.approx(device, rel=0.05)
    assert said.host == pytest.approx(host + links, rel=0.05)
    assert said.wire == pytest.approx(wire, rel=0.05)


def test_the_first_line_says_it_all() -> None:
    line = run(2, weigh, GossipRingStrategy)[0].line
    assert "\n" not in line
    for words in (
        "gossip_ring: 2 members, ",
        "data by 'claim'",
        "what is later than 1000 steps is sent back",
        "a member holds 8.0",
        " MB in host memory, and sends 8.0",
        "every 2 steps",
        "no statistics",
    ):
        assert words in line


class Every:
    """As much of a Trainer as accumulates."""

    def __init__(self, every: int, scheduling: dict[int, int] | None = None) -> None:
        self.accumulate_grad_batches = every
        self.callbacks = [GradientAccumulationScheduler(scheduling)] if scheduling else []


LEARNING: list[tuple[int, Every, str, str, str]] = [
    (2, Every(1), "none", "none", "accumulate_grad_batches=2"),
    (4, Every(5), "none", "none", "accumulate_grad_batches=6"),
    (3, Every(1, {2: 3}), "none", "none", "accumulate_grad_batches=4"),
    (4, Every(6), "none", "none", ""),
    (3, Every(1, {0: 4}), "none", "none", ""),
    (3, Every(1), "predict", "none", ""),
    (3, Every(2), "none", "sync", ""),
]


@pytest.mark.parametrize(("stages", "every", "compensate", "baseline", "advice"), LEARNING)
def test_the_first_line_of_a_pipeline_says_with_what_it_learns(
    stages: int, every: Any, compensate: str, baseline: str, advice: str
) -> None:
    """Where gradients are more than an update late, and nothing is done about it."""
    said = learning(every, stages, compensate, baseline)
    assert advice in said
    assert bool(said) == bool(advice)


def test_bytes_for_people() -> None:
    assert [short(n) for n in (0, 999, 1000, 8_080_004, 999_900_000, 4e9)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "8.08 MB",
        "1 GB",
        "4 GB",
    ]


def too_long() -> str:
    refusals.LONGEST = 8_000_000  # type: ignore[attr-defined]  # for this forked process
    with pytest.raises((MisconfigurationException, PeerFailedError)) as refused:  # its own word, or the other's first
        weigh(GossipRingStrategy)
    weigh(lambda: GossipRingStrategy(wire="bf16"))
    return str(refused.value)


@pytest.mark.few(0)
def test_a_message_that_no_link_takes_is_refused_before_the_first_step() -> None:
    for said in run(2, too_long):
        assert "a message of 0.00805 GB would be sent, and a link takes up to 0.008 GB: halve it by wire='bf16'" in said


def test_a_billion_parameters_go_over_a_link_and_more_than_that_in_shards() -> None:
    billion = Model((10**9,))
    assert account(GossipRingStrategy().algorithm, billion, 4).longest == 4 * 10**9 < LONGEST
    more = Model((4 * 10**9,))
    for inner in (1, 2):
        assert account(GossipRingStrategy().algorithm, more, 8, inner=inner).longest > LONGEST
        assert account(AsyncGlobalStrategy().algorithm, more, 8, inner=inner).longest == 2 * 10**9


@pytest.mark.parametrize(("numbers", "whole"), [(10**9, 4 * 10**9), (4 * 10**9, LONGEST)])
def test_what_a_speaker_holds_for_its_siblings_is_what_the_table_says(numbers: int, whole: int) -> None:
    """A vector of gradients where the weights are, and in host memory, off the CPU, the same there."""
    method, model = AsyncGlobalStrategy().algorithm, Model((numbers,))
    plain, links = account(method, model, 8), link_bytes(PIECE, near=True)
    for inner in (2, 8):
        cpu, gpu = (account(method, model, 8, inner=inner, apart=apart) for apart in (False, True))
        assert cpu.device - plain.device == gpu.device - plain.device == model.nbytes
        part = min(whole, model.nbytes // inner)
        assert cpu.host - plain.host - (inner - 1) * links == (inner - 1) * (2 * whole + 3 * part)
        assert gpu.host - cpu.host == model.nbytes
