"""DelayedPipelineStrategy: the network is cut over the ranks, and no stage waits for the backward pass of another.

    rank 0          holds the last stage: loss, logging, progress bar and checkpoints are where they always are
    rank K - 1      holds the first one; with replicas, the next K ranks are the next pipeline

The glue only. What is computed when is in pipeline/; what the user's call means in `handover`; which weights live where
in `parts`; what a batch is on this rank in `turns`. Lightning's loop counts the batches of every rank; on those before
the last stage it skips its own backward pass and optimizer step, which come with the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.data.counts import samples_in
from lightning_async.pipeline import draws, partition
from lightning_async.pipeline.compensate import Compensate
from lightning_async.pipeline.edge import Wire
from lightning_async.pipeline.schedule import Order
from lightning_async.pipeline.stash import Semantics
from lightning_async.strategies import compat, whole, words
from lightning_async.strategies.garbage import Garbage
from lightning_async.strategies.handover import Handover
from lightning_async.strategies.knobs import StartMethod
from lightning_async.strategies.measuring import measured
from lightning_async.strategies.metrics import LedMetrics
from lightning_async.strategies.office import Office
from lightning_async.strategies.parts import Parts
from lightning_async.strategies.pipe_data import FromMidEpoch, stamp_of
from lightning_async.strategies.pipeline_refusals import check_knobs, refuse_pipeline, refuse_schedulers
from lightning_async.strategies.refusals import refuse, refuse_optimizers
from lightning_async.strategies.resting import Resting
from lightning_async.strategies.rests import Rests
from lightning_async.strategies.turns import Turns, stash_limit
from lightning_async.transport.mail import Wait

Split = Literal["even", "auto"]
Baseline = Literal["none", "sync"]


class DelayedPipelineStrategy(Resting):
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
        replicas: How many pipelines, which average their gradients; the number of ranks is divided among them.
        baseline: "sync": the pipe is drained after every update (1F1B over the accumulated batches), for comparison.
        wire: How tensors travel: "as_is", or float32 as "bf16".
        grace: Seconds that a run which gets a SIGTERM may take to stop after the same batch on all ranks, and save.
        interface: Network interface for the links; None: what GLOO_SOCKET_IFNAME says, or the host name's.
        silence: Seconds without a heartbeat after which a rank is no longer written to.
        patience: Seconds without a heartbeat after which a rank is declared dead, which ends the run.
        waiting_timeout: The longest that a stage may wait for one thing, in seconds.
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
        replicas: int = 1,
        baseline: Baseline = "none",
        wire: Wire = "as_is",
        grace: float = 10.0,
        interface: str | None = None,
        silence: float = 2.0,
        patience: float = 30.0,
        waiting_timeout: float = 1800.0,
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
            "baseline": (baseline, get_args(Baseline)),
            "wire": (wire, get_args(Wire)),
            "start_method": (start_method, get_args(StartMethod)),
        }
        check_knobs(chosen, split=split, shrink=shrink, anneal=anneal, replicas=replicas, baseline=baseline)
        self.stages, self.split, self.semantics, self.order, self.wire = stages, split, semantics, order, wire
        self.compensate, self.anneal, self.replicas, self.baseline = compensate, anneal, replicas, baseline
        self.timelines: dict[int, list[tuple[str, int, float, float]]] = {}
        self.office = Office(
            interface=interface, silence=silence, patience=patience, limit=waiting_timeout, grace=grace, record=None
        )
        self.shrink = shrink
        self.resumed = {}
        self._garbage = Garbage()
        self._leash: compat.Leash | None = None
        self._metrics: LedMetrics | None = None
        self._turns: Turns | None = None
        self._fresh = self.measuring = False
        self._found: tuple[int, ...] = ()

    # -- set-up and teardown -------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline train on the same batches; evaluation is the same on all replicas."""
        training = self.trainer.training
        return {
            "num_replicas": self.replicas if training else 1,
            "rank": self.global_rank // self.depth if training else 0,
        }

    def connect(self, model: LightningModule) -> None:
        """Stand first among the callbacks, once."""
        super().connect(model)
        callbacks = compat.callbacks(model.trainer)
        if not any(isinstance(c, Rests) for c in callbacks):
            callbacks.insert(0, Rests(self))

    def setup_environment(self) -> None:
        """Processes know each other; from here on `barrier` and its kind go through rounds."""
        trainer = self.trainer
        refuse(trainer, self.name)
        refuse_pipeline(trainer, self.name, self.world_size, self.replicas)
        self.office.check_network(self.num_nodes)
        self.office.check_complete(self.world_size)
        super().setup_environment()
        self.fitting = trainer.state.fn == TrainerFn.FITTING
        self.office.open(
            self.cluster_environment, self.global_rank, self.world_size, self.root_device, fitting=self.fitting
        )
        self._leash = compat.take_off(trainer, poll=self.listen, sigterm=self.office.sigterm, failed=self.give_up)
        self.closing = self.begun = self._stop = self._requeue = False
        self.office.flags.patient = lambda: self.closing or self.begun
        if self.fitting and self.piped:
            self.hear_requeue(self._leash)
        if self.replicas > 1:
            compat.share_by_sampler(trainer, self._leash)
        self.alone = not self.piped

    def setup(self, trainer: Trainer) -> None:
        """Cut the network, and take this rank's place in the pipe."""
        super(DDPStrategy, self).setup(trainer)
        self._metrics = LedMetrics(trainer.lightning_module, lambda state: [state], lambda: False)
        if self.fitting:
            refuse_optimizers(self.optimizers, self.name)
            refuse_schedulers(self.lr_scheduler_configs, self.name)
        if not self.piped:
            return
        if self.fitting:
            self.turns.parts.keep_own(self.optimizers)
        self.turns.begin(fitting=self.fitting)
        rank_zero_info(self._first_line())

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # no DDP wrapper
        """Make all ranks equal to rank 0, and keep the weights of the own stage."""
        module, leash = self.trainer.lightning_module, self._leash
        if leash is None:
            raise RuntimeError("there is no pipeline before `setup_environment`")
        self._wrap_log(module, leash)
        if not self.piped:
            return model
        handover = Handover(module, self.stages)
        seed = self.together(self._equalise(module))
        handover.take(leash)
        blocks = handover.blocks
        spans = partition.spans(self._cuts(handover), len(blocks))
        self._turns = Turns(self, handover, Parts(module, blocks, spans, self.index), seed=seed)
        if self.fitting:
            self.turns.batches = self.resumed.get("batches", 0)
            self.turns.passes = self.resumed.get("passes", 0)
            self.epoch_began = self.resumed.get("epoch_began", 0)
            self.turns.parts.send_away()
            compat.skip_backward(self.trainer, leash, not self.last)
            self._watch_loop(module, leash)
        return model

    def _equalise(self, module: torch.nn.Module) -> Wait[int]:
        """Rank 0's weights, buffers and random numbers, everywhere. Returns the seed of the run."""
        state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        mine = {"state": state, "random": torch.get_rng_state(), "seed": torch.initial_seed()}
        theirs = yield from whole.broadcast(self.office.rounds, mine, 0)
        module.load_state_dict(module.state_dict() | theirs["state"])
        torch.set_rng_state(theirs["random"])
        return int(self.resumed.get("seed", theirs["seed"]))

    def _cuts(self, handover: Handover) -> tuple[int, ...]:
        blocks = len(handover.blocks)
        try:
            if isinstance(self.split, list):
                return partition.check_cuts(self.split, blocks, self.depth)
            if self.split == "auto" and self.fitting:
                self._found = self.together(self._measured(handover))
            return self._found or partition.even(blocks, self.depth)
        except ValueError as error:
            raise MisconfigurationException(f"strategy={self.name!r}: `{handover.name}`: {error}") from None

    def _measured(self, handover: Handover) -> Wait[tuple[int, ...]]:
        """The cuts by rank 0's measurement of the blocks, on its first batch."""
        cuts: list[int] = []
        if self.global_rank == 0:
            cuts = list(partition.balanced(measured(self, handover), self.depth))
        return tuple((yield from words.broadcast(self.office.rounds, cuts, 0)))

    def _wrap_log(self, module: LightningModule, leash: compat.Leash) -> None:
        """The last stage logs. Its values are the run's, so Lightning need not ask for `sync_dist`."""

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if self.last and not self.measuring:
                original(name, value, *args, **{"sync_dist": True, **kwargs})

        original = leash.wrap(module, "log", log)

    def _watch_loop(self, module: LightningModule, leash: compat.Leash) -> None:
        """The ends of batches and epochs, behind all hooks of others that may log or stop there."""

        def on_train_epoch_end() -> None:
            original()
            self.rest()

        def on_run_start(fetcher: Any) -> None:
            run_start(fetcher)
            self.keep_stop()

        original = leash.wrap(module, "on_train_epoch_end", on_train_epoch_end)
        run_start = leash.wrap(self.trainer.fit_loop.epoch_loop, "on_run_start", on_run_start)
        compat.around_ends_of_batches(self.trainer, leash, self.stop_together, self.stop_after_rest)

    def teardown(self) -> None:
        """Say farewell, stop all threads, put Lightning back as it was. Idempotent."""
        self.alone, self.begun = True, False  # whatever is still called after this is local
        self._garbage.put_back()
        self.office.close()
        for replaced in (self._leash, self._metrics):
            if replaced is not None:
                replaced.restore()
        if self._turns is not None:
            self._turns.end()
        self.resumed = {}
        self.telling.forget()
        super().teardown()

    def give_up(self, exception: BaseException) -> None:
        """This rank stops: tell the others, and wait for nobody any more, but for those who stop in good order too."""
        if self.closing and isinstance(exception, SIGTERMException):
            return
        self.alone, self.begun = True, False
        self.office.announce(exception)

    def on_exception(self, exception: BaseException) -> None:
        """Lightning's own word that this rank stops."""
        self.give_up(exception)

    # -- batches -------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Stop here if somebody stopped the run."""
        self.office.listen()

    def process_dataloader(self, dataloader: object) -> object:
        """A new iterator draws its order next; where a run goes on, the one that it drew then."""
        if not self.piped or not self.trainer.training:
            return dataloader
        turns, between = self.turns, self.resumed.get("between_epochs", True)
        self._fresh = between  # in mid-epoch no epoch starts next
        draws.reseed(turns.seed, turns.batches if between else self.epoch_began, draws.BETWEEN)
        return dataloader if between else FromMidEpoch(dataloader, turns.batches - self.epoch_began)

    def epoch_started(self) -> None:
        """The order of the data is drawn next, the same on all ranks."""
        if self.piped:
            fresh, self._fresh = self._fresh, False
            self.epoch_began = self.turns.batches
            if not fresh:
                draws.reseed(self.turns.seed, self.turns.batches, draws.BETWEEN)

    def on_train_start(self) -> None:
        """Right before the first batch."""
        self._garbage.set_aside()
        if self.piped:
            self.begun = True
            self.put_back(self.resumed.get("kept", {}))
        if not self.last and self.lr_scheduler_configs:
            for optimizer in self.optimizers:  # its first real step comes late: without this torch would warn
                optimizer.zero_grad()
                optimizer.step()

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Note what the batch is, while it is here; its samples are counted once, on the last stage."""
        if self.last and self.trainer.training:
            self.samples += samples_in(batch) or 0
        if self._turns is not None and self.index in (0, self.depth - 1):
            self.turns.stamp = stamp_of(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`."""
        step = partial(super().training_step, *args, **kwargs)
        self.set_off()
        return self.turns.train(step, self.precision_plugin.train_step_context) if self.piped else step()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`."""
        step = partial(super().validation_step, *args, **kwargs)
        return self.turns.evaluate(step, self.precision_plugin.val_step_context) if self.piped else step()

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`."""
        step = partial(super().test_step, *args, **kwargs)
        return self.turns.evaluate(step, self.precision_plugin.test_step_context) if self.piped else step()

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`; rank 0 has the predictions."""
        step = partial(super().predict_step, *args, **kwargs)
        return self.turns.evaluate(step, self.precision_plugin.predict_step_context) if self.piped else step()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Of the last stage alone: the others have no loss."""
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self.piped:
            self.turns.went_back()
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The step that Lightning's loop asks for: on the last stage as ever, elsewhere it comes with the gradient."""
        if not self.last:
            return closure()

        def closure_then_average() -> Any:
            result = closure()
            self.turns.average()
            return result

        return super().optimizer_step(optimizer, closure_then_average if self.piped else closure, model, **kwargs)

    def step_now(self, optimizer: Optimizer) -> None:
        """The step of a stage before the last: its gradients are there. Hooks and clipping as ever."""
        with self.turns.around_step(optimizer):
            super().optimizer_step(optimizer, lambda: None)

    def on_train_end(self) -> None:
        """Every rank takes the whole module home."""
        if self.piped:
            passes = self.together(whole.gather(self.office.rounds, list(self.turns.place.timeline)))
            self.timelines = {self.depth - 1 - rank: line for rank, line in enumerate(passes[: self.depth])}
            self.turns.parts.take_home(self.together(self.gathered(self.trainer.lightning_module.state_dict())))

    # -- the ranks as one ----------------------------------------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """What rank 0 has is the run's."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """There is one model, so one tensor."""
        return tensor.unsqueeze(0)

    def _first_line(self) -> str:
        own = sum(p.numel() * p.element_size() for p in self.turns.parts.own())
        held = [stash_limit(stage, self.depth, self.order) for stage in range(self.depth)]
        return (
            f"{self.name}: {self.depth} stages, {self.replicas} replicas; the last stage has {own / 1e6:.3g} MB of "
            f"weights; batches held by the stages, first to last: {', '.join(map(str, held))} ({self.semantics})"
        )
