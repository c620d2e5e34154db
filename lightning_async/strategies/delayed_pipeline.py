"""DelayedPipelineStrategy: the network is cut over the ranks, and no stage waits for the backward pass of another.

    rank 0          holds the last stage: loss, logging, progress bar and checkpoints are where they always are
    rank K - 1      holds the first one; with replicas, the next K ranks are the next pipeline

The glue only. What is computed when is in pipeline/; what the user's call means in `handover`; which weights live where
in `parts`; what a batch is on this rank in `turns`. Lightning's loop counts the batches of every rank; on those before
the last stage it skips its own backward pass and optimizer step, which come with the gradients.
"""

from __future__ import annotations

from datetime import timedelta
from typing import get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision

from lightning_async.pipeline.compensate import Compensate
from lightning_async.pipeline.edge import Wire
from lightning_async.pipeline.schedule import Order
from lightning_async.pipeline.stash import Semantics
from lightning_async.strategies.knobs import StartMethod, check_lightnings, check_text
from lightning_async.strategies.office import Office, check_backend
from lightning_async.strategies.pipe_recording import StageRecording
from lightning_async.strategies.pipe_setup import Baseline, Clip, PipeSetup, Split
from lightning_async.strategies.pipeline_refusals import check_knobs, without_meetings


class DelayedPipelineStrategy(PipeSetup):
    """Delayed-gradient pipeline (FDG, ADL): each rank trains some layers and waits for no backward pass of the others.

    After a fit `timelines` has the first passes of each stage: direction, batch, begin and end by its host's clock.

    Args:
        stages: Name of the `nn.Sequential` (or `nn.ModuleList`, called in order) that is cut; None: the module has a
            method `configure_stages()` that returns the list of its blocks.
        split: "even" (numbers of blocks), "auto" (measured seconds of the blocks), or the numbers of the blocks at
            which a stage begins, for all but the first.
        shrink: Factor on each gradient that comes from the stage behind; it multiplies from stage to stage. For Adam
            and its kind, which see no such factor, it goes on the learning rates of the stages.
        semantics: Which weights a late backward pass meets: "stash" (those of its forward pass), "recompute" (those of
            now), or "hybrid" (old activations and new weights, as in the code of the paper).
        order: "update_first" or "forward_first": whether a stage applies a gradient before its next forward pass.
        compensate: What is done about the delay beside shrinking: "none", "lr" (late stages begin with smaller steps),
            "predict" (forward with predicted weights), "nesterov" (for SGD with momentum).
        anneal: Updates over which "lr" fades.
        clip: What `gradient_clip_val` limits: the norm of each "stage", or that of all stages of the "pipe", of which a
            stage knows its own now and the others' as they last told: an update old, and older by a batch a hop.
        replicas: How many pipelines, which average their gradients; the number of ranks is divided among them.
        baseline: "sync": the pipe is drained after every update (1F1B over the accumulated batches), for comparison.
        wire: How tensors travel: "as_is", or float32 as "bf16".
        grace: Seconds that a run which gets a SIGTERM may take to stop after the same batch on all ranks, and save.
        interface: Network interface for the links; None: what GLOO_SOCKET_IFNAME says, or the host name's.
        staging: Bytes of host memory that a link may need, whatever travels on it; None: 17.8 MB.
        silence: Seconds without a heartbeat after which a rank is no longer written to.
        patience: Seconds without a heartbeat after which a rank is declared dead, which ends the run.
        waiting_timeout: The longest that a stage may wait for one thing, in seconds.
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

    name = "delayed_pipeline"

    @without_meetings
    def __init__(
        self,
        *,
        stages: str | None = None,
        split: Split | list[int] = "even",
        shrink: float = 1.0,
        semantics: Semantics = "stash",
        order: Order = "update_first",
        compensate: Compensate = "none",
        anneal: int = 1000,
        clip: Clip = "stage",
        replicas: int = 1,
        baseline: Baseline = "none",
        wire: Wire = "as_is",
        grace: float = 10.0,
        interface: str | None = None,
        staging: int | None = None,
        silence: float = 2.0,
        patience: float = 30.0,
        waiting_timeout: float = 1800.0,
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
        check_backend(process_group_backend)
        check_lightnings(
            timeout=timeout,
            parallel_devices=parallel_devices,
            accelerator=accelerator,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        chosen = {
            "semantics": (semantics, get_args(Semantics)),
            "order": (order, get_args(Order)),
            "compensate": (compensate, get_args(Compensate)),
            "clip": (clip, get_args(Clip)),
            "baseline": (baseline, get_args(Baseline)),
            "wire": (wire, get_args(Wire)),
            "start_method": (start_method, get_args(StartMethod)),
        }
        check_text("stages", stages, "the name of the module that is cut")
        check_knobs(chosen, split=split, shrink=shrink, anneal=anneal, replicas=replicas, baseline=baseline)
        self.stages, self.split, self.semantics, self.order, self.wire = stages, split, semantics, order, wire
        self.compensate, self.anneal, self.replicas, self.baseline = compensate, anneal, replicas, baseline
        self.clip, self.timeout, self.staging = clip, timeout, staging
        self.office = Office(
            interface=interface,
            staging=staging,
            silence=silence,
            patience=patience,
            limit=waiting_timeout,
            limit_knob="waiting_timeout",
            grace=grace,
            record=None,
        )
        self.office.recording = StageRecording(record)
        self.shrink = shrink
