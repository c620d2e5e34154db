"""Nodes with unlike numbers of devices: who is who, what fits together, and members of unlike size."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from lightning_async import (
    AsyncGlobalStrategy,
    CyclicDelayStrategy,
    GossipRingStrategy,
    LazySignStrategy,
    SpeedFaults,
    UnevenNodesEnvironment,
    UnevenSLURMEnvironment,
)
from lightning_async.strategies import one_thread
from lightning_async.strategies.members import ranks_of_members, sizes
from tests.strategies.lit import INPUTS, Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run
from tests.strategies.test_two_layers import Plain, Watches
from tests.strategies.test_two_layers_ends import Does, die

NODES = [2, 1]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with", "ignore:.*not resumable")
KINDS: dict[str, Any] = {
    "gossip_ring": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": CyclicDelayStrategy,
    "lazy_sign": LazySignStrategy,
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


def test_what_torchrun_says_stays_when_a_stage_ends(nobody: pytest.MonkeyPatch) -> None:
    torchrun(nobody, 5, [4, 2])
    environment = UnevenNodesEnvironment()
    environment.teardown()
    assert place(environment) == (5, 6, 1, 1, 2, 2)


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
    with pytest.raises(
        MisconfigurationException, match="has 2 nodes, and this is node number 2: NODE_RANK counts from 0"
    ):
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


def slurm(patch: pytest.MonkeyPatch, rank: int, nodes: list[int], said: str, **more: str) -> None:
    """What srun sets on this task of a job without `--ntasks-per-node`."""
    for name, value in {**tasks(rank, nodes), "SLURM_STEP_TASKS_PER_NODE": said, **more}.items():
        patch.setenv(name, value)


def tasks(rank: int, nodes: list[int]) -> dict[str, str]:
    own = variables(rank, nodes)
    named = {"PROCID": "RANK", "NTASKS": "WORLD_SIZE", "LOCALID": "LOCAL_RANK", "NODEID": "GROUP_RANK"}
    return {f"SLURM_{name}": own[of] for name, of in named.items()} | {"SLURM_JOB_ID": "4711"}


@pytest.mark.parametrize(
    ("said", "nodes"),
    [("4(x2),3", [4, 4, 3]), ("2", [2]), ("3(x2)", [3, 3]), ("1,2(x3),1", [1, 2, 2, 2, 1])],
)
def test_slurm_says_how_many_tasks_each_node_has(said: str, nodes: list[int], nobody: pytest.MonkeyPatch) -> None:
    for rank in range(sum(nodes)):
        slurm(nobody, rank, nodes, said, SLURM_TASKS_PER_NODE="9(x9)", SLURM_NNODES="9")  # of the job; this is a step
        environment = UnevenSLURMEnvironment()
        environment.validate_settings(environment.devices, environment.num_nodes)
        mine = variables(rank, nodes)
        told = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
        assert place(environment) == tuple(int(mine[name]) for name in told)
        assert environment.creates_processes_externally
        assert environment.auto_requeue


def test_ranks_that_slurm_deals_out_in_turn_are_where_they_are(nobody: pytest.MonkeyPatch) -> None:
    """`--distribution=cyclic`: ranks 0, 2 and 3 are on the first node."""
    slurm(nobody, 3, [3, 1], "3,1", SLURM_LOCALID="2", SLURM_NODEID="0")
    assert place(UnevenSLURMEnvironment()) == (3, 4, 2, 0, 3, 2)


def test_the_first_rank_is_on_the_first_node_of_the_step(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("MASTER_ADDR", "put back afterwards")
    nobody.delenv("MASTER_ADDR")
    slurm(nobody, 0, [2, 1], "2,1", SLURM_NODELIST="a[1-9]", SLURM_STEP_NODELIST="a[4,7]")
    nobody.setenv("MASTER_PORT", "1")
    assert UnevenSLURMEnvironment().main_address == "a4"
    nobody.setenv("MASTER_ADDR", "given")
    assert UnevenSLURMEnvironment().main_address == "given"


@pytest.mark.parametrize(
    ("variables", "told", "sentence"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            (2, 2),
            "SLURM_STEP_TASKS_PER_NODE=2(x2) makes 4 tasks, and SLURM_NTASKS",
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "3"},
            (3, 1),
            "SLURM_STEP_TASKS_PER_NODE=3 has 1 nodes, and this is node number 1",
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "2;1"}, (1, 2), "SLURM_STEP_TASKS_PER_NODE=2;1 is not what SLURM writes"),
        ({}, (2, 2), "the Trainer of node 1 has devices=2, and UnevenSLURMEnvironment knows of 1"),
        ({}, (1, 3), "the Trainer of node 1 has num_nodes=3, and UnevenSLURMEnvironment knows of 2"),
    ],
)
def test_what_does_not_fit_what_slurm_started_is_refused(
    variables: dict[str, str], told: tuple[int, int], sentence: str, nobody: pytest.MonkeyPatch
) -> None:
    slurm(nobody, 2, NODES, "2,1", **variables)
    with pytest.raises(MisconfigurationException, match=re.escape(sentence)):
        UnevenSLURMEnvironment().validate_settings(*told)


def test_a_trainer_that_was_told_other_numbers_is_refused_before_it_waits(nobody: pytest.MonkeyPatch) -> None:
    slurm(nobody, 0, NODES, "2,1", GLOO_SOCKET_IFNAME="lo")
    t = trainer(1, num_nodes=2, strategy=GossipRingStrategy(), plugins=[UnevenSLURMEnvironment()])
    with pytest.raises(
        MisconfigurationException, match="of node 0 has devices=1, and UnevenSLURMEnvironment knows of 2"
    ):
        t.fit(Lit(), loader())


def test_without_srun_there_is_a_sentence(nobody: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        nobody.delenv(name)
    with pytest.raises(
        MisconfigurationException, match="SLURM_NTASKS is not set, as srun would: start the script by srun"
    ):
        UnevenSLURMEnvironment().world_size()


# -- a run -------------------------------------------------------------------------------------------------------------


def on_nodes(nodes: list[int] | None, how: str, strategy: Any, **options: Any) -> L.Trainer:
    """This rank's Trainer on one of two nodes, which are this host."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if how != "torchrun itself":
        os.environ |= variables(int(os.environ["RANK"]), NODES)
    if how == "by a list":
        os.environ["NODE_RANK"] = os.environ["GROUP_RANK"]
        for name in TORCHRUN:
            os.environ.pop(name) if name != "LOCAL_RANK" else None
    environment: UnevenNodesEnvironment | UnevenSLURMEnvironment = UnevenNodesEnvironment(nodes)
    if how == "SLURM":
        os.environ |= {**tasks(int(os.environ["RANK"]), NODES), "SLURM_STEP_TASKS_PER_NODE": "2,1"}
        for name in TORCHRUN:
            os.environ.pop(name)
        environment = UnevenSLURMEnvironment()
    if how == "by the strategy":
        strategy.cluster_environment = environment
    else:
        options["plugins"] = [environment]
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


