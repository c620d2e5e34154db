"""Nodes with unlike numbers of devices: who is who, what fits together, and members of unlike size."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, UnevenNodesEnvironment
from lightning_async.strategies.members import ranks_of_members, sizes
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer, weights
from tests.strategies.ranks import run
from tests.strategies.test_two_layers import Plain, Watches

NODES = [2, 1]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with", "ignore:.*not resumable")
KINDS: dict[str, Any] = {
    "gossip_ring": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": CyclicDelayStrategy,
}


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No launcher."""
    for name in (*TORCHRUN, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def torchrun(patch: pytest.MonkeyPatch, rank: int, nodes: list[int]) -> None:
    """What torchrun sets on this rank."""
    for name, value in variables(rank, nodes).items():
        patch.setenv(name, value)


def variables(rank: int, nodes: list[int]) -> dict[str, str]:
    node = next(k for k in range(len(nodes)) if rank < sum(nodes[: k + 1]))
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": sum(nodes),
        "LOCAL_RANK": rank - sum(nodes[:node]),
        "LOCAL_WORLD_SIZE": nodes[node],
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": len(nodes),
    }
    return {name: str(number) for name, number in numbers.items()}


# -- who is who --------------------------------------------------------------------------------------------------------


def place(environment: UnevenNodesEnvironment) -> tuple[int, ...]:
    e = environment
    return e.global_rank(), e.world_size(), e.local_rank(), e.node_rank(), e.devices, e.num_nodes


@pytest.mark.parametrize("nodes", [None, [4, 2]])
def test_torchrun_says_who_each_is(nodes: list[int] | None, nobody: pytest.MonkeyPatch) -> None:
    torchrun(nobody, 5, [4, 2])
    environment = UnevenNodesEnvironment(nodes)
    environment.validate_settings(2, 2)
    environment.set_global_rank(1 * 2 + 1)
    environment.set_world_size(2 * 2)
    assert place(environment) == (5, 6, 1, 1, 2, 2)
    assert environment.creates_processes_externally


def test_a_list_says_it_where_lightning_starts_the_ranks_of_a_node(nobody: pytest.MonkeyPatch) -> None:
    environment = UnevenNodesEnvironment([4, 2, 3])
    assert place(environment) == (0, 9, 0, 0, 4, 3)
    assert not environment.creates_processes_externally
    nobody.setenv("NODE_RANK", "2")
    nobody.setenv("LOCAL_RANK", "1")
    nobody.setenv("WORLD_SIZE", "9 of Lightning's, a product")
    assert place(environment) == (7, 9, 1, 2, 3, 3)
    assert environment.creates_processes_externally


