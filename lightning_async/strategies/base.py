"""AsyncStrategy: between meetings every rank runs free, at meetings all that live are one.

    setup            weights made equal, leash off, links opened
    batch            closure (backward -> before_step) -> clipping -> optimizer -> after_step   [stepping]
    last batch       MEETING: drain the mail, agree on the consensus                            [consensus]
                     validation, metrics and checkpoints see it                                 [collectives, saving]
    next batch       free again: `barrier`, `reduce` and `broadcast` are local
    teardown         farewells; rank 0, which may host the store, leaves last

The glue only: no arithmetic (algorithms/), no messages (transport/). A concrete strategy is a constructor with typed
knobs and an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lightning_async.algorithms.adam import SecondMoment
from lightning_async.algorithms.algorithm import Algorithm, no_shrink
from lightning_async.data.balance import meant_by
from lightning_async.data.share import Balance
from lightning_async.progress.report import Wish
from lightning_async.replica import Replica
from lightning_async.strategies import compat, unreplayable, words
from lightning_async.strategies.account import Account, account, model_of, state_of, wider_state
from lightning_async.strategies.averages import Averages, miss_no_step
from lightning_async.strategies.batchnorm import Statistics
from lightning_async.strategies.buffers import Buffers
from lightning_async.strategies.checkpoints import Checkpoints
from lightning_async.strategies.clock import Clock
from lightning_async.strategies.consensus import Consensus
from lightning_async.strategies.cuts import Cuts
from lightning_async.strategies.facts import digest, name_of
from lightning_async.strategies.feeding import Feeding
from lightning_async.strategies.first_line import of_members
from lightning_async.strategies.garbage import Garbage
from lightning_async.strategies.inner_layer import InnerLayer
from lightning_async.strategies.knobs import AtMeeting, Saves, StartMethod, check_lightnings, check_word
from lightning_async.strategies.meetings import Meetings
from lightning_async.strategies.members import Inner, check_inner, ranks_of_members
from lightning_async.strategies.metrics import LedMetrics
from lightning_async.strategies.office import Office, check_backend
from lightning_async.strategies.one_thread import spare_the_threads
from lightning_async.strategies.refusals import (
    refuse,
    refuse_cuts,
    refuse_inner,
    refuse_length,
    refuse_module,
    refuse_run,
    refuse_unmade,
)
from lightning_async.strategies.saved import name_alike
from lightning_async.strategies.saving import guard_exits
from lightning_async.strategies.shown import Shown
from lightning_async.strategies.stepping import Stepping
from lightning_async.strategies.unsaved import Unsaved
from lightning_async.strategies.voice import voice
from lightning_async.strategies.whole_files import WholeFiles
from lightning_async.strategies.writer import Writer
from lightning_async.transport.world import check_world


class AsyncStrategy(Shown):
    """What all asynchronous strategies share.

    Attributes:
        saves: How checkpoints by steps are taken.
    """

    saves: Saves = "meeting"

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        at_meeting: AtMeeting = "adopt",
        balance: Balance | None = None,
        buffers: Buffers = "average",
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
        check_word("at_meeting", at_meeting, get_args(AtMeeting))
        check_word("buffers", buffers, get_args(Buffers))
        check_word("start_method", start_method, get_args(StartMethod))
        check_inner(inner, inner_size)
        self.algorithm, self.at_meeting, self.buffers, self.timeout = algorithm, at_meeting, buffers, timeout
        self.voice, self.inner, self.inner_size, self.staging = algorithm, inner, inner_size, staging
        self.office = Office(
            interface=interface,
            staging=staging,
            silence=silence,
            patience=patience,
            limit=meeting_timeout,
            grace=grace,
            record=record,
        )
        self.feeding = Feeding(meant_by(balance, in_step=algorithm.in_step))
        self.clock = Clock(self, meet_every)
        self.checkpoints, self.cuts = Checkpoints(self), Cuts(self)
        self.stepping, self.consensus, self.statistics = Stepping(self), Consensus(self), Statistics()
        self.checkpoints.parts |= {"progress": self.clock, "stepping": self.stepping}
        self._garbage, self._unsaved, self._closing = Garbage(), Unsaved(self), False
        self.inner_threads, self._inner = inner_threads, InnerLayer(inner_threads)
        self._leash: compat.Leash | None = None
        self._metrics: LedMetrics | None = None
        self._replica: Replica | None = None

    # -- set-up and teardown -------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Stand first among the callbacks, once; what Lightning would write, is written whole."""
        super().connect(model)
        self.checkpoint_io = compat.with_inner(self.checkpoint_io, TorchCheckpointIO, WholeFiles)
        compat.let_write(self.checkpoint_io, Writer(self.checkpoints.late.patience))
        callbacks = compat.callbacks(model.trainer)
        if not any(isinstance(c, Meetings) for c in callbacks):
            callbacks[:0] = [Meetings(self), Averages(self)]

    def setup_environment(self) -> None:
        """Processes know each other; from here on `barrier` and its kind go through rounds."""
        trainer = self.trainer
        refuse(trainer, self.name)
        self.office.check_network(self.num_nodes)
        self.office.check_complete(self.world_size)
        self.set_world_ranks()  # what the cluster's environment says now, and no earlier Trainer's
        check_world(self.world_size)
        super().setup_environment()
        spare_the_threads()
        fitting = trainer.state.fn == TrainerFn.FITTING
        self.office.ranks_of_members = self._ranks_of_members() if fitting else ()
        self.office.recording.introduce(self)
        self.office.open(self.cluster_environment, self.global_rank, self.world_size, self.root_device, fitting=fitting)
        self.voice = voice(self.algorithm, self.office.siblings, self.together)
        self._leash = compat.take_off(trainer, poll=self.listen, sigterm=self.office.sigterm, failed=self.give_up)
        self.alone = self.apart = self._closing = False
        self.office.flags.patient = lambda: self._closing or self.clock.progress is not None
        if fitting:
            self.clock.take(trainer)
            self.clock.hold(trainer, self._leash, lambda: self.meeting)
            guard_exits(trainer, self._leash, self)
            name_alike(trainer, self._leash, self)
            miss_no_step(trainer, self._leash)
        else:
            self._unsaved.begin(trainer, self._leash)

    def setup(self, trainer: Trainer) -> None:
        """Without DDP's wrapper and its collectives."""
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_unmade(trainer.lightning_module, self.name)
        super(DDPStrategy, self).setup(trainer)
        self._metrics = LedMetrics(
            trainer.lightning_module,
            lambda state: self.together(words.gather_uneven(self.office.rounds, state)),
            lambda: self.meeting and self.world_size > 1 and not self.apart,
        )
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_run(self)
            refuse_cuts(self)
            self._look_at_optimizers()
            assert self._leash is not None  # since `setup_environment`
            self.stepping.widen_modes(self._leash)
            refuse_length(self.account.longest, self.name)
            if self.is_global_zero:
                rank_zero_info(self._first_line())

    def _look_at_optimizers(self) -> None:
        """These are the run's."""
        self.stepping.look_at(self.optimizers)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # no DDP wrapper
        """Flatten the weights and make all replicas equal to rank 0's."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            refuse_module(model, self.name)
            self._inner.begin(model)
            self._replica = Replica(model.parameters())
            self.consensus.begin(model, self._replica)
            self.stepping.begin()
        return model

    def teardown(self) -> None:
        """Say farewell, stop all threads, put Lightning back as it was. Idempotent."""
        self.alone = True  # whatever is still called after this is local
        self._garbage.put_back()
        self.clock.put_back()
        self.checkpoints.leave()
        self.office.close()  # before this rank's own disk: nobody else waits for that
        self.cuts.close()
        for replaced in (self._leash, self._metrics):
            if replaced is not None:
                replaced.restore()
        self._inner.end()
        self.feeding.close()
        self.statistics.forget()
        self.checkpoints.forget()
        self.consensus.telling.forget()
        super().teardown()

    def give_up(self, exception: BaseException) -> None:
        """This rank stops: tell the others, and wait for nobody any more, but for those who stop in good order too."""
        if self._closing and isinstance(exception, SIGTERMException):
            return
        self.alone, self._closing = True, False
        self.office.announce(exception)

    def on_exception(self, exception: BaseException) -> None:
        """Lightning's own word that this rank stops."""
        self.give_up(exception)

    @property
    def account(self) -> Account:
        """What a member holds on its device and in host memory, and sends; known from `setup` on."""
        model = model_of((p for p, _ in self.replica.places), **self._beside())
        near = self.num_processes - 1
        inner = max(map(len, self.office.ranks_of_members), default=1)
        apart, piece = self.root_device.type != "cpu", self.office.piece
        seen = {"inner": inner, "near": near, "piece": piece}
        return account(self.algorithm, model, self.members, **seen, apart=apart, cuts=self.cuts.are_due)

    def _beside(self) -> dict[str, Any]:
        """What of `account.Model` goes by the optimizers, or by names."""
        wider = sum(wider_state(o, self.replica.flat.dtype) for o in self.optimizers) if self.replica.narrow else 0
        state = sum(state_of(o, self.replica.flat.dtype) for o in self.optimizers) if self.cuts.are_due else 0
        return {"adam": sum(SecondMoment.concerns(o) for o in self.optimizers), "wider": wider, "state": state}

    # -- the batch -----------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: object) -> object:
        """The training data are shared out by the balance; evaluation keeps Lightning's sampler."""
        trainer = self.trainer
        if trainer.training:
            self.checkpoints.before_loader()
        if not trainer.training:
            return dataloader
        if compat.wants_our_sampler(trainer):
            fed = self.feeding.share_out(dataloader, self.office, lambda: trainer.current_epoch)
        else:
            fed = self.feeding.note(dataloader, self.office, lambda: trainer.current_epoch)
        if self.meeting:
            self.together(self.feeding.agree(self.office.rounds, in_step=self.algorithm.in_step))
        return fed

    def on_train_start(self) -> None:
        """The loader is known, the checkpoint is restored: the algorithm begins."""
        self.checkpoints.before_algorithm()
        self.cuts.begin(self.checkpoints.cut)
        self.voice.begin(self.replica, self.office.mail, self.feeding.mass, self.office.algorithms_rounds)
        self.checkpoints.put_back()
        for why in unreplayable.reasons(self.trainer, self.feeding.fed):
            self.office.recording.cannot_be_replayed(why)
        self.office.recording.start(self)
        self.clock.begin(self.trainer)
        self.clock.set_out(self.trainer, self.consensus.come)
        self._garbage.set_aside()

    def listen(self) -> None:
        """Stop here if somebody stopped the run."""
        self.office.listen()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Let the algorithm see the gradients between backward and Lightning's hooks, clipping and update."""
        if self.stepping.only_forward:
            return closure()
        with self.stepping.around(optimizer):
            return super().optimizer_step(optimizer, self.stepping.with_exchange(optimizer, closure), model, **kwargs)

    def batch_ended(self, batch: Any) -> bool:
        """One batch is trained on; whether a meeting follows."""
        before = self.feeding.samples
        self.feeding.completed(batch)
        self.stepping.batch_ended()
        meets = self.clock.batch_ended(self.trainer, self.feeding.samples - before)
        if self.office.size > 1:
            self.office.send()  # siblings wait for it
        return meets

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """An optimizer takes a state in its parameters' precision: narrow ones are as wide as in a step."""
        parameters = [p for one in self.optimizers for group in one.param_groups for p in group["params"]]
        with self.replica.widened(parameters, gradients=False):
            super().load_optimizer_state_dict(checkpoint)

    @property
    def taken_over(self) -> str:
        """What of the method's state a run with other members takes over, as a sentence; "": nothing."""
        return ""

    # -- meetings ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> bool:
        """Whether this rank trains on its own, between two meetings."""
        return self.alone and self._replica is not None and self.clock.progress is not None

    def meet(self) -> Wish:
        """All that live stop here and see the consensus; nothing is in flight. Returns what was asked for."""
        return self.consensus.reach() if self.free else Wish.NOTHING

    def set_off(self) -> None:
        """Leave a meeting: own weights again, unless they are the consensus. Free from here to the next one."""
        if not self.alone:
            self._replica = self.consensus.leave()
            self.alone, self.apart = True, False

    def renew(self) -> None:
        """What is trained may have changed since all met."""
        self._replica = self.consensus.renewed()

    def close_in_order(self) -> None:
        """The run was told to end, all have met: stop here, with the meeting open for those who save. Not where one has
        left, whose grace was over: what the others have is no consensus of all."""
        self._closing = not self.office.is_left
        raise SIGTERMException()

    def on_train_end(self) -> None:
        """Every rank takes the consensus home."""
        self.consensus.take_home()

    def begins_with(self) -> dict[str, Any]:
        """What a log says of this rank before its first step."""
        law = None if self.shrink is no_shrink else name_of(self.shrink)
        data = {"mass": self.feeding.mass, "fed": self.feeding.fed, "late": self.clock.fetches_late}
        return {"weights": digest(self.replica.flat), "shrink": law, **data}

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

    def _ranks_of_members(self) -> tuple[tuple[int, ...], ...]:
        nodes: Sequence[int] = range(self.world_size)
        if self.inner == "node":
            nodes = self.office.nodes(self.node_rank, self.world_size, self.root_device)
        found = ranks_of_members(self.inner, self.inner_size, nodes)
        if len(found) < self.world_size:
            refuse_inner(self, found)
        return found

    def _first_line(self) -> str:
        return of_members(self)
