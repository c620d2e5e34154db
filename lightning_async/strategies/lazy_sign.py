"""`lazy_sign`: all ranks step together, on signs and scales in the place of numbers; who has no news may be silent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_async.algorithms.late_sign import LateSign
from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.algorithms.sheets import Scale
from lightning_async.algorithms.sign_knobs import Compress, Compressor, Form
from lightning_async.algorithms.sign_memory import refusal, warning
from lightning_async.algorithms.sign_rules import Rule
from lightning_async.algorithms.sign_trigger import News
from lightning_async.algorithms.signs import BLOCK
from lightning_async.progress.report import Wish
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.buffers import Buffers
from lightning_async.strategies.heritage import heirlooms
from lightning_async.strategies.knobs import Saves, StartMethod, check_saves
from lightning_async.strategies.resuming import KEY


class LazySignStrategy(AsyncStrategy):
    """Signs with error feedback (EF-SIGNGD), sent at every step or only with news (LE-SIGNGD), in lock-step.

    About 1/32 of `ddp`'s traffic, less where ranks may stay silent. Weights are identical on all ranks at all times.

    Args:
        rule: "always" (EF-SIGNGD), or what becomes of a rank without news: "accumulate" (it keeps what it does not
            send; for mini-batches), "innovation" (what is sent is the change; for full batches), "paper" (it counts
            with its last message), "periodic" (all are silent at the same steps: the control).
        compress: "update" (of the rank's own optimizer: any optimizer, any schedule, clipping before) or "gradient"
            (the optimizer sees what all agreed on; clipping after).
        compressor: "sign", or "none": numbers travel whole, the control.
        scale: What has a scale of its own: "block", "tensor", or "global".
        block: Numbers of a block.
        stretch: A scale is so many times the mean size of its numbers, above 0 and below 2; None: 1.6 for updates,
            which go the same way for many steps, and 1 for gradients and with rule="innovation".
        min_size: Tensors with fewer numbers travel whole.
        exact: Names of parameters that travel whole; `*` stands for any part of a name.
        form: "slices" (each rank is the server of a slice), "gather" (everybody hears everybody), or "auto": gather for
            2 ranks.
        news: What decides: "change" (since a rank last sent) or "backlog" (what it has not sent).
        history: Rounds that the news are compared with, and that are always sent at first.
        history_weights: How much each of those rounds counts, the latest first; None: all alike.
        threshold: A rank sends where its news exceed so many times the mean square of those rounds.
        error_weight: How much what signs miss counts against sending.
        max_skip: Silent rounds in a row, at most.
        deadline: Seconds that a step waits for the late; then its round closes without them, and what they send counts
            when it comes, `max_skip` rounds later at most. Shares of the data follow the speed then. None: all wait for
            all, in lock-step.
        ahead: So many rounds ahead a rank says whether it sends; more where a message travels longer than a step takes.
        warm_up: So many steps send whole numbers at first.
        threads: Threads that pack and unpack, on a CPU.
        buffers: "average" (BatchNorm's statistics become the mean at meetings), "reestimate" (and are taken anew at the
            end of a run, on the last 8 batches of each rank), or "local" (each rank keeps its own).
        saves: "meeting" (all meet for a checkpoint by steps); cuts, which `gossip_ring` has, are refused in a sentence.
        meet_every: Samples of all ranks between two meetings, also in mid-epoch; None: meetings where something is due.
        grace: Seconds that a run which gets a SIGTERM may take to meet once more before it stops.
        interface: Network interface for the links; None: what GLOO_SOCKET_IFNAME says, or the host name's.
        staging: Bytes of host memory that a link may need, whatever travels on it; None: 17.8 MB.
        silence: Seconds without a heartbeat after which a rank is no longer written to.
        patience: Seconds without a heartbeat after which a rank is declared dead for good.
        meeting_timeout: The longest a step or a meeting may wait for a living rank, in seconds.
        record: Folder for each rank's event log, from which the run can be replayed to the bit; None: no log.
        start_method: How local processes start: "popen", "spawn", "fork" or "forkserver".
        timeout: For the default process group, which is used at start-up only.
        process_group_backend: Backend of the default process group.
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: Who started the processes; found by the Trainer.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Set by the Trainer.
    """

    name = "lazy_sign"
    algorithm: LazySign

    def __init__(
        self,
        *,
        rule: Rule = "always",
        compress: Compress = "update",
        compressor: Compressor = "sign",
        scale: Scale = "block",
        block: int = BLOCK,
        stretch: float | None = None,
        min_size: int = 1024,
        exact: Sequence[str] = (),
        form: Form = "auto",
        news: News = "change",
        history: int = 10,
        history_weights: Sequence[float] | None = None,
        threshold: float = 0.8,
        error_weight: float = 0.0,
        max_skip: int = 7,
        deadline: float | None = None,
        ahead: int = 1,
        warm_up: int = 0,
        threads: int = 1,
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
        start_method: StartMethod = "popen",
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        check_saves(saves, "a round is of all ranks here, and a meeting behind it makes nobody wait long")
        if isinstance(exact, str):
            raise ValueError(f"`exact` must be a list of names, got {exact!r}: write [{exact!r}]")
        if not isinstance(exact, (list, tuple)) or not all(isinstance(name, str) for name in exact):
            raise ValueError(f"`exact` must be a list of names, got {exact!r}")
        knobs: dict[str, Any] = {
            "rule": rule,
            "compress": compress,
            "compressor": compressor,
            "scale": scale,
            "block": block,
            "stretch": stretch,
            "min_size": min_size,
            "form": form,
            "news": news,
            "history": history,
            "history_weights": history_weights,
            "threshold": threshold,
            "error_weight": error_weight,
            "max_skip": max_skip,
            "ahead": ahead,
            "warm_up": warm_up,
            "threads": threads,
        }
        super().__init__(
            LazySign(**knobs) if deadline is None else LateSign(deadline=deadline, **knobs),
            buffers=buffers,
            meet_every=meet_every,
            grace=grace,
            interface=interface,
            staging=staging,
            silence=silence,
            patience=patience,
            meeting_timeout=meeting_timeout,
            record=record,
            start_method=start_method,
            timeout=timeout,
            process_group_backend=process_group_backend,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.exact = tuple(exact)
        self._heirlooms: tuple[list[dict[str, Any]], int] = ([], 1)

    def setup(self, trainer: Trainer) -> None:
        """Refuse what a rank's gradients cannot be exchanged with."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.algorithm.compress == "gradient":
            self._refuse_for_gradients(trainer)
        _check_names(trainer.lightning_module, self.exact)

    def _beside(self) -> dict[str, Any]:
        """Also which parameters travel whole."""
        names = {id(p): name for name, p in self.trainer.lightning_module.named_parameters()}
        found = (i for i, (p, _) in enumerate(self.replica.places) if _matches(names.get(id(p), ""), self.exact))
        return {**super()._beside(), "whole": frozenset(found)}

    def on_train_start(self) -> None:
        """The algorithm learns which parameters have those names."""
        names = {id(p): name for name, p in self.trainer.lightning_module.named_parameters()}
        self.algorithm.travels_whole = lambda parameter: _matches(names.get(id(parameter), ""), self.exact)
        super().on_train_start()
        states, world = self._heirlooms
        self.algorithm.inherit(self.replica, states, world=world)
        self._heirlooms = ([], 1)

    def meet(self) -> Wish:
        """Nobody may wait for a rank that waits at a meeting."""
        if self.free and isinstance(self.algorithm, LateSign):
            self.office.drive(self.algorithm.stop(self.office.mail))
        return super().meet()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """Where another number of ranks saved it, what they had not sent yet falls to these."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only, **options)
        if self.trainer.state.fn == TrainerFn.FITTING and KEY in checkpoint:
            found = heirlooms(self, checkpoint_path, checkpoint, weights_only=weights_only)
            self._heirlooms = (found, checkpoint[KEY]["world"])
        return checkpoint

    @property
    def taken_over(self) -> str:
        """What a run with other ranks takes over."""
        if self.algorithm.rule == "innovation":
            return ""
        return (
            "What ranks had held back (error feedback) is shared out among the ranks of now, and its mean is kept, if "
            f"it was of compress={self.algorithm.compress!r} and not of rule='innovation'"
        )

    def _refuse_for_gradients(self, trainer: Trainer) -> None:
        who, remedy = f"strategy={self.name!r} with compress='gradient'", "use compress='update'"
        if words := refusal(self.optimizers, trainer.precision, who=who, remedy=remedy):
            raise MisconfigurationException(words)
        signs = self.algorithm.compressor == "sign"
        if signs and (words := warning(self.optimizers, who=who, remedy=f"{remedy}, the default")):
            rank_zero_warn(words)


def _check_names(module: LightningModule, exact: Sequence[str]) -> None:
    """Raise for a name in `exact` that no parameter has."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    for pattern in exact:
        if not any(_matches(name, (pattern,)) for name in names):
            few = ", ".join(names[:5])
            raise MisconfigurationException(
                f"`exact` names {pattern!r}, and no trainable parameter is called that; they are called {few}, ..."
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
