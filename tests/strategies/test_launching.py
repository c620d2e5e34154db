"""The files of `examples/launch` do what `docs/launching.md` says: each is read as its launcher reads it, and run.

What a launcher starts as processes is forked here, with the environment that the launcher gives it: that takes
milliseconds where a new interpreter takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.fabric.plugins.environments import lsf, mpi
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed import FileStore
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from lightning_async import GossipRingStrategy
from tests.strategies.ranks import run

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
ROOT = LAUNCH.parents[1]
JOB = "4711"
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
OTHERS += ("TORCHELASTIC_USE_AGENT_STORE",)
"""What torchrun would set, and `Forked` does."""
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable", "ignore:.*fork")


def train(argv: list[str], *callbacks: L.Callback) -> dict[str, Any]:
    """The script, in this process. All nodes are this host."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    main = runpy.run_path(str(LAUNCH / "train.py"), run_name="train")["main"]
    t = main(argv, callbacks)
    weights = [float(x) for p in t.lightning_module.parameters() for x in p.detach().flatten()]
    environment = type(t.strategy.cluster_environment).__name__
    place = {"rank": t.global_rank, "node": t.node_rank, "member": member_of(t)}
    return {"environment": environment, **place, "steps": t.global_step, "weights": weights}


def member_of(t: L.Trainer) -> tuple[int, ...]:
    """The ranks of this rank's member."""
    siblings = t.strategy.office.siblings  # type: ignore[attr-defined]
    return (t.global_rank,) if siblings is None else siblings.ranks


def ran(found: list[dict[str, Any]], environment: str, ranks: int) -> None:
    """All ranks are there, each once, and hold the same."""
    assert {one["environment"] for one in found} == {environment}
    assert sorted(one["rank"] for one in found) == list(range(ranks))
    assert all(one["steps"] == 60 and one["weights"] == found[0]["weights"] for one in found)


def words_of(script: str, program: str, environment: Mapping[str, str]) -> list[str]:
    """What the shell gives the program that a script calls."""
    told = subprocess.run(
        ["sh", "-c", f'{program}() {{ printf "%s\\0" "$@"; }}; . "$0"', str(LAUNCH / script)],
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
        timeout=60,
    )
    return told.stdout.decode().split("\0")[:-1]


# -- torchrun --------------------------------------------------------------------------------------------------------


def agent(node: str, words: list[str]) -> dict[int, dict[str, Any]]:
    """One node: torchrun's own agent by torchrun's own reading of its line, which forks its ranks."""
    for name in OTHERS:
        os.environ.pop(name, None)
    config, _, argv = config_from_args(parse_args(words))
    program = [str(word) for word in argv if str(word).endswith(".py") or argv.index(word)]
    arguments = program[program.index("examples/launch/train.py") + 1 :]
    quick = replace(config, start_method="fork", monitor_interval=0.05)
    return elastic_launch(quick, train)(arguments)


def node_of(line: str, folder: str) -> dict[int, dict[str, Any]]:
    """Node 0 hosts the rendezvous, as a rank of `Forked` that holds its port."""
    node, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    told = {"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OUT": folder}
    words = words_of(line, "torchrun", told | {"RENDEZVOUS": f"127.0.0.1:{port}"})
    return agent(node, words)


@pytest.mark.few(1)
@pytest.mark.parametrize("line", ["static.sh", "c10d.sh"])
def test_torchrun(line: str, tmp_path: Path) -> None:
    nodes = run(2, node_of, line, str(tmp_path))
    found = [one for node in nodes for one in node.values()]
    ran(found, "TorchElasticEnvironment", 4)


# -- SLURM -----------------------------------------------------------------------------------------------------------


