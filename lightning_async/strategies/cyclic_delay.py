"""`cyclic_delay`: ranks push gradients by turns, and add up what they compute while they wait for theirs."""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn

from lightning_async.algorithms.cyclic_delay import CyclicDelay, Token
from lightning_async.algorithms.server_groups import check_elementwise
from lightning_async.algorithms.turn_service import Scale
from lightning_async.data.share import Balance
from lightning_async.progress.report import Wish
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.buffers import Buffers
from lightning_async.strategies.knobs import StartMethod


class CyclicDelayStrategy(AsyncStrategy):
    """Cyclic updates with dynamic delay (Hu et al. 2018): the user's optimizer steps global weights, by turns.

    Each rank adds up its gradients until it has the token, pushes their sum, and pulls the newest weights: a fast rank
    puts more batches into a push. The optimizer steps on the server, which all ranks are together; theirs do not.

    Args:
        token: "skip" (nobody waits; who has nothing ready is passed over), or "strict" (the paper's: the ring is never
            left, no push is more than n - 1 versions late, and ranks wait for their turn's answer).
        scale: What a push counts: "sum" (each batch one n-th, as with `ddp`), "mean" (each push as one whole step), or
            "delay" (as "sum", and less if it is later than in a healthy run).
        strength: How much less with scale="delay": (1 + excess rounds)^-strength; None: 0.5.
        max_accumulate: So many batches may add up; then the rank waits for its turn. None: no bound.
        max_delay: Pushes later than this many versions beyond what equal ranks have are shrunk; None: none are.
        shards: Parts of the weights, each with a token and an owner; None: as many as ranks, at most 8.
        mirror_every: Pushes between two copies of a shard on another rank; None: four for each rank.
        balance: "claim" (the share of the data follows the speed), "equal" (every rank the same number of samples), or
            "incremental" (IDPA: in parts, by measured speed; its knobs: `Incremental`).
        buffers: "average" (BatchNorm's statistics become the mean at meetings), "reestimate" (and are taken anew at the
            end of a run, on the last 8 batches of each rank), or "local" (each rank keeps its own).
        meet_every: Samples of all ranks between two meetings, also in mid-epoch; None: meetings where something is due.
        grace: Seconds that a run which gets a SIGTERM may take to meet once more before it stops.
        interface: Network interface for the links; None: what GLOO_SOCKET_IFNAME says, or the host name's.
        silence: Seconds without a heartbeat after which a rank's shard is taken over by another one.
        patience: Seconds without a heartbeat after which a rank is declared dead for good.
        meeting_timeout: The longest a meeting may wait for a living rank, in seconds.
        record: Folder for each rank's event log, from which the run can be replayed to the bit; None: no log.
        inner_threads: On CPU, convolutions in tiles on so many threads of our own; None: by ATen's pool, as ever.
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
        scale: Scale = "sum",
        strength: float | None = None,
        max_accumulate: int | None = None,
        max_delay: int | None = 1000,
        shards: int | None = None,
        mirror_every: int | None = None,
        balance: Balance = "claim",
        buffers: Buffers = "average",
        meet_every: int | None = None,
        grace: float = 10.0,
        interface: str | None = None,
        silence: float = 2.0,
        patience: float = 30.0,
        meeting_timeout: float = 1800.0,
        record: str | None = None,
        inner_threads: int | None = None,
        start_method: StartMethod = "popen",
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            CyclicDelay(
                token=token,
                scale=scale,
                strength=strength,
                max_accumulate=max_accumulate,
                max_delay=max_delay,
                shards=shards,
                mirror_every=mirror_every,
            ),
            balance=balance,
            buffers=buffers,
            meet_every=meet_every,
            grace=grace,
            interface=interface,
            silence=silence,
            patience=patience,
            meeting_timeout=meeting_timeout,
            record=record,
            inner_threads=inner_threads,
            start_method=start_method,
            timeout=timeout,
            process_group_backend=process_group_backend,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    def setup(self, trainer: Trainer) -> None:
        """Refuse what a server cannot step, and hand it the optimizer."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._refuse(trainer)
            self.algorithm.optimizer = self.optimizers[0]

    def meet(self) -> Wish:
        """Nobody may wait for the turn of a rank that waits at a meeting."""
        if self.free:
            self.office.drive(self.algorithm.stop(self.replica, self.office.mail))
        return super().meet()

    def _refuse(self, trainer: Trainer) -> None:
        if len(self.optimizers) != 1:
            raise MisconfigurationException(
                f"strategy={self.name!r}: the server steps by one optimizer, and there are {len(self.optimizers)}: "
                "give one optimizer with a parameter group for each, or use strategy='async_global'"
            )
        optimizer = self.optimizers[0]
        try:
            check_elementwise(optimizer)
        except ValueError as error:
            raise MisconfigurationException(f"strategy={self.name!r}: {error}") from error
        if str(trainer.precision) == "16-mixed":
            raise MisconfigurationException(
                f"strategy={self.name!r}: steps that precision='16-mixed' skips are not pushed rightly yet; use "
                "precision='bf16-mixed'"
            )
