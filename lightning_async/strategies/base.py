"""AsyncStrategy: between meetings every rank runs free, at meetings all that live are one.

    setup            weights made equal, leash off, links opened
    batch            closure (backward -> before_step) -> clipping -> optimizer -> after_step
    last batch       MEETING: drain the mail, agree on the consensus; validation, metrics and checkpoints see it
    next batch       free again: `barrier`, `reduce` and `broadcast` are local
    teardown         farewells; rank 0, which may host the store, leaves last

The glue only: no arithmetic (algorithms/), no messages (transport/). A concrete strategy is a constructor with typed
knobs and an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.algorithms.adam import SecondMoment
from lightning_async.algorithms.algorithm import Algorithm, Shrink
from lightning_async.arrival import Arrival, ArrivalLog
from lightning_async.data.share import Balance
from lightning_async.progress.progress import Outcome
from lightning_async.progress.report import Wish
from lightning_async.replica import Replica
from lightning_async.strategies import compat, words
from lightning_async.strategies.averages import Averages
from lightning_async.strategies.buffers import Buffers, average_buffers, broadcast_frozen
from lightning_async.strategies.checkpoints import Checkpoints
from lightning_async.strategies.clock import Clock
from lightning_async.strategies.feeding import Feeding
from lightning_async.strategies.garbage import Garbage
from lightning_async.strategies.meetings import Meetings
from lightning_async.strategies.metrics import LedMetrics
from lightning_async.strategies.office import Office
from lightning_async.strategies.refusals import (
    refuse,
    refuse_manual,
    refuse_module,
    refuse_optimizers,
    refuse_schedulers,
)
from lightning_async.strategies.saved import agree_on_saved
from lightning_async.strategies.scaling import SkippedSteps
from lightning_async.strategies.statistics import Statistics
from lightning_async.strategies.trainable import check_unchanged, renewed
from lightning_async.transport.mail import Wait

T = TypeVar("T")
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
AtMeeting = Literal["adopt", "keep"]


class AsyncStrategy(DDPStrategy):
    """What all asynchronous strategies share."""

    name = "async"

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        at_meeting: AtMeeting = "adopt",
        balance: Balance = "claim",
        buffers: Buffers = "average",
        meet_every: int | None = None,
        grace: float = 10.0,
        interface: str | None = None,
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
        if at_meeting not in ("adopt", "keep"):
            raise ValueError(f"`at_meeting` must be 'adopt' or 'keep', got {at_meeting!r}")
        if buffers not in get_args(Buffers):
            raise ValueError(f"`buffers` must be 'average', 'reestimate' or 'local', got {buffers!r}")
        if start_method not in get_args(StartMethod):
            raise ValueError(f"`start_method` must be one of {', '.join(get_args(StartMethod))}, got {start_method!r}")
        self.algorithm = algorithm
        self.at_meeting = at_meeting
        self.buffers = buffers
        self.office = Office(
            interface=interface,
            silence=silence,
            patience=patience,
            limit=meeting_timeout,
            grace=grace,
            record=record,
        )
        self.feeding = Feeding(balance)
        self.checkpoints = Checkpoints(self)
        self.clock = Clock(self, meet_every)
        self.checkpoints.parts["progress"] = self.clock
        self._garbage = Garbage()
        self.steps = 0
        self.last_meeting: dict[str, float] = {}
        self._leash: compat.Leash | None = None
        self._metrics: LedMetrics | None = None
        self._replica: Replica | None = None
        self._moments: dict[int, SecondMoment] = {}
        self._skipped = SkippedSteps()
        self.statistics = Statistics()
        self._free = False
        self._stepped = self._closing = False
        self._arrivals = ArrivalLog()

    # -- what callbacks may use, the same for every strategy -----------------------------------------------------------

    def arrivals(self, reader: object = None) -> list[Arrival]:
        """What reached this rank since this reader's last call. A callback passes itself, so that each sees all."""
        return self._arrivals.read(reader)

    def traffic(self) -> Mapping[Any, Any]:
        """Bytes and messages by peer and kind, counted by the carrier."""
        return self.office.traffic()

    @property
    def skipped_steps(self) -> int:
        """How many of this rank's steps moved nothing, because fp16's gradient scaler found them not finite."""
        return self._skipped.count

    @property
    def shrink(self) -> Shrink:
        """Asked before every fold for a factor in (0, 1]; assign a function to shrink late contributions."""
        return self.algorithm.shrink

    @shrink.setter
    def shrink(self, law: Shrink) -> None:
        self.algorithm.shrink = law

    # -- set-up and teardown -------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Stand first among the callbacks, once."""
        super().connect(model)
        callbacks = compat.callbacks(model.trainer)
        if not any(isinstance(c, Meetings) for c in callbacks):
            callbacks[:0] = [Meetings(self), Averages(self)]

    def setup_environment(self) -> None:
        """Processes know each other; from here on `barrier` and its kind go through rounds."""
        trainer = self.trainer
        refuse(trainer, self.name)
        self.office.check_network(self.num_nodes)
        self.office.check_complete(self.world_size)
        super().setup_environment()
        fitting = trainer.state.fn == TrainerFn.FITTING
        self.office.recording.introduce(self)
        self.office.open(self.cluster_environment, self.global_rank, self.world_size, self.root_device, fitting=fitting)
        self._leash = compat.take_off(trainer, poll=self.listen, sigterm=self.office.sigterm, failed=self.give_up)
        self._free = self._closing = False
        self.office.flags.patient = lambda: self._closing or (self._free and self.clock.progress is not None)
        if fitting:
            self.clock.take(trainer)
            self.clock.hold(trainer, self._leash, lambda: self._meeting)

    def setup(self, trainer: Trainer) -> None:
        """Without DDP's wrapper and its collectives."""
        super(DDPStrategy, self).setup(trainer)
        self._metrics = LedMetrics(
            trainer.lightning_module,
            lambda state: self._together(words.gather_uneven(self.office.rounds, state)),
            lambda: self._meeting and self.world_size > 1,
        )
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_optimizers(self.optimizers, self.name)
            refuse_schedulers(self.lr_scheduler_configs, self.name)
            if self.buffers == "reestimate":
                refuse_manual(trainer.lightning_module, self.name)
            self._moments = {id(o): SecondMoment(o) for o in self.optimizers if SecondMoment.concerns(o)}
            rank_zero_info(self._first_line())

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # no DDP wrapper
        """Flatten the weights and make all replicas equal to rank 0's."""
        trainer = self.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return model
        refuse_module(model, self.name)
        self._replica = Replica(model.parameters())
        self._together(self._equalise(model))
        self.steps = self._skipped.count = 0
        return model

    def _equalise(self, model: torch.nn.Module) -> Wait[None]:
        """Rank 0's weights and buffers, everywhere."""
        replica = self.replica
        source = self.office.carrier.members()[0]
        weights = yield from self.office.rounds.broadcast(replica.flat.cpu(), source)
        replica.stand_in(weights)
        replica.stay()
        yield from broadcast_frozen(model, self.office.rounds, source)
        yield from average_buffers(model, self.office.rounds, weight=int(self.global_rank == source))

    def teardown(self) -> None:
        """Say farewell, stop all threads, put Lightning back as it was. Idempotent."""
        self._free = True  # whatever is still called after this is local
        self._garbage.put_back()
        self.clock.put_back()
        self.office.close()
        for replaced in (self._leash, self._metrics):
            if replaced is not None:
                replaced.restore()
        self.feeding.close()
        self.statistics.forget()
        self.checkpoints.forget()
        super().teardown()

    def give_up(self, exception: BaseException) -> None:
        """This rank stops: tell the others, and wait for nobody any more, but for those who stop in good order too."""
        if self._closing and isinstance(exception, SIGTERMException):
            return
        self._free, self._closing = True, False
        self.office.announce(exception)

    def on_exception(self, exception: BaseException) -> None:
        """Lightning's own word that this rank stops."""
        self.give_up(exception)

    # -- the batch -----------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Stop here if somebody stopped the run."""
        self.office.listen()

    def on_train_start(self) -> None:
        """The loader is known, the checkpoint is restored: the algorithm begins."""
        self.algorithm.begin(self.replica, self.office.mail, self.feeding.mass, self.office.algorithms_rounds)
        self.checkpoints.put_back()
        self.office.recording.start(self)
        self.clock.begin(self.trainer)
        self._roll_call()
        self._garbage.set_aside()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Let the algorithm see the gradients between backward and Lightning's hooks, clipping and update.

        They are this rank's own, not clipped yet; under fp16's gradient scaler they are still scaled.
        """

        def closure_then_exchange() -> Any:
            result = closure()
            self._arrivals.add(
                self._together(self.algorithm.before_step(self.replica, self.office.mail, self.steps + 1))
            )
            return result

        self._stepped = True
        self.office.recording.step_with(optimizer, self.optimizers)
        with self._skipped.watch(self.precision_plugin, optimizer):
            output = super().optimizer_step(optimizer, closure_then_exchange, model, **kwargs)
        if (moment := self._moments.get(id(optimizer))) is not None:
            moment.stretch(self.algorithm.averaged_over(len(self.office.mail.members())))
        return output

    def batch_ended(self, batch: Any) -> bool:
        """One batch is trained on; whether a meeting follows."""
        before = self.feeding.samples
        self.feeding.completed(batch)
        self._step_ended()
        return self.clock.batch_ended(self.trainer, self.feeding.samples - before)

    def _step_ended(self) -> None:
        """One step is one batch, however many optimizers stepped in it."""
        self.office.recording.batch()
        if not self._stepped:
            return
        self._stepped = False
        self.steps += 1
        mail = self.office.mail
        mail.at(self.steps)
        self._arrivals.add(self._together(self.algorithm.after_step(self.replica, mail, self.steps)))
        self.office.recording.stepped(self.steps, self.replica)

    # -- meetings ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> bool:
        """Whether this rank trains on its own, between two meetings."""
        return self._free and self._replica is not None and self.clock.progress is not None

    def meet(self) -> Wish:
        """All that live stop here and see the consensus; nothing is in flight. Returns what was asked for."""
        if not self.free:
            return Wish.NOTHING
        check_unchanged(self.trainer.lightning_module, self.replica)
        waited = self.office.carrier.now()
        self.clock.summon(self.trainer)
        outcome = self._roll_call()
        self.office.recording.meeting(self.replica)
        consensus = self._together(self.algorithm.meet(self.replica, self.office.mail))
        self._arrivals.add(self.algorithm.arrived())
        apart = self._together(words.mean_square(self.office.rounds, self.replica.flat.cpu(), consensus.cpu()))
        if self.buffers != "local":
            self._together(average_buffers(self.trainer.lightning_module, self.office.rounds))
        self.feeding.epoch_ended(deaths=len(self.office.carrier.members()) < self.world_size)
        self.replica.stand_in(consensus)
        self.office.recording.met(self.replica)
        if self.at_meeting == "adopt":
            self.replica.stay()
        self.last_meeting = {"spread": apart**0.5, "seconds": self.office.carrier.now() - waited}
        self._free = False
        self.clock.conclude(self.trainer, outcome)
        return outcome.wishes

    def _roll_call(self) -> Outcome:
        """Who is here, how far all have come, and what is to be done. Whoever has ended its epoch waits for the others
        as long as they get on."""
        progress = self.clock.progress
        if progress is None:
            raise RuntimeError("there is nothing to meet for outside of `fit`")
        words_of_all = self.office.rounds.agree(progress.word(), what="roll call")
        return progress.settle(self.office.drive(words_of_all, sign=progress.sign))

    def close_in_order(self) -> None:
        """The run was told to end, all have met: stop here, with the meeting open for those who save."""
        self._closing = True
        raise SIGTERMException()

    def set_off(self) -> None:
        """Leave a meeting: own weights again, unless they are the consensus. Free from here to the next one."""
        if self._free:
            return
        new = self._together(renewed(self.trainer.lightning_module, self.replica, self.office.rounds))
        if new is not None:
            self._replica = new
            self.algorithm.begin(new, self.office.mail, self.feeding.mass, self.office.algorithms_rounds)
        self.replica.check()  # a callback may have put other tensors in the place of the weights, and keep those
        adopted = not self.replica.away
        self.replica.come_back()
        self.algorithm.resume(self.replica, adopted=adopted)
        self.office.recording.set_off(self.trainer)
        self._free = True

    def on_train_end(self) -> None:
        """Every rank takes the consensus home, and rank 0's names of the checkpoints."""
        self.replica.stay()
        self.office.recording.finish()
        if self.buffers == "reestimate":
            module = self.trainer.lightning_module
            self._together(self.statistics.take_anew(module, self.training_step, self.office.rounds))
        self._together(agree_on_saved(self.trainer, self.office.rounds))

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank writes what one rank writes: the first that lives."""
        return self.global_rank == self.office.first

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """The consensus, and beside it what each rank has of its own. Between meetings there is none: say so."""
        if self._meeting and self.checkpoints.holds_all(checkpoint):
            self._together(self.checkpoints.save(checkpoint, filepath, storage_options))
            return
        if not self._meeting and self.office.is_open:
            rank_zero_warn(
                f"{self.name}: a checkpoint between meetings holds the weights of one rank, not the consensus; save at "
                "the end of an epoch"
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """What Lightning restores on this rank. Read by all ranks."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only, **options)
        return self._together(self.checkpoints.load(checkpoint_path, checkpoint)) if self._meeting else checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        """The main file, then the files of all ranks."""
        path = self.checkpoints.agreed(filepath)
        super().remove_checkpoint(path)
        if self.is_global_zero:
            self.checkpoints.remove(path)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all that live; between meetings, for nobody."""
        if self._meeting:
            self._together(self.office.rounds.barrier())

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s object (text, numbers, lists, dictionaries); between meetings, one's own.

        Lightning's rank 0 is the one that speaks for all: where it is dead, the first that lives.
        """
        src = self.office.first if src == 0 else src
        return self._together(words.broadcast(self.office.rounds, obj, src)) if self._meeting else obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Combine a tensor of all that live; between meetings, one's own."""
        if not isinstance(tensor, Tensor) or not self._meeting:
            return tensor
        return self._together(words.reduce(self.office.rounds, tensor, reduce_op))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """All (or any) of those that live; between meetings, one's own."""
        if not self._meeting:
            return decision
        return self._together(words.decide(self.office.rounds, decision, all))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """One tensor of each rank that lives; at meetings only."""
        if not self._meeting:
            raise MisconfigurationException(
                f"strategy={self.name!r}: `all_gather` between meetings would wait for ranks that are at other steps; "
                "call it in validation or at the end of an epoch, or use `ddp`"
            )
        return self._together(words.gather(self.office.rounds, tensor))

    # -- data ----------------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: object) -> object:
        """The training data are shared out by the balance; evaluation keeps Lightning's sampler."""
        trainer = self.trainer
        if trainer.training:
            self.checkpoints.before_loader()
        if not trainer.training or not compat.wants_our_sampler(trainer):
            return dataloader
        return self.feeding.share_out(dataloader, self.office, lambda: trainer.current_epoch)

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The Trainer that this strategy serves."""
        if self.lightning_module is None:
            raise RuntimeError("there is no trainer before `connect`")
        return self.lightning_module.trainer

    @property
    def replica(self) -> Replica:
        """This rank's weights. There are none before `setup`."""
        if self._replica is None:
            raise RuntimeError("there is no replica outside of `fit`")
        return self._replica

    def moment(self, optimizer: Optimizer) -> SecondMoment | None:
        """What corrects the steps of this optimizer, if it is one of those that need it."""
        return self._moments.get(id(optimizer))

    @property
    def _meeting(self) -> bool:
        return not self._free and self.office.is_open

    def _together(self, waiting: Wait[T]) -> T:
        return self.office.drive(waiting)

    def _first_line(self) -> str:
        size = self.replica.numel * self.replica.flat.element_size()
        return (
            f"{self.name}: {self.world_size} members, {size / 1e6:.3g} MB of weights each, data by "
            f"{self.feeding.balance!r}, at meetings they {self.at_meeting} the consensus"
        ).replace("keep the consensus", "keep their own weights")
