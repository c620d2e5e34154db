"""Where nodes have unlike numbers of devices, ranks are counted along the nodes, by what each of them has.

    devices_per_node=[4, 2]     node 0: ranks 0 1 2 3    node 1: ranks 4 5

    torchrun started the ranks              its variables say who each is; a list, if there is one, must fit them
    a list, and nobody started them         Lightning starts those of this node; NODE_RANK says which node it is
    srun started them                       its variables say who each is, and how many tasks each node has: 4,2

`devices` and `num_nodes` are what the Trainer of this node is to be told. It sets products of them, which do not count:
Lightning's own environments refuse such nodes, or count `num_nodes * devices` ranks.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

LEAVE_IT_OUT = (
    "correct `devices_per_node`, or leave it out: torchrun says it (rendezvous c10d numbers nodes as they come)"
)


class UnevenNodesEnvironment(LightningEnvironment):
    """Ranks on nodes that need not have equally many devices.

    Give it to the Trainer, with what it says of this node:

        nodes = UnevenNodesEnvironment(devices_per_node=[4, 2])
        Trainer(plugins=nodes, devices=nodes.devices, num_nodes=nodes.num_nodes, strategy="gossip_ring")

    Args:
        devices_per_node: How many ranks each node has, in the order of the nodes; None: torchrun says it.
    """

    def __init__(self, devices_per_node: Sequence[int] | None = None) -> None:
        super().__init__()
        self.devices_per_node = None if devices_per_node is None else _checked(devices_per_node)

    @staticmethod
    def detect() -> bool:
        """It is given to the Trainer, never found."""
        return False

    @property
    def launched(self) -> bool:
        """Whether torchrun started the ranks, or what sets the same variables."""
        return "RANK" in os.environ

    @property
    def creates_processes_externally(self) -> bool:
        """Whether Lightning has no processes to start."""
        return self.launched or super().creates_processes_externally

    @property
    def devices(self) -> int:
        """How many ranks this node has."""
        return self._listed[self.node_rank()] if self.devices_per_node is not None else _told("LOCAL_WORLD_SIZE")

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return len(self._listed) if self.devices_per_node is not None else _told("GROUP_WORLD_SIZE")

    def node_rank(self) -> int:
        """Which node this is."""
        node = _told("GROUP_RANK") if self.launched else super().node_rank()
        if self.devices_per_node is not None and not 0 <= node < len(self.devices_per_node):
            raise MisconfigurationException(
                f"`devices_per_node={self.devices_per_node}` has {len(self.devices_per_node)} nodes, and this is node "
                f"number {node}: {LEAVE_IT_OUT if self.launched else 'NODE_RANK counts from 0'}"
            )
        return node

    def world_size(self) -> int:
        """All ranks of all nodes."""
        return _told("WORLD_SIZE") if self.launched else sum(self._listed)

    def global_rank(self) -> int:
        """This rank among all."""
        return _told("RANK") if self.launched else sum(self._listed[: self.node_rank()]) + self.local_rank()

    def set_world_size(self, size: int) -> None:
        """Nothing: it would be a product."""

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it would be made of a product."""

    def teardown(self) -> None:
        """A stage ends. What Lightning's own launcher set goes; what torchrun said holds for the next stage too."""
        if not self.launched:
            super().teardown()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise where the Trainer, the list and torchrun say different things."""
        if self.launched and self.devices_per_node is not None:
            self._check_list(self._listed)
        _check_trainer(self, num_devices, num_nodes)

    @property
    def _listed(self) -> list[int]:
        if self.devices_per_node is None:
            raise MisconfigurationException(
                "nobody says how many devices the nodes have: start the ranks by torchrun, or give "
                "UnevenNodesEnvironment `devices_per_node`"
            )
        return self.devices_per_node

    def _check_list(self, listed: list[int]) -> None:
        node, world, here = self.node_rank(), _told("WORLD_SIZE"), _told("LOCAL_WORLD_SIZE")
        said = f"`devices_per_node={listed}`"
        if sum(listed) != world:
            raise MisconfigurationException(
                f"{said} makes {sum(listed)} ranks, and torchrun started {world}: {LEAVE_IT_OUT}"
            )
        if listed[node] != here or sum(listed[:node]) + self.local_rank() != _told("RANK"):
            raise MisconfigurationException(
                f"{said} gives node {node} {listed[node]} ranks from rank {sum(listed[:node])} on, and there torchrun "
                f"started {here} from rank {_told('RANK') - self.local_rank()} on: {LEAVE_IT_OUT}"
            )


class UnevenSLURMEnvironment(SLURMEnvironment):
    """Tasks of a SLURM step on nodes that need not have equally many, as `--ntasks` without `--ntasks-per-node` gives.

    Give it to the Trainer, with what it says of this node:

        nodes = UnevenSLURMEnvironment()
        Trainer(plugins=nodes, devices=nodes.devices, num_nodes=nodes.num_nodes, strategy="gossip_ring")

    Args:
        auto_requeue: See `SLURMEnvironment`.
        requeue_signal: See `SLURMEnvironment`.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        # not Lightning's own: it refuses every step without `--ntasks-per-node`
        self.auto_requeue, self.requeue_signal = auto_requeue, requeue_signal or signal.SIGUSR1

    @staticmethod
    def detect() -> bool:
        """It is given to the Trainer, never found."""
        return False

    @property
    def main_address(self) -> str:
        """Where rank 0 is: on the step's first node, which need not be the job's."""
        if "MASTER_ADDR" not in os.environ and (nodes := os.environ.get("SLURM_STEP_NODELIST")):
            os.environ["MASTER_ADDR"] = self.resolve_root_node_address(nodes)
        return super().main_address

    @property
    def devices(self) -> int:
        """How many tasks this node has."""
        return self._listed[self.node_rank()]

    @property
    def num_nodes(self) -> int:
        """How many nodes the step has."""
        return len(self._listed)

    def world_size(self) -> int:
        """All tasks of the step."""
        return _told("SLURM_NTASKS", *SRUN)

    def global_rank(self) -> int:
        """This task among all."""
        return _told("SLURM_PROCID", *SRUN)

    def local_rank(self) -> int:
        """This task among those of its node."""
        return _told("SLURM_LOCALID", *SRUN)

    def node_rank(self) -> int:
        """Which of the step's nodes this is."""
        return _told("SLURM_NODEID", *SRUN)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise where the Trainer and SLURM say different things."""
        _check_trainer(self, num_devices, num_nodes)

    @property
    def _listed(self) -> list[int]:
        """The tasks of each node, from `4(x2),3`; a step may have other ones than its job."""
        name = next((name for name in TASKS if name in os.environ), TASKS[0])
        said = os.environ.get(name, "")
        parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in said.split(",")]
        found = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
        if not all(parts):
            why = "is not what SLURM writes there, like 4(x2),3"
        elif sum(found) != self.world_size():
            why = f"makes {sum(found)} tasks, and SLURM_NTASKS says {self.world_size()}"
        elif not 0 <= self.node_rank() < len(found):
            why = f"has {len(found)} nodes, and this is node number {self.node_rank()}"
        else:
            return found
        raise MisconfigurationException(f"{name}={said} {why}: start the script by srun, and set none of these by hand")


TASKS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
SRUN = ("srun", "start the script by srun")


def _check_trainer(
    environment: UnevenNodesEnvironment | UnevenSLURMEnvironment, num_devices: int, num_nodes: int
) -> None:
    """Raise where the Trainer was told other numbers."""
    e = environment
    for knob, given, right in (("devices", num_devices, e.devices), ("num_nodes", num_nodes, e.num_nodes)):
        if given != right:
            raise MisconfigurationException(
                f"the Trainer of node {e.node_rank()} has {knob}={given}, and {type(e).__name__} knows of {right}: "
                "give the Trainer its `devices` and its `num_nodes`"
            )


def _checked(devices: Sequence[int]) -> list[int]:
    listed = isinstance(devices, (list, tuple)) and len(devices) > 0
    if not listed or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in devices):
        raise ValueError(
            f"`devices_per_node` must be a list of integers of at least 1, one a node, or None, got {devices!r}"
        )
    return list(devices)


def _told(
    name: str,
    who: str = "torchrun",
    remedy: str = "start the ranks by torchrun, or give UnevenNodesEnvironment `devices_per_node`",
) -> int:
    """What the launcher says."""
    if name not in os.environ:
        raise MisconfigurationException(f"{name} is not set, as {who} would: {remedy}")
    return int(os.environ[name])
