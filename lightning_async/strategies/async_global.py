"""`async_global`: every rank trains on its own, and pushes to and pulls from weights that all ranks serve together."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn

from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.local_steps import LocalSteps
from lightning_async.algorithms.outer import Rule
from lightning_async.algorithms.shard_server import OnLate
from lightning_async.algorithms.sync_global import SyncGlobal
from lightning_async.algorithms.weighting import Attenuation, Bound
from lightning_async.algorithms.wire import Wire
from lightning_async.data.share import Balance
from lightning_async.progress.report import Wish
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.buffers import Buffers
from lightning_async.strategies.heritage import heirlooms
from lightning_async.strategies.knobs import Saves, StartMethod, check_saves, check_word
from lightning_async.strategies.members import Inner
from lightning_async.strategies.quality import Quality

Mode = Literal["async", "sync"]


class AsyncGlobalStrategy(AsyncStrategy):
    """Asynchronous global update (BPT-CNN's AGWU, asynchronous local SGD): global weights, served by all ranks.

    Each rank pushes what its own steps moved, and pulls the newest global weights while it trains on. The consensus at
    meetings is the global weights. With `mode="sync"` all merge in rounds and wait for each other (SGWU).

    Args:
        mode: "async", or "sync" (rounds, for which all wait: the baseline; with local_steps="epoch" at meetings only).
        local_steps: Steps between two exchanges: an integer; "speed" (`pace` for the fastest rank, fewer for slower
            ones, so that all exchange equally often); or "epoch" (at meetings only).
        pace: Steps of the fastest rank between two exchanges with local_steps="speed".
        attenuation: What a late correction counts: "hinge" (all, up to 10 rounds of exchanges too late), "poly", "exp",
            "none", or "paper" (BPT-CNN's).
        strength: The parameter of "hinge", "poly" and "exp"; None: 1, 0.5 and 0.5.
        max_delay: Corrections later than this many versions beyond what equal ranks have are late; "auto": 1000, or
            100 rounds of all ranks if that is more; None: no bound.
        on_late: What becomes of late ones: "shrink", "drop", or "wait" (fast ranks wait so that none is late).
        accuracy_weight: Corrections count by accuracy: "off", "train" (by the training loss), or the name of a metric.
        outer: The server's rule: "sum", "nesterov", "delayed_nesterov"; None: "sum", or "delayed_nesterov" if there is
            an `outer_momentum`.
        outer_lr: Learning rate of the outer rule.
        outer_momentum: Momentum of the outer rule.
        shards: Parts of the weights, each with an owner; None: as many as ranks, at most 8.
        mirror_every: Corrections of a shard that may be lost with its owner; None: eight for each rank.
        wire: "fp32", "bf16" for half the bytes, or "sign" for a quarter: corrections as one bit a number and scales,
            weights as bf16. What is cut off of a correction stays with the sender.
        balance: "claim" (the share of the data follows the speed), "equal" (every rank the same number of samples), or
            "incremental" (IDPA: in parts, by measured speed; its knobs: `Incremental`).
        buffers: "average" (BatchNorm's statistics become the mean at meetings), "reestimate" (and are taken anew at the
            end of a run, on the last 8 batches of each rank), or "local" (each rank keeps its own).
        saves: "meeting" (all meet for a checkpoint by steps); cuts, which `gossip_ring` has, are refused in a sentence.
        meet_every: Samples of all ranks between two meetings, also in mid-epoch; None: meetings where something is due.
        grace: Seconds that a run which gets a SIGTERM may take to meet once more before it stops.
        interface: Network interface for the links; None: what GLOO_SOCKET_IFNAME says, or the host name's.
        staging: Bytes of host memory that a link may need, whatever travels on it; None: 17.8 MB.
        silence: Seconds without a heartbeat after which a rank's shard is taken over by another one.
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

    name = "async_global"
    algorithm: AsyncGlobal | SyncGlobal

    def __init__(
        self,
        *,
        mode: Mode = "async",
        local_steps: LocalSteps = 1,
        pace: int = 8,
        attenuation: Attenuation = "hinge",
        strength: float | None = None,
        max_delay: Bound = "auto",
        on_late: OnLate = "shrink",
        accuracy_weight: str = "off",
        outer: Rule | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        shards: int | None = None,
        mirror_every: int | None = None,
        wire: Wire = "fp32",
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
        check_word("mode", mode, get_args(Mode))
        check_saves(saves, "global weights are served here, which change between two steps of a rank, too")
        _check_balance(mode, local_steps, balance)
        self.mode, self.accuracy_weight = mode, accuracy_weight
        self.quality = Quality(accuracy_weight, self._what_is_logged)
        asynchronous = AsyncGlobal(
            local_steps=local_steps,
            pace=pace,
            attenuation=attenuation,
            strength=strength,
            max_delay=max_delay,
            on_late=on_late,
            outer=outer,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
            shards=shards,
            mirror_every=mirror_every,
            wire=wire,
        )
        algorithm = SyncGlobal.like(asynchronous) if mode == "sync" else asynchronous
        super().__init__(
            algorithm,
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
        self._meetings = 0
        if accuracy_weight != "off":
            algorithm.accuracy = self._accuracy
        if self.quality.is_metric:
            self.keep("quality", self.quality)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """Also what all old ranks served, if they were more or fewer; a member's speaker takes it up."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only, **options)
        if self.trainer.state.fn == TrainerFn.FITTING and self.office.speaks:
            found = heirlooms(self, checkpoint_path, checkpoint, weights_only=weights_only, everything=True)
            self.algorithm.heritage = found
        return checkpoint

    @property
    def taken_over(self) -> str:
        """What a run with other members takes over."""
        return "The server's shards are cut anew for the members of now, with their versions and outer momentum"

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is what Q may go by."""
        outputs = super().training_step(*args, **kwargs)
        self.quality.saw(outputs)
        return outputs

    def meet(self) -> Wish:
        """Count the meetings: what is logged at all is logged by the end of the first."""
        meets = self.free
        if meets and self.office.speaks and isinstance(self.algorithm, AsyncGlobal):
            self.office.drive(self.algorithm.stop(self.replica, self.office.mail))
        wishes = super().meet()
        self._meetings += meets
        return wishes

    def set_off(self) -> None:
        """After the first meeting: does anybody log what Q is to go by?"""
        if not self.free and self._meetings:
            self.quality.check_logged()
        super().set_off()

    def _what_is_logged(self) -> Mapping[str, Any]:
        return self.trainer.callback_metrics

    def _accuracy(self) -> float:
        return self.office.recording.told("accuracy", self.quality.now())


def _check_balance(mode: Mode, local_steps: LocalSteps, balance: Balance | None) -> None:
    """Ranks that merge after so many steps each go in step; those that merge at meetings may take unlike numbers."""
    if mode == "sync" and local_steps != "epoch" and balance not in (None, "equal"):
        raise ValueError(
            f"`balance` must be 'equal' with mode='sync' and local_steps={local_steps!r}, whose ranks go in step, got "
            f"{balance!r}: with local_steps='epoch' ranks merge at meetings only, and any balance goes"
        )