class Queue:
    """A SLURM of one host: its `srun` gives the test its words and environment, and ends when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked, self.answer = folder / "asked", folder / "answer"
        for pipe in (self.asked, self.answer):
            os.mkfifo(pipe)
        self._tool(
            "srun", f'{{ env -0; printf "\\0\\0"; printf "%s\\0" "$@"; }} > {self.asked}\nread code < {self.answer}'
        )
        self._tool("scontrol", f'echo "$@" >> {folder}/requeued')
        lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "job.sbatch").read_text(), re.MULTILINE)
        self.options = dict(lines)

    def _tool(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{body}\nexit ${{code:-0}}\n")
        path.chmod(0o755)

    @property
    def tasks(self) -> int:
        """All of the job."""
        return int(self.options["nodes"]) * int(self.options["ntasks-per-node"])

    def environment(self) -> dict[str, str]:
        """What a batch script finds."""
        return {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "OUT": str(self.folder / "run"),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NAME": self.options["job-name"],
            "SLURM_NNODES": self.options["nodes"],
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_NTASKS_PER_NODE": self.options["ntasks-per-node"],
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_NODELIST": "127.0.0.1",
        }

    def submit(self, told: bool) -> list[dict[str, Any]]:
        """Run the script to its end; `told`: the signal comes in mid-run."""
        batch = subprocess.Popen(
            ["bash", str(LAUNCH / "job.sbatch")], env={**os.environ, **self.environment()}, cwd=ROOT
        )
        try:
            environment, words = self._srun()
            assert words[:2] == ["--wait=0", "--kill-on-bad-exit=0"]
            assert words[2:4] == ["python", "examples/launch/train.py"]
            sent = self.options["signal"].partition("@")[0] if told else None
            found = run(self.tasks, task, environment, words[4:], sent)
            self.answer.write_text("0\n")
            assert batch.wait(60) == 0
        finally:
            batch.kill()
            batch.wait()
        return found

    def _srun(self) -> tuple[dict[str, str], list[str]]:
        """What srun was called with."""
        pipe, said = os.open(self.asked, os.O_RDONLY | os.O_NONBLOCK), b""
        try:
            while select.select([pipe], [], [], 60)[0] and (more := os.read(pipe, 1 << 16)):
                said += more
        finally:
            os.close(pipe)
        assert said, "srun was not called"
        variables, _, words = said.decode().partition("\0\0\0")
        return dict(v.split("=", 1) for v in variables.split("\0")), words.split("\0")[:-1]


class Told(L.Callback):
    """Gets the job's signal in its tenth batch; remembers where it saved. One task is enough, whichever is first."""

    def __init__(self, name: str | None) -> None:
        self.name, self.batches, self.saved, self.began = name, 0, list[int](), -1

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.began = trainer.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        if self.batches == 10 and self.name is not None:
            os.kill(os.getpid(), signal.Signals[f"SIG{self.name}"])

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved.append(trainer.global_step)