def _fit(of: str, knobs: dict[str, Any], nodes: list[int] | None = None, how: str = "torchrun") -> dict[str, Any]:
    sees, watches = Sees(), Watches()
    strategy = KINDS[of](**knobs)
    t = on_nodes(nodes, how, strategy, callbacks=[sees, watches])
    t.fit(lit := Lit(), loader(shuffle=False), loader(40, shuffle=False))
    ends = {"weights": weights(lit), "seen": lit.seen, "prints": watches.prints, "step": t.global_step}
    return sees.seen | ends | {"val": float(t.callback_metrics["val"]), "own": strategy.steps}


@pytest.mark.few(0)
@pytest.mark.parametrize("nodes", [None, NODES])
@pytest.mark.parametrize("how", ["torchrun", "by the strategy"])
def test_every_rank_of_two_and_one_is_a_member(nodes: list[int] | None, how: str) -> None:
    are_members(run(3, _fit, "gossip_ring", {}, nodes, how))


@pytest.mark.few(0)
@pytest.mark.parametrize("of", ["gossip_ring", "lazy_sign"])
def test_and_so_it_is_by_a_list_alone(of: str) -> None:
    are_members(run(3, _fit, of, {}, NODES, "by a list"))


@pytest.mark.few(0)
def test_under_slurm_nodes_are_members_of_unlike_size() -> None:
    are_two(run(3, _fit, "gossip_ring", {"inner": "node"}, None, "SLURM"), {})


def _stages(how: str, folder: str) -> tuple[Any, ...]:
    """What one Trainer does, one thing after the other."""
    t = on_nodes(NODES, how, GossipRingStrategy(), max_epochs=1)
    t.fit(lit := Lit(), loader(), held := loader(40, shuffle=False))
    fitted = float(t.callback_metrics["val"])
    (validated,) = t.validate(lit, held, verbose=False)
    t.save_checkpoint(f"{folder}/end.ckpt")
    t.fit_loop.max_epochs = 2
    t.fit(lit, loader(), held)
    return fitted, validated["val"], t.world_size, t.current_epoch