@pytest.mark.parametrize(
    ("nodes", "told", "sentence"),
    [
        ([4, 3], (2, 2), "`devices_per_node=[4, 3]` makes 7 ranks, and torchrun started 6"),
        ([2, 4], (2, 2), "gives node 1 4 ranks from rank 2 on, and there torchrun started 2 from rank 4 on"),
        ([1, 2, 3], (2, 2), "gives node 1 2 ranks from rank 1 on, and there torchrun started 2 from rank 4 on"),
        ([6], (2, 2), "`devices_per_node=[6]` has 1 nodes, and this is node number 1"),
        (None, (4, 2), "the Trainer of node 1 has devices=4, and UnevenNodesEnvironment knows of 2"),
        ([4, 2], (2, 1), "the Trainer of node 1 has num_nodes=1, and UnevenNodesEnvironment knows of 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    nodes: list[int] | None, told: tuple[int, int], sentence: str, nobody: pytest.MonkeyPatch
) -> None:
    torchrun(nobody, 5, [4, 2])
    with pytest.raises(MisconfigurationException, match=re.escape(sentence)):
        UnevenNodesEnvironment(nodes).validate_settings(*told)


def test_without_torchrun_there_must_be_a_list(nobody: pytest.MonkeyPatch) -> None:
    environment = UnevenNodesEnvironment()
    for ask in (environment.world_size, environment.global_rank, lambda: environment.validate_settings(1, 1)):
        with pytest.raises(MisconfigurationException, match="start the ranks by torchrun, or give"):
            ask()
    nobody.setenv("NODE_RANK", "2")
    with pytest.raises(MisconfigurationException, match="has 2 nodes, and this is node number 2: NODE_RANK counts from 0"):
        UnevenNodesEnvironment([4, 2]).node_rank()


@pytest.mark.parametrize("nodes", [[], [2, 0], [2, True], "42", 4, [2.0]])
def test_a_list_of_what_is_no_number_of_devices(nodes: Any) -> None:
    with pytest.raises(ValueError, match="`devices_per_node` must be a list of integers of at least 1, one a node"):
        UnevenNodesEnvironment(nodes)


def test_members_go_by_where_their_ranks_are() -> None:
    assert ranks_of_members("node", None, [0, 0, 0, 0, 1, 1]) == ((0, 1, 2, 3), (4, 5))
    assert ranks_of_members("node", None, [3, 1, 3, 1]) == ((0, 2), (1, 3)), "dealt out in turn, as mpirun may"
    assert ranks_of_members(None, None, range(3)) == ((0,), (1,), (2,))
    assert [sizes(m) for m in (((0,), (1,)), ((0, 1), (2, 3)), ((0, 1), (2,)))] == [
        "",
        " of 2 ranks each",
        " of 2 and 1 ranks",
    ]


# -- a run -------------------------------------------------------------------------------------------------------------


def on_nodes(nodes: list[int] | None, told: bool, strategy: Any, **options: Any) -> L.Trainer:
    """This rank's Trainer, as torchrun started it on two nodes, which are this host."""
    os.environ |= {**variables(int(os.environ["RANK"]), NODES), "GLOO_SOCKET_IFNAME": "lo"}
    environment = UnevenNodesEnvironment(nodes)
    if told:
        options["plugins"] = [environment]
    else:
        strategy.cluster_environment = environment
    return trainer(environment.devices, num_nodes=environment.num_nodes, strategy=strategy, **options)


class Sees(L.Callback):
    """What a rank takes itself for."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        siblings = strategy.office.siblings
        self.seen = {
            "rank": (trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size),
            "members": strategy.members,
            "mine": (trainer.global_rank,) if siblings is None else siblings.ranks,
            "sampler": trainer.distributed_sampler_kwargs,
            "steps": trainer.estimated_stepping_batches,
            "mass": strategy.feeding.mass,
            "line": strategy._first_line(),
        }

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen["accounts"] = trainer.strategy.accounts()  # type: ignore[attr-defined]


def _fit(of: str, knobs: dict[str, Any], nodes: list[int] | None, told: bool, options: dict[str, Any]) -> Any:
    sees, watches = Sees(), Watches()
    strategy = KINDS[of](**knobs)
    t = on_nodes(nodes, told, strategy, callbacks=[sees, watches], **options)
    t.fit(lit := Lit(), loader(shuffle=False), loader(40, shuffle=False))
    ends = {"weights": weights(lit), "seen": lit.seen, "prints": watches.prints, "step": t.global_step}
    return sees.seen | ends | {"val": float(t.callback_metrics["val"]), "own": strategy.steps}


@pytest.mark.parametrize(("nodes", "told"), [(None, True), (NODES, False)])
def test_every_rank_of_two_and_one_is_a_member(nodes: list[int] | None, told: bool) -> None:
    ends = run(3, _fit, "gossip_ring", {}, nodes, told, {})
    assert [end["rank"] for end in ends] == [(0, 0, 0, 3), (1, 1, 0, 3), (2, 0, 1, 3)]
    assert [end["sampler"] for end in ends] == [{"num_replicas": 3, "rank": r} for r in range(3)]
    assert {end["members"] for end in ends} == {3}
    assert Counter(i for end in ends for i in end["seen"]) == dict.fromkeys(range(240), 2)
    assert all(end["weights"] == ends[0]["weights"] and end["val"] == ends[0]["val"] for end in ends)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("of", "knobs"),
    [
        ("gossip_ring", {}),
        ("gossip_ring", {"mode": "push_sum"}),
        ("gossip_ring", {"mode": "none"}),
        ("gossip_ring", {"balance": "equal"}),
        ("gossip_ring", {"balance": "incremental"}),
        ("async_global", {}),
        ("async_global", {"at_meeting": "keep"}),
        ("cyclic_delay", {}),
        ("cyclic_delay", {"push": "delta"}),
    ],
    ids=str,
)
def test_nodes_are_members_of_unlike_size(of: str, knobs: dict[str, Any]) -> None:
    ends = run(3, _fit, of, {"inner": "node", **knobs}, None, True, {})
    assert [end["mine"] for end in ends] == [(0, 1), (0, 1), (2,)]
    assert {end["members"] for end in ends} == {2}
    assert "2 members of 2 and 1 ranks, " in ends[0]["line"]
    assert ends[0]["prints"] == ends[1]["prints"] != ends[2]["prints"]
    assert ends[0]["mass"] == ends[1]["mass"] == 2 * ends[2]["mass"], "a batch of two ranks has twice the samples"
    seen = Counter(index for end in ends for index in end["seen"])
    assert set(seen) == set(range(240))
    assert knobs.get("balance") == "incremental" or set(seen.values()) == {2}
    assert len(ends[0]["seen"]) == len(ends[1]["seen"])
    assert all(end["weights"] == ends[0]["weights"] and end["val"] == ends[0]["val"] for end in ends)
    assert {end["steps"] for end in ends} == {end["step"] for end in ends} == {2 * 240 // 12}, "3 ranks of 4 samples"
