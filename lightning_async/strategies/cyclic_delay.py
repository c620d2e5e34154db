"""`cyclic_delay`: ranks push to global weights by turns, and add up what they learn while they wait for theirs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn

from lightning_async.algorithms.compensation import How
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.server_groups import check_elementwise, remembered
from lightning_async.algorithms.turn_knobs import Push, Token
from lightning_async.algorithms.turn_server import Scale
from lightning_async.algorithms.weighting import Bound
from lightning_async.data.share import Balance
from lightning_async.progress.report import Wish
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.buffers import Buffers
from lightning_async.strategies.heritage import heirlooms
from lightning_async.strategies.knobs import Saves, StartMethod, check_saves
from lightning_async.strategies.members import Inner


class CyclicDelayStrategy(AsyncStrategy):
    """Cyclic updates with dynamic delay (Hu et al. 2018): ranks push to global weights by turns.

    What a rank learns adds up until it has the token; then it pushes the sum, and pulls the newest weights: a fast rank
    puts more batches into a push. That is what its own optimizer moved, or, with push="gradient", gradients, by which
    the user's optimizer steps on the server, which all ranks are together.

    Args:
        token: "skip" (nobody waits; who has nothing ready is passed over), or "strict" (the paper's: the ring is never
            left, no push is more than n - 1 versions late, and ranks wait for their turn's answer).
        push: What adds up: "delta" (what local optimizer steps moved; any optimizer will do), or "gradient" (the
            paper's; under momentum or Adam it bears learning rates far below `ddp`'s only).
        scale: What a push counts: "sum" (each batch one n-th, as with `ddp`), "mean" (each push as one whole step), or
            "delay" (as "sum", and less if it is later than in a healthy run).
        strength: How much less with scale="delay": (1 + excess rounds)^-strength; None: 0.5.
        compensation: What is done about late pushes: "none", "lr" (a shorter step) or "dc" (DC-ASGD: the gradient is
            guessed as it would be today; for push="gradient").
        compensation_strength: With "lr" the exponent p of 1 / (1 + excess rounds)^p, None: 0.5; with "dc" the factor
            lambda, None: 0.04.
        max_accumulate: So many batches may add up; then the rank waits for its turn. None: no bound.
        warm_up: Steps of a rank over which that bound grows from 1; 0: none.
        max_delay: Pushes later than this many versions beyond what equal ranks have are shrunk; "auto": 1000, or 100
            rounds of all ranks if that is more; None: none are.
        shards: Parts of the weights, each with a token and an owner; None: as many as ranks, at most 8.
        mirror_every: Pushes of a shard that may be in no copy of it on another rank; None: eight for each rank.
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

    name = "cyclic_delay"
    algorithm: CyclicDelay

    def __init__(
        self,
        *,
        token: Token = "skip",
        push: Push = "delta",
        scale: Scale = "sum",
        strength: float | None = None,
        compensation: How = "none",
        compensation_strength: float | None = None,
        max_accumulate: int | None = None,
        warm_up: int = 0,
        max_delay: Bound = "auto",
        shards: int | None = None,
        mirror_every: int | None = None,
        balance: Balance = "claim",
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
        check_saves(saves, "global weights are served here, which change between two steps of a rank, too")
        super().__init__(
            CyclicDelay(
                token=token,
                push=push,
                scale=scale,
                strength=strength,
                compensation=compensation,
                compensation_strength=compensation_strength,
                max_accumulate=max_accumulate,
                warm_up=warm_up,
                max_delay=max_delay,
                shards=shards,
                mirror_every=mirror_every,
            ),
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

    def _look_at_optimizers(self) -> None:
        """Refuse what a server cannot step, and hand it the optimizer."""
        super()._look_at_optimizers()
        if self.algorithm.push == "gradient":
            self._refuse()
            self.algorithm.optimizer = self.optimizers[0]

    def on_train_start(self) -> None:
        """A batch counts by its samples: members, or batches, may be of unlike size."""
        self.algorithm.usual = self.feeding.usual
        super().on_train_start()

    def _beside(self) -> dict[str, Any]:
        """Also what the server's optimizers remember."""
        if self.algorithm.push == "delta":
            return super()._beside()
        names = remembered(self.optimizers[0])
        return {**super()._beside(), "wider": 0, "remembered": len(names) + ("exp_avg_sq" in names)}

    @property
    def taken_over(self) -> str:
        """What a run with other members takes over."""
        with_states = ", with their versions and optimizer states" if self.algorithm.push == "gradient" else ""
        return f"The server's shards are cut anew for the members of now{with_states}"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """Also what all old ranks served, if they were more or fewer; a member's speaker takes it up."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only, **options)
        if self.trainer.state.fn == TrainerFn.FITTING and self.office.speaks:
            found = heirlooms(self, checkpoint_path, checkpoint, weights_only=weights_only, everything=True)
            self.algorithm.heritage = found
        return checkpoint

    def meet(self) -> Wish:
        """Nobody may wait for the turn of a rank that waits at a meeting."""
        if self.free and self.office.speaks:
            self.office.drive(self.algorithm.stop(self.replica, self.office.mail))
        return super().meet()

    def _refuse(self) -> None:
        if len(self.optimizers) != 1:
            raise MisconfigurationException(
                f"strategy={self.name!r}: the server steps by one optimizer, and there are {len(self.optimizers)}: "
                "give one optimizer with a parameter group for each, or push='delta'"
            )
        optimizer = self.optimizers[0]
        try:
            check_elementwise(optimizer)
        except ValueError as error:
            raise MisconfigurationException(f"strategy={self.name!r}: {error}") from error
        scaled = getattr(self.precision_plugin, "scaler", None) is not None
        if scaled and any(group.get("fused") for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"strategy={self.name!r}: with fused=True {type(optimizer).__name__} takes fp16's scale out of the "
                "gradients in its own step, and here the server steps: leave out `fused`"
            )