@pytest.mark.few(0)
@pytest.mark.parametrize("how", ["torchrun", "SLURM", "by a list"])
def test_one_trainer_fits_validates_saves_and_fits_on(how: str, tmp_path: Path) -> None:
    for fitted, validated, world, epoch in run(3, _stages, how, str(tmp_path)):
        assert validated == pytest.approx(fitted)
        assert (world, epoch) == (3, 2)
    assert (tmp_path / "end.ckpt").exists()


class Threads(L.Callback):
    """On how many this rank trains."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.found = torch.get_num_threads()


def _on_four_cores() -> int:
    """Nobody says on how many threads: torch begins with one for each core that the process may run on."""
    one_thread.ENOUGH = 30.0
    os.sched_getaffinity = lambda _: set(range(4))  # type: ignore[assignment, attr-defined]  # for this forked process
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(4)
    t = on_nodes(None, "SLURM", GossipRingStrategy(inner="node"), max_epochs=1, callbacks=[threads := Threads()])
    t.fit(Lit(), loader(shuffle=False), loader(40, shuffle=False))
    return threads.found


def test_tasks_of_plain_srun_share_the_cores_of_their_node() -> None:
    """Lightning sees to it (`docs/launching.md`)."""
    assert run(3, _on_four_cores) == [2, 2, 4]


def are_members(ends: list[dict[str, Any]]) -> None:
    assert [end["rank"] for end in ends] == [(0, 0, 0, 3), (1, 1, 0, 3), (2, 0, 1, 3)]
    assert [end["sampler"] for end in ends] == [{"num_replicas": 3, "rank": r} for r in range(3)]
    assert {end["members"] for end in ends} == {3}
    assert Counter(i for end in ends for i in end["seen"]) == dict.fromkeys(range(240), 2)
    assert all(end["weights"] == ends[0]["weights"] and end["val"] == ends[0]["val"] for end in ends)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("of", "knobs"),
    [
        ("gossip_ring", {}),
        ("gossip_ring", {"mode": "push_sum"}),
        ("gossip_ring", {"mode": "none"}),
        ("gossip_ring", {"balance": "equal"}),
        ("gossip_ring", {"balance": "incremental"}),
        ("async_global", {}),
        ("gossip_ring", {"at_meeting": "keep"}),
        ("cyclic_delay", {}),
        ("cyclic_delay", {"push": "gradient"}),
    ],
    ids=str,
)
def test_nodes_are_members_of_unlike_size(of: str, knobs: dict[str, Any]) -> None:
    ends = run(3, _fit, of, {"inner": "node", **knobs})
    are_two(ends, knobs)


def are_two(ends: list[dict[str, Any]], knobs: dict[str, Any]) -> None:
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


class Slope(Plain):
    """Its gradient is the mean of the samples, wherever the weights are: what each sample moved adds up."""

    def __init__(self) -> None:
        super().__init__(lr=0.5)
        self.layer = torch.nn.Linear(8, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[1]).mean()  # type: ignore[no-any-return]


class Epochs(L.Callback):
    """The consensus after each epoch."""

    def __init__(self) -> None:
        self.weights: list[list[float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.weights.append(weights(module))


def _slope(of: str, knobs: dict[str, Any]) -> list[float]:
    torch.manual_seed(0)
    epochs = Epochs()
    t = on_nodes(None, "torchrun", KINDS[of](inner="node", balance="equal", **knobs), max_epochs=2, callbacks=[epochs])
    t.fit(Slope(), loader(shuffle=False), loader(40, shuffle=False))
    before, after = epochs.weights
    return [a - b for a, b in zip(after, before, strict=True)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("of", "knobs"),
    [
        ("gossip_ring", {"mode": "none"}),
        ("gossip_ring", {"mode": "pairwise"}),
        ("gossip_ring", {"mode": "push_sum"}),
        ("async_global", {"attenuation": "none", "local_steps": 1}),
        ("async_global", {"attenuation": "none", "local_steps": 3}),
        ("cyclic_delay", {"push": "gradient"}),
        ("cyclic_delay", {"push": "delta"}),
    ],
    ids=str,
)
def test_a_sample_moves_the_consensus_equally_whatever_the_size_of_its_member(of: str, knobs: dict[str, Any]) -> None:
    """15 batches of 8 samples and 30 of 4: a synchronous run of three ranks takes 20 steps of 12.

    Of the second epoch: a server knows what others' pushes weigh from their first ones on.
    """
    moved = run(3, _slope, of, knobs, timeout=20)
    assert moved[0] == pytest.approx((-0.5 * INPUTS.sum(0) / 12).tolist(), rel=1e-5, abs=1e-5)


# -- torchrun itself ---------------------------------------------------------------------------------------------------


def _agent(inner: bool) -> list[dict[str, Any]]:
    """One node: torchrun's own agent by its own reading of its line, with another number of ranks on each node."""
    node, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    for name in (*TORCHRUN, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    line = ["--nnodes=2", f"--nproc-per-node={NODES[int(node)]}", f"--node-rank={node}", "--master-addr=127.0.0.1"]
    config, _, _ = config_from_args(parse_args([*line, f"--master-port={port}", "script.py"]))
    quick = replace(config, start_method="fork", monitor_interval=0.05)
    found = elastic_launch(quick, _fit)("gossip_ring", {"inner": "node"} if inner else {}, None, "torchrun itself")
    return [found[rank] for rank in sorted(found)]  # it has them in the order in which they ended


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.few(0)
@pytest.mark.parametrize("inner", [True, False])
def test_torchrun_starts_two_and_one(inner: bool) -> None:
    ends = [end for node in run(2, _agent, inner) for end in node]
    if inner:
        are_two(ends, {})
    else:
        are_members(ends)


# -- what is refused, and what goes on ---------------------------------------------------------------------------------


def _refused(knobs: dict[str, Any], nodes: list[int] | None) -> str:
    t = on_nodes(nodes, "torchrun", GossipRingStrategy(**knobs))
    with pytest.raises(MisconfigurationException) as error:
        t.fit(Lit(), loader(), loader(40, shuffle=False))
    return str(error.value)


@pytest.mark.parametrize(
    ("knobs", "nodes", "sentence"),
    [
        ({"inner": "node", "mode": "sync"}, None, "the members have of 2 and 1 ranks"),
        ({}, [1, 2], "gives node 0 1 ranks from rank 0 on, and there torchrun started 2 from rank 0 on"),
    ],
)
def test_a_run_that_cannot_be_is_refused_on_all_ranks(
    knobs: dict[str, Any], nodes: list[int] | None, sentence: str
) -> None:
    said = run(3, _refused, knobs, nodes)
    assert sentence in said[0]
    assert len(said) == 3


def _saved(folder: str, ending: int, split: list[int], resumed: bool) -> dict[str, Any]:
    global NODES  # of this forked process
    NODES = split
    every = ModelCheckpoint(folder, every_n_train_steps=15, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"callbacks": [every], "enable_checkpointing": True, "max_steps": ending, "max_epochs": 9}
    t = on_nodes(None, "torchrun", GossipRingStrategy(inner="node", balance="equal", mode="none"), **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = f"{folder}/step=15.ckpt" if resumed else None
        t.fit(Lit(), loader(shuffle=False), loader(40, shuffle=False), ckpt_path=path)
    return {"step": t.global_step, "told": [str(w.message) for w in told if "to the bit" in str(w.message)]}


@pytest.mark.few(0)
def test_the_same_nodes_go_on_to_the_bit_and_others_say_that_they_do_not(tmp_path: Path) -> None:
    run(3, _saved, str(tmp_path), 15, [2, 1], False)
    assert all(end == {"step": 30, "told": []} for end in run(3, _saved, str(tmp_path), 30, [2, 1], True))
    other = run(3, _saved, str(tmp_path), 30, [1, 2], True)
    assert {end["step"] for end in other} == {30}
    assert "its members were the ranks 0 1 | 2, and here they are 0 | 1 2" in other[0]["told"][0]


def _dies(dead: int) -> dict[str, Any]:
    lit, strategy = Lit(), GossipRingStrategy(inner="node", silence=0.5)
    t = on_nodes(None, "torchrun", strategy, callbacks=[SpeedFaults(step_seconds=0.004), Does(dead, die)])
    t.fit(lit, loader(), loader(40, shuffle=False))
    return {"weights": weights(lit), "seen": lit.seen}


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dead", [2, 1, 0])
def test_a_node_dies_as_a_member_and_the_other_one_trains_on_all_the_data(dead: int) -> None:
    with Forked(3, _dies, dead, store=True) as forked:
        results = forked.results(60)
    assert results[dead].kind == "gone"
    if dead < 2:
        assert f"rank {dead} is dead" in results[1 - dead].error
        assert "of the same member stops with it" in results[1 - dead].error
    left = [results[rank] for rank in ((0, 1) if dead == 2 else (2,))]
    assert all(one.kind is None for one in left), left
    assert all(one.value["weights"] == left[0].value["weights"] for one in left)
    assert {index for one in left for index in one.value["seen"]} == set(range(240))