def task(environment: dict[str, str], words: list[str], name: str | None) -> dict[str, Any]:
    """One task of a step, as srun starts it."""
    number, each, port = int(os.environ["RANK"]), int(environment["SLURM_NTASKS_PER_NODE"]), os.environ["MASTER_PORT"]
    for other in OTHERS:
        os.environ.pop(other)
    place = {"SLURM_PROCID": number, "SLURM_LOCALID": number % each, "SLURM_NODEID": number // each}
    os.environ |= environment | {"MASTER_PORT": port} | {k: str(v) for k, v in place.items()}
    told = Told(name if number == 1 else None)
    return train(words, told) | {"saved": told.saved, "began": told.began}


@pytest.mark.few(0)
def test_a_job_of_slurm_is_queued_anew_and_goes_on(tmp_path: Path) -> None:
    """The batch script itself is run by bash, with what SLURM tells it by its own `#SBATCH` lines."""
    queue = Queue(tmp_path)
    assert "requeue" in queue.options
    first = queue.submit(told=True)
    ran(first, "SLURMEnvironment", queue.tasks)
    assert len({tuple(one["saved"]) for one in first}) == 1
    (at,) = first[0]["saved"]
    assert 0 < at < 60
    assert (tmp_path / "requeued").read_text() == f"requeue {JOB}\n", "by one rank, once"
    again = queue.submit(told=False)
    ran(again, "SLURMEnvironment", queue.tasks)
    assert {one["began"] for one in again} == {at}, "it went on from where it was saved"


# -- Kubernetes ------------------------------------------------------------------------------------------------------


def pod(containers: list[dict[str, Any]], out: str) -> dict[str, Any]:
    """One pod, as the operator starts it: with its number, and the address of the first one."""
    container, number = containers[int(os.environ["RANK"])], os.environ["RANK"]
    operators = {"RANK": number, "WORLD_SIZE": str(len(containers)), "MASTER_PORT": os.environ["MASTER_PORT"]}
    for other in OTHERS:
        os.environ.pop(other)
    os.environ |= {v["name"]: v["value"] for v in container["env"]} | operators | {"MASTER_ADDR": "127.0.0.1"}
    assert container["command"] == ["python", "examples/launch/train.py"]
    return train([word.replace("/shared", out) for word in container["args"]])


def test_the_pods_of_a_pytorchjob(tmp_path: Path) -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"]
    containers = []
    for spec in replicas.values():
        inside = spec["template"]["spec"]
        assert [c["name"] for c in inside["containers"]] == ["pytorch"], "the operator looks for this name"
        volumes = {volume["name"] for volume in inside["volumes"]}
        assert {mount["name"] for c in inside["containers"] for mount in c["volumeMounts"]} == volumes
        containers += inside["containers"] * spec["replicas"]
    ran(run(len(containers), pod, containers, str(tmp_path)), "KubeflowEnvironment", 2)


# -- LSF, MPI ----------------------------------------------------------------------------------------------------------

HOSTS = ["localhost", "127.0.0.1"]
"""Two hosts, by the names under which this one is known to itself."""


def stands_on(host: str, environments: Any) -> None:
    """This forked process stands on that host, as far as an environment of Lightning's asks."""
    environments.socket = SimpleNamespace(gethostname=lambda: host)


def step(words: list[str], hosts: str) -> dict[str, Any]:
    """One task of a jsrun step."""
    number, port = int(os.environ["RANK"]), os.environ["MASTER_PORT"]
    for other in OTHERS:
        os.environ.pop(other)
    stands_on(HOSTS[number // 2], lsf)
    os.environ |= {"JSM_NAMESPACE_RANK": str(number), "JSM_NAMESPACE_LOCAL_RANK": str(number % 2)}
    os.environ |= {"JSM_NAMESPACE_SIZE": "4", "LSB_JOBID": JOB, "LSB_DJOB_RANKFILE": hosts, "MASTER_PORT": port}
    return train(words)


@pytest.mark.few(0)
def test_a_step_of_lsf(tmp_path: Path) -> None:
    """By the variables alone, of two hosts with two tasks each: there is no LSF here."""
    hosts = tmp_path / "hosts"
    hosts.write_text("\n".join(["launcher", *(host for host in HOSTS for _ in range(2))]) + "\n")
    words = words_of("job.lsf", "jsrun", {"OUT": str(tmp_path)})
    at = words.index("examples/launch/train.py")
    assert words[at - 1] == "python"
    found = run(4, step, words[at + 1 :], str(hosts))
    ran(found, "LSFEnvironment", 4)
    assert [one["node"] for one in found] == [0, 0, 1, 1]


class Comm:
    """What Lightning uses of an MPI communicator, by a file that all ranks write to."""

    def __init__(self, store: FileStore, name: str, ranks: list[int], me: int) -> None:
        self.store, self.name, self.ranks, self.me, self.number = store, name, ranks, me, 0

    def Get_size(self) -> int:  # noqa: N802
        return len(self.ranks)

    def Get_rank(self) -> int:  # noqa: N802
        return self.ranks.index(self.me)

    def everybodys(self, value: Any) -> list[Any]:
        self.number += 1
        key = f"{self.name}/{self.number}"
        self.store.set(f"{key}/{self.me}", json.dumps(value))
        return [json.loads(self.store.get(f"{key}/{rank}")) for rank in self.ranks]

    def bcast(self, value: Any, root: int) -> Any:
        return self.everybodys(value)[root]

    def gather(self, value: Any, root: int) -> list[Any] | None:
        values = self.everybodys(value)
        return values if self.Get_rank() == root else None

    def Split(self, color: int) -> Comm:  # noqa: N802
        colors = self.everybodys(color)
        ranks = [rank for rank, other in zip(self.ranks, colors, strict=True) if other == color]
        return Comm(self.store, f"{self.name}/{color}", ranks, self.me)


def process_of_mpi(words: list[str], file: str) -> dict[str, Any]:
    """One process of mpirun, which deals them out to the hosts in turn."""
    number = int(os.environ["RANK"])
    os.environ["STANDALONE_PORT"] = os.environ.pop("MASTER_PORT")  # which Lightning takes in place of any free one
    for other in (*OTHERS, "MASTER_ADDR"):
        os.environ.pop(other)
    stands_on(HOSTS[number % 2], mpi)
    world = Comm(FileStore(file, 4), "world", list(range(4)), number)
    sys.modules["mpi4py"] = ModuleType("mpi4py")
    sys.modules["mpi4py"].MPI = SimpleNamespace(COMM_WORLD=world, Comm=Comm)  # type: ignore[attr-defined]
    mpi._MPI4PY_AVAILABLE = True  # type: ignore[assignment]  # for this forked process
    StrategyRegistry.register("by_node", GossipRingStrategy, "each node is a member", inner="node")
    return train(words)


def mpirun(out: str) -> tuple[list[str], list[str]]:
    """What `mpirun.sh` gives mpirun, and the script."""
    words = words_of("mpirun.sh", "mpirun", {"HOSTS": "one:2,two:2", "OUT": out})
    at = words.index("examples/launch/train.py")
    assert words[at - 1] == "python"
    return words[: at - 1], words[at + 1 :]


def test_the_line_of_mpirun_starts_as_many_processes_as_it_tells_the_script() -> None:
    line, script = mpirun("out")
    told = dict(zip(script[::2], script[1::2], strict=True))
    assert told["--out"] == "out"
    assert line[:4] == ["-np", "4", "--host", "one:2,two:2"]
    assert line[1] == str(int(told["--nodes"]) * int(told["--devices"]))
    assert "ppr:2:node:PE=4" in line
    assert told["--devices"] == "2"
    assert "OMP_NUM_THREADS=4" in line


@pytest.mark.few(0)
@pytest.mark.parametrize("strategy", ["by_node", "gossip_ring"])
def test_the_processes_of_mpirun(strategy: str, tmp_path: Path) -> None:
    """By what Lightning asks `mpi4py`, of two hosts with two processes each: there is no MPI here."""
    words = [*mpirun(str(tmp_path / "out"))[1], "--strategy", strategy]
    found = run(4, process_of_mpi, words, str(tmp_path / "world"))
    ran(found, "MPIEnvironment", 4)
    assert len({one["node"] for one in found[::2]}) == len({one["node"] for one in found[1::2]}) == 1
    assert [one["member"] for one in found] == (
        [(0, 2), (1, 3)] * 2 if strategy == "by_node" else [(0,), (1,), (2,), (3,)]
    )
