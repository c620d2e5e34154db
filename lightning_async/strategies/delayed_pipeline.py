"""DelayedPipelineStrategy: the network is cut over the ranks, and no stage waits for the backward pass of another.

    rank 0          holds the last stage: loss, logging, progress bar and checkpoints are where they always are
    rank K - 1      holds the first one

The glue only: what is computed when is in pipeline/, what the user's call means in `handover`, which weights live where
in `parts`. Training steps that are not the last stage's are driven from here: Lightning's loop counts them, and skips
its own backward pass and optimizer step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.arrival import Arrival, ArrivalLog
from lightning_async.data.counts import samples_in
from lightning_async.pipeline import draws, partition
from lightning_async.pipeline.edge import Wire
from lightning_async.pipeline.place import Place, Shrink
from lightning_async.pipeline.schedule import Order, check
from lightning_async.pipeline.stage import Stage, gradient_of
from lightning_async.pipeline.stash import Semantics
from lightning_async.progress.tally import Tally
from lightning_async.strategies import compat, whole, words
from lightning_async.strategies.base import StartMethod
from lightning_async.strategies.garbage import Garbage
from lightning_async.strategies.handover import HandedOver, Handover
from lightning_async.strategies.metrics import LedMetrics
from lightning_async.strategies.office import Office
from lightning_async.strategies.parts import Parts
from lightning_async.strategies.pipeline_refusals import refuse_pipeline, refuse_schedulers
from lightning_async.strategies.pipeline_shown import PipelineShown
from lightning_async.strategies.refusals import refuse, refuse_optimizers
from lightning_async.strategies.rests import Rests
from lightning_async.strategies.telling import Telling
from lightning_async.transport.mail import Wait

T = TypeVar("T")
Split = Literal["even", "auto"]
KEY = "delayed_pipeline"
"""Our key in a checkpoint: what a plain run has no need of."""


class DelayedPipelineStrategy(PipelineShown):
    """Delayed-gradient pipeline (FDG, ADL): each rank trains some layers and waits for no backward pass of the others.

    Args:
        stages: Name of the `nn.Sequential` (or `nn.ModuleList`, called in order) that is cut; None: the module has a
            method `configure_stages()` that returns the list of its blocks.
        split: "even" (numbers of blocks), "auto" (measured seconds of the blocks), or the numbers of the blocks at
            which a stage begins, for all but the first.
        shrink: Factor on each gradient that comes from the stage behind; it multiplies from stage to stage.
        semantics: Which weights a late backward pass meets: "stash" (those of its forward pass), "recompute" (those of
            now), or "hybrid" (old activations and new weights, as in the code of the paper).
        order: "update_first" or "forward_first": whether a stage applies a gradient before its next forward pass.
        wire: How tensors travel: "as_is", or float32 as "bf16".
        grace: Seconds that a run which gets a SIGTERM may take to stop.
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
        check(1, order)
        if isinstance(split, str) and split not in get_args(Split):
            raise ValueError(f"`split` must be 'even', 'auto' or a list of block numbers, got {split!r}")
        if not callable(shrink) and not 0 < shrink <= 1:
            raise ValueError(f"`shrink` must be above 0 and at most 1, got {shrink}")
        for knob, value, allowed in (("semantics", semantics, get_args(Semantics)), ("wire", wire, get_args(Wire))):
            if value not in allowed:
                raise ValueError(f"`{knob}` must be one of {', '.join(allowed)}, got {value!r}")
        if start_method not in get_args(StartMethod):
            raise ValueError(f"`start_method` must be one of {', '.join(get_args(StartMethod))}, got {start_method!r}")
        self.stages, self.split, self.semantics, self.order, self.wire = stages, split, semantics, order, wire
        self.office = Office(
            interface=interface, silence=silence, patience=patience, limit=waiting_timeout, grace=grace, record=None
        )
        self.batches = self._samples = 0
        self.telling = Telling(lambda: self.office, lambda: Tally(self.batches, self._updates(), self._samples))
        self._shrink: float | Shrink = shrink
        self._passes = 0
        self._epoch_began = 0
        self._seed = 0
        self._stamp = 0
        self._resumed: Mapping[str, Any] = {}
        self._garbage = Garbage()
        self._arrivals = ArrivalLog()
        self._leash: compat.Leash | None = None
        self._metrics: LedMetrics | None = None
        self._place: Place | None = None
        self._entered: Tensor | None = None
        self._given_up = self._fitting = self._seen = self._first_look = self._fresh = False
        self._resting = True
        self._noted: list[Tensor] = []

    # -- what callbacks may use, the same for every strategy -----------------------------------------------------------

    def arrivals(self, reader: object = None) -> list[Arrival]:
        """The gradients that reached this stage since this reader's last call."""
        return self._arrivals.read(reader)

    def traffic(self) -> Mapping[Any, Any]:
        """Bytes and messages by peer and kind, counted by the carrier."""
        return self.office.traffic()

    @property
    def shrink(self) -> float | Shrink:
        """The factor on what comes from the stage behind, or the law that is asked for it."""
        return self._shrink

    @shrink.setter
    def shrink(self, law: float | Shrink) -> None:
        self._shrink = law
        if self._place is not None:
            self._place.shrink = law

    # -- set-up and teardown -------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline see the same batches."""
        return {"num_replicas": 1, "rank": 0}

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
        refuse_pipeline(trainer, self.name)
        self.office.check_network(self.num_nodes)
        self.office.check_complete(self.world_size)
        super().setup_environment()
        self._given_up = False
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        self.office.open(
            self.cluster_environment, self.global_rank, self.world_size, self.root_device, fitting=self._fitting
        )
        self._leash = compat.take_off(trainer, poll=self.listen, sigterm=self.office.sigterm, failed=self.give_up)

    def setup(self, trainer: Trainer) -> None:
        """Cut the network, and take this rank's place in the pipe."""
        super(DDPStrategy, self).setup(trainer)
        module = trainer.lightning_module
        self._metrics = LedMetrics(module, lambda state: [state], lambda: False)
        if self._fitting:
            refuse_optimizers(self.optimizers, self.name)
            refuse_schedulers(self.lr_scheduler_configs, self.name)
        if self._fitting and self.piped:
            self.parts.keep_own(self.optimizers)
        if self.piped:
            self._take_place()

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # no DDP wrapper
        """Make all ranks equal to rank 0, and keep the weights of the own stage."""
        module, leash = self.trainer.lightning_module, self._leash
        if leash is None:
            raise RuntimeError("there is no pipeline before `setup_environment`")
        self._wrap_log(module, leash)
        if not self.piped:
            return model
        self.handover = Handover(module, self.stages)
        self._drive(self._equalise(module))
        blocks = self.handover.blocks
        cuts = self._cuts(len(blocks))
        self.parts = Parts(module, blocks, partition.spans(cuts, len(blocks)), self.index)
        self.handover.take(leash)
        if self._fitting:
            self.parts.send_away()
            compat.skip_backward(self.trainer, leash, self.index < self.world_size - 1)
        self._wrap_epoch_end(module, leash)
        return model

    def _equalise(self, module: torch.nn.Module) -> Wait[None]:
        """Rank 0's weights, buffers and random numbers, everywhere."""
        mine = {"state": _filled(module.state_dict()), "random": torch.get_rng_state(), "seed": torch.initial_seed()}
        theirs = yield from whole.broadcast(self.office.rounds, mine, 0)
        module.load_state_dict(module.state_dict() | theirs["state"])
        torch.set_rng_state(theirs["random"])
        self._seed = self._resumed.get("seed", theirs["seed"])
        self.batches = self._epoch_began = self._passes = 0
        if self._fitting and self._resumed:
            self.batches, self._passes = self._resumed["batches"], self._resumed["passes"]
            self._epoch_began = self._resumed["epoch_began"]

    def _cuts(self, blocks: int) -> tuple[int, ...]:
        if isinstance(self.split, list):
            return partition.check_cuts(self.split, blocks, self.world_size)
        try:
            return partition.even(blocks, self.world_size)
        except ValueError as error:
            raise MisconfigurationException(
                f"strategy={self.name!r}: `{self.handover.name}`: {error}; use fewer devices, or more blocks"
            ) from None

    def _take_place(self) -> None:
        parts, seed = self.parts, self._seed
        stage = Stage(
            self.index,
            self.world_size,
            parts.own() if self._fitting else (),
            buffers=parts.buffers(),
            semantics=self.semantics,
            reseed=lambda batch: draws.reseed(seed, batch, self.index + 1),
        )
        self._seen = False
        self._place = Place(
            stage,
            self.office.mail,
            list(reversed(range(self.world_size))),
            update=self._update,
            shrink=self._shrink,
            order=self.order,
            wire=self.wire,
            device=self.root_device,
            since=self.batches,
        )

    def _wrap_log(self, module: LightningModule, leash: compat.Leash) -> None:
        """The last stage logs. Its values are the run's, so Lightning need not ask for `sync_dist`."""

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if self.index == self.world_size - 1:
                original(name, value, *args, **{"sync_dist": True, **kwargs})

        original = leash.wrap(module, "log", log)

    def _wrap_epoch_end(self, module: LightningModule, leash: compat.Leash) -> None:
        """After the module's own hook, which may log, and before the callbacks that monitor."""

        def on_train_epoch_end() -> None:
            original()
            self.rest()

        original = leash.wrap(module, "on_train_epoch_end", on_train_epoch_end)

    def teardown(self) -> None:
        """Say farewell, stop all threads, put Lightning back as it was. Idempotent."""
        self._given_up = True  # whatever is still called after this is local
        self._garbage.put_back()
        self.office.close()
        for replaced in (self._leash, self._metrics):
            if replaced is not None:
                replaced.restore()
        if self._place is not None:
            self._place.stage.clear()
        self._place, self._resumed = None, {}
        self.telling.forget()
        super().teardown()

    def give_up(self, exception: BaseException) -> None:
        """This rank stops: tell the others, and wait for nobody any more."""
        self._given_up = True
        self.office.announce(exception)

    def on_exception(self, exception: BaseException) -> None:
        """Lightning's own word that this rank stops."""
        self.give_up(exception)

    # -- training ------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Stop here if somebody stopped the run."""
        self.office.listen()

    def epoch_started(self) -> None:
        """The order of the data is drawn next: the same on all ranks, and the same where a run goes on from here."""
        fresh, self._fresh = self._fresh, False
        self._epoch_began = self.batches
        if self.piped and not fresh:
            draws.reseed(self._seed, self.batches, draws.BETWEEN)

    def on_train_start(self) -> None:
        """Right before the first batch."""
        self._garbage.set_aside()
        self._put_back(self._resumed.get("kept", {}))
        if self.piped and self.index < self.world_size - 1 and self.lr_scheduler_configs:
            for optimizer in self.optimizers:  # its first real step comes late: without this torch would warn
                optimizer.zero_grad()
                optimizer.step()

    def process_dataloader(self, dataloader: object) -> object:
        """A new iterator draws its order next."""
        if self.piped and self.trainer.training:
            self._fresh = True
            if self._resumed:
                began = self.batches if self._resumed["between_epochs"] else self._epoch_began
                draws.reseed(self._seed, began, draws.BETWEEN)
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Note what the batch is, while it is here; its samples are counted once, on the last stage."""
        if self.global_rank == 0 and self.trainer.training:
            self._samples += samples_in(batch) or 0
        if self.piped and self.index in (0, self.world_size - 1):
            self._stamp = stamp_of(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A batch comes: on the last stage an ordinary step, on the others a turn of theirs."""
        if not self.piped:
            return super().training_step(*args, **kwargs)
        if self._resting:
            self._resting = False
            self.telling.set_off()
        self.batches += 1
        place, batch = self.place, self.batches
        self._drive(place.begin(batch, ends=compat.ends_in_step(self.trainer)))
        if place.stage.last:
            return self._run_user("training_step", args, kwargs, self._enter)
        if self.index == 0:
            with place.stage.stash.keeping():
                self._run_user("training_step", args, kwargs, self._hand_over)
        else:
            self._relay(batch)
        self._drive(place.end())
        self._settle_batch()
        return torch.zeros((), device=self.root_device)

    def _enter(self, x: Tensor) -> Tensor:
        """On the last stage: what the call gives is what came from the stage before, run through the last blocks."""
        place, batch = self.place, self.batches
        self._look(x)
        parcel = self._drive(place.arrived(batch))
        self._compare(parcel.stamp, batch)
        self._entered, out = place.stage.enter(batch, parcel.tensor, self._compute)
        return out

    def _hand_over(self, x: Tensor) -> Tensor:
        """On the first stage: run the own blocks, pass on what they made, and end the user's step."""
        place, batch = self.place, self.batches
        self._look(x)
        out = place.stage.forward(batch, x, self._compute, step=place.updates)
        self._drive(place.pass_on(batch, out, self._stamp))
        raise HandedOver

    def _relay(self, batch: int) -> None:
        place = self.place
        parcel = self._drive(place.arrived(batch))
        out = place.stage.forward(batch, parcel.tensor, self._compute, step=place.updates)
        self._drive(place.pass_on(batch, out, parcel.stamp))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Of the last stage alone: the others have no loss."""
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._entered is not None:
            if self._first_look:
                self.parts.refuse_strays()
            entered, self._entered = self._entered, None
            self._drive(self.place.give_back(self.batches, gradient_of(entered)))
            self._drive(self.place.end())
            self._settle_batch()
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """The step that Lightning's loop asks for: on the last stage as ever, elsewhere it came with the gradient."""
        if self.piped and self.index < self.world_size - 1:
            return closure()
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _update(self) -> None:
        """The step of a stage before the last: its gradients are there. Hooks and clipping as ever."""
        for optimizer in self.optimizers:
            super().optimizer_step(optimizer, lambda: None)

    def _settle_batch(self) -> None:
        self._arrivals.add(self.place.arrivals)
        self.place.arrivals.clear()
        draws.reseed(self._seed, self.batches, draws.BETWEEN)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """A batch through all stages, as they are now."""
        return self._evaluate("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        return self._evaluate("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise; rank 0 has the predictions."""
        return self._evaluate("predict_step", args, kwargs)

    def _evaluate(self, step: str, args: Any, kwargs: Any) -> Any:
        if not self.piped:
            return getattr(super(), step)(*args, **kwargs)
        self._passes += 1
        place, number = self.place, -self._passes

        def answer(x: Tensor) -> Tensor:
            if place.stage.last:
                parcel = self._drive(place.arrived(number))
                self._compare(parcel.stamp, number)
                return place.stage.evaluate(number, parcel.tensor, self._compute)
            self._drive(place.pass_on(number, place.stage.evaluate(number, x, self._compute), self._stamp))
            raise HandedOver

        if self.index in (0, self.world_size - 1):
            output = self._run_user(step, args, kwargs, answer)
        else:
            parcel = self._drive(place.arrived(number))
            out = place.stage.evaluate(number, parcel.tensor, self._compute)
            output = self._drive(place.pass_on(number, out, parcel.stamp))
        draws.reseed(self._seed, number, draws.BETWEEN)
        return output

    # -- rests ---------------------------------------------------------------------------------------------------------

    def rest(self, *, drain: bool = False) -> None:
        """All stages are after the same batch; all know what the last one logged, and whether to stop."""
        if not self.piped or self._given_up:
            return
        if drain:
            self._drain()
        self.telling.arrive()
        self._drive(self.place.rest(self.batches + self._passes))
        trainer = self.trainer
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        known = self._drive(words.broadcast(self.office.rounds, metrics, 0))
        if self.global_rank != 0:
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in known.items()})
        trainer.should_stop = self._drive(words.decide(self.office.rounds, trainer.should_stop, False))
        if self._fitting and self.telling.begun:
            self._drive(self._rested())
        self._resting = True

    def _drain(self) -> None:
        self._drive(self.place.drain())
        self._settle_batch()

    def on_train_end(self) -> None:
        """Every rank takes the whole module home."""
        if self.piped:
            state = self._drive(self._gathered(self.trainer.lightning_module.state_dict()))
            self.parts.take_home(state)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the whole module. Called by all ranks; the pipe is drained, so that a run can go on from it."""
        state = super().lightning_module_state_dict()
        if not self._together:
            return state
        if self._fitting:
            self._drain()
            state = super().lightning_module_state_dict()
        return self._drive(self._gathered(state))

    def _gathered(self, state: dict[str, Any]) -> Wait[dict[str, Any]]:
        names = self.parts.names() if self._fitting else set()
        own = {name: value for name, value in state.items() if name in names}
        for part in (yield from whole.gather(self.office.rounds, own)):
            state |= part
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state over all parameters, as that of the optimizer that the user made."""
        if not self._together or not self._fitting:
            return super().optimizer_state(optimizer)
        return self._drive(self.parts.optimizer_state(optimizer, self.office.rounds))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """What belongs to the parameters that live here."""
        if not self.piped:
            super().load_optimizer_state_dict(checkpoint)
            return
        states = [
            self.parts.own_state(optimizer, state)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Rank 0 writes an ordinary checkpoint; after an exception there is nothing whole to write."""
        if self.piped and self._given_up:
            rank_zero_warn(f"{self.name}: {filepath} is not written: after an exception a rank has its own stage only")
            return
        if self.piped and self._fitting:
            checkpoint[KEY] = {
                "batches": self.batches,
                "passes": self._passes,
                "epoch_began": self._epoch_began,
                "between_epochs": self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
                "seed": self._seed,
                "kept": self._drive(self._kept()),
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """Read by all ranks."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only, **options)
        self._resumed = checkpoint.get(KEY, {})
        return checkpoint

    # -- the ranks as one ----------------------------------------------------------------------------------------------

    @property
    def piped(self) -> bool:
        """Whether there is more than one stage; a single one is plain training."""
        return self.world_size > 1

    @property
    def _together(self) -> bool:
        return self.piped and not self._given_up and self.office.is_open

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all."""
        if self._together:
            self._drive(self.office.rounds.barrier())

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s object (text, numbers, lists, dictionaries)."""
        return self._drive(words.broadcast(self.office.rounds, obj, src)) if self._together else obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """There is one replica: its value is the value."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """All (or any) of the ranks."""
        return self._drive(words.decide(self.office.rounds, decision, all)) if self._together else decision

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """There is one replica, so one tensor."""
        return tensor.unsqueeze(0)

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The Trainer that this strategy serves."""
        if self.lightning_module is None:
            raise RuntimeError("there is no trainer before `connect`")
        return self.lightning_module.trainer

    @property
    def place(self) -> Place:
        """This rank's place in the pipe. There is none before `setup`."""
        if self._place is None:
            raise RuntimeError("there is no place in the pipe outside of a run")
        return self._place

    def _updates(self) -> int:
        return self._place.updates if self._place is not None else 0

    def _drive(self, waiting: Wait[T]) -> T:
        return self.office.drive(waiting)

    def _compute(self, x: Tensor) -> Tensor:
        with self.precision_plugin.forward_context():
            return self.handover.run(self.parts.blocks, x)

    def _run_user(self, step: str, args: Any, kwargs: Any, answer: Any) -> Any:
        """The user's step; on the first stage, up to the call."""
        number = self.batches if step == "training_step" else -self._passes
        draws.reseed(self._seed, number, draws.BEFORE_THE_CALL)
        with self._noting_buffers(), self.handover.answering(answer, step):
            try:
                return getattr(super(), step)(*args, **kwargs)
            except HandedOver:
                return None

    def _look(self, x: Tensor) -> None:
        """In the first batch of a run the call shows what lies before it."""
        self._first_look = not self._seen
        if self._first_look:
            self.parts.saw_call(x, self._noted, self.optimizers)
            self._seen = True

    @contextmanager
    def _noting_buffers(self) -> Iterator[None]:
        """In the first batch, note the buffers of the modules outside the blocks that run before the call."""
        self._noted = []
        if self._seen or not self._fitting:
            yield
            return
        inside = {id(part) for block in self.handover.blocks for part in block.modules()}
        hooks = [
            part.register_forward_pre_hook(lambda part, _: self._noted.extend(part.buffers(recurse=False)))
            for part in self.trainer.lightning_module.modules()
            if id(part) not in inside
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, stamp: int, batch: int) -> None:
        if stamp != self._stamp:
            raise MisconfigurationException(
                f"strategy={self.name!r}: the first and the last stage were given different data in batch {abs(batch)}"
                ": every rank must read the same batches. Let the order of the data, and what is random in it, depend "
                "on the seed alone (not on the rank, and not on numbers that one rank draws by itself)"
            )


def stamp_of(batch: Any) -> int:
    """A number that tells two batches apart, from their shapes and some of their values."""
    stamp = 0

    def look(tensor: Tensor) -> Tensor:
        nonlocal stamp
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)].tolist()
        stamp = zlib.crc32(repr((tuple(tensor.shape), some)).encode(), stamp)
        return tensor

    apply_to_collection(batch, Tensor, look)
    return stamp


def _filled(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
