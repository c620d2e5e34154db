"""`gossip_ring`: every rank trains on its own and averages with its neighbours on a ring; nobody waits for anybody."""

from __future__ import annotations

from datetime import timedelta
from typing import get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_warn

from lightning_async.algorithms.gossip import Gossip, Mode, Wire, gossip
from lightning_async.algorithms.topology import Topology
from lightning_async.data.share import Balance
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.buffers import Buffers
from lightning_async.strategies.knobs import AtMeeting, Saves, StartMethod, check_word
from lightning_async.strategies.members import Inner


class GossipRingStrategy(AsyncStrategy):
    """Asynchronous gossip on a ring (GR-SGD), with the synchronous ring and the silent control beside it.

    `gradient_clip_val` clips a rank's own gradient, before any exchange; what comes from neighbours is not clipped.
    Half-precision weights (`bf16-true`, `16-true`) are exchanged, averaged and stepped in float32 and hold its
    rounding.

    Args:
        mode: "pairwise" (symmetric averages, fair to unequal speeds), "push_sum" (one-sided, by mass), "sync" (D-PSGD,
            lock-step), or "none" (replicas train alone and are averaged at meetings: the control).
        period: Exchange after every this many steps of a rank; None: 2 with "pairwise", 1 with the others.
        max_delay: Contributions later than this many of the receiver's steps are refused and sent back; None: no bound.
        wire: "fp32", or "bf16" for half the bytes (what rounding cuts off stays with the sender).
        topology: "ring", or "exponential" (one peer at a time, at distances 1, 2, 4, ...), better above 16 members,
            and with "push_sum" above 8.
        mixing: With mode="pairwise", how far the two ends of an edge move: 0.5 meets in the middle. None: 1/3, and 0.5
            for two members.
        at_meeting: "adopt" (replicas go on from the consensus) or "keep" (each goes on from its own weights).
        balance: "claim" (the share of the data follows the speed), "equal" (every rank the same number of samples), or
            "incremental" (IDPA: in parts, by measured speed; its knobs: `Incremental`).
        buffers: "average" (BatchNorm's statistics become the mean at meetings), "reestimate" (and are taken anew at the
            end of a run, on the last 8 batches of each rank), or "local" (each rank keeps its own).
        saves: "meeting" (all meet for a checkpoint by steps), or "cut" (`ModelCheckpoint(every_n_train_steps=...)` gets
            a consistent state of the run while everybody trains on; not with mode="sync").
        meet_every: Samples of all ranks between two meetings, also in mid-epoch; None: meetings where something is due.
        grace: Seconds that a run which gets a SIGTERM may take to meet once more before it stops.
        interface: Network interface for the links; None: what GLOO_SOCKET_IFNAME says, or the host name's.
        staging: Bytes of host memory that a link may need, whatever travels on it; None: 17.8 MB.
        silence: Seconds without a heartbeat after which a rank is no longer written to.
        patience: Seconds without a heartbeat after which a rank is declared dead for good.
        meeting_timeout: The longest a meeting may wait for a living rank, in seconds.
        record: Folder for each rank's event log, from which the run can be replayed to the bit; None: no log.
        inner_threads: On CPU, convolutions in tiles on so many threads of our own; None: by ATen's pool, as ever.
        inner: "node" (the ranks of a node step together and are one member), or None: each rank is a member.
        inner_size: So many ranks in a row are one member, wherever they are; None: as `inner` says.
        start_method: How local processes start: "popen", "spawn", "fork" or "forkserver".
        timeout: For the default process group, which is used at start-up only.
        process_group_backend: Backend of the default process group.
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: Who started the processes; found by the Trainer.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Set by the Trainer.
    """

    name = "gossip_ring"
    algorithm: Gossip

    def __init__(
        self,
        *,
        mode: Mode = "pairwise",
        period: int | None = None,
        max_delay: int | None = 1000,
        wire: Wire = "fp32",
        topology: Topology = "ring",
        mixing: float | None = None,
        at_meeting: AtMeeting = "adopt",
        balance: Balance | None = None,
        buffers: Buffers = "average",
        saves: Saves = "meeting",
        meet_every: int | None = None,
        grace: float = 10.0,
        interface: str | None = None,
        staging: int | None = None,
        silence: float = 2.0,
        patience: float = 30.0,
        meeting_timeout: float = 1800.0,
        record: str | None = None,
        inner_threads: int | None = None,
        inner: Inner | None = None,
        inner_size: int | None = None,
        start_method: StartMethod = "popen",
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        check_word("saves", saves, get_args(Saves))
        if saves == "cut" and mode == "sync":
            raise ValueError(
                "`saves='cut'` is for ranks that run free, and with mode='sync' they go in step: leave it out, a "
                "meeting makes nobody wait there; or take mode='pairwise' or 'push_sum'"
            )
        self.saves = saves
        super().__init__(
            gossip(mode, period=period, max_delay=max_delay, wire=wire, topology=topology, mixing=mixing),
            at_meeting=at_meeting,
            balance=balance,
            buffers=buffers,
            meet_every=meet_every,
            grace=grace,
            interface=interface,
            staging=staging,
            silence=silence,
            patience=patience,
            meeting_timeout=meeting_timeout,
            record=record,
            inner_threads=inner_threads,
            inner=inner,
            inner_size=inner_size,
            start_method=start_method,
            timeout=timeout,
            process_group_backend=process_group_backend,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.mode, self.topology = mode, topology

    def setup_environment(self) -> None:
        """A long ring is slow to agree: say so."""
        super().setup_environment()
        if warning := self.algorithm.warning(self.members):
            rank_zero_warn(warning)
