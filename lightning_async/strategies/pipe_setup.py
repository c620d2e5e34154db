"""How a rank takes its place in the pipe, and leaves it.

setup_environment   processes know each other; from here on `barrier` and its kind go through rounds
setup               all ranks equal to rank 0 -> the network is cut -> weights of other stages are sent away
                    -> the user's optimizers -> they keep what lives here -> the place in the pipe
teardown            farewell, no threads, Lightning as it was
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.pipeline import partition
from lightning_async.pipeline.compensate import Compensate
from lightning_async.pipeline.edge import Wire
from lightning_async.pipeline.stash import Semantics
from lightning_async.strategies import compat, whole, words
from lightning_async.strategies.account import Account, staged
from lightning_async.strategies.alike import creed, plan
from lightning_async.strategies.first_line import of_stages
from lightning_async.strategies.handover import Handover
from lightning_async.strategies.late_files import LEAVE_FAILED
from lightning_async.strategies.measuring import measured
from lightning_async.strategies.metrics import LedMetrics
from lightning_async.strategies.one_thread import spare_the_threads
from lightning_async.strategies.parts import Parts
from lightning_async.strategies.pipe_batches import PipeBatches
from lightning_async.strategies.pipe_finetuning import give_whole_groups
from lightning_async.strategies.pipe_rounding import wider_steps
from lightning_async.strategies.pipe_turns import Turns, stash_limit
from lightning_async.strategies.pipeline_refusals import refuse_pipeline, refuse_schedulers
from lightning_async.strategies.refusals import refuse, refuse_optimizers, refuse_unmade
from lightning_async.strategies.rests import Rests
from lightning_async.strategies.saving import guard_exits
from lightning_async.strategies.unsaved import Unsaved
from lightning_async.strategies.whole_files import WholeFiles
from lightning_async.strategies.wide_steps import widen_modes
from lightning_async.strategies.writer import Writer
from lightning_async.transport.mail import Wait

Split = Literal["even", "auto"]
Baseline = Literal["none", "sync"]
Clip = Literal["stage", "pipe"]


class PipeSetup(PipeBatches):
    """Set-up and teardown of one rank. The knobs are those of `DelayedPipelineStrategy`.

    Attributes:
        measuring: Whether blocks are being measured: then nothing is logged.
    """

    stages: str | None
    split: Split | list[int]
    semantics: Semantics
    compensate: Compensate
    anneal: int
    clip: Clip
    baseline: Baseline
    wire: Wire
    measuring = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leash: compat.Leash | None = None
        self._metrics: LedMetrics | None = None
        self._unsaved = Unsaved(self)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline train on the same batches; evaluation is the same on all replicas."""
        training = self.trainer.training
        return {
            "num_replicas": self.replicas if training else 1,
            "rank": self.global_rank // self.depth if training else 0,
        }

    def connect(self, model: LightningModule) -> None:
        """Stand first among the callbacks, once; what Lightning would write, is written whole."""
        super().connect(model)
        self.checkpoint_io = compat.with_inner(self.checkpoint_io, TorchCheckpointIO, WholeFiles)
        office = self.office
        compat.let_write(self.checkpoint_io, Writer(lambda: LEAVE_FAILED if office.fails else office.limit))
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
        spare_the_threads()
        self.fitting = trainer.state.fn == TrainerFn.FITTING
        self.office.recording.introduce(self)
        self.office.open(
            self.cluster_environment, self.global_rank, self.world_size, self.root_device, fitting=self.fitting
        )
        self._leash = compat.take_off(trainer, poll=self.listen, sigterm=self.office.sigterm, failed=self.give_up)
        self.closing = self.begun = self.halted = self.at_home = self._stop = self._validates = False
        self._requeue.forget()
        self.office.flags.patient = lambda: self.closing or self.begun
        if self.fitting:
            self._leash.replace("fit_loop._iteration_based_training", lambda: False)
        else:
            self._unsaved.begin(trainer, self._leash)
        if self.fitting and self.piped:
            self.hear_requeue(self._leash)
            guard_exits(trainer, self._leash, self)  # no link leads to what a stage cannot write alone
        if self.replicas > 1:
            compat.share_by_sampler(trainer, self._leash)
        self.alone = not self.piped

    def setup(self, trainer: Trainer) -> None:
        """Cut the network, and take this rank's place in the pipe."""
        if self.fitting:
            refuse_unmade(trainer.lightning_module, self.name)
        super(DDPStrategy, self).setup(trainer)
        self._metrics = LedMetrics(trainer.lightning_module, lambda state: [state], lambda: False)
        if self.fitting:
            refuse_optimizers(self.optimizers, self.name)
            refuse_schedulers(self.lr_scheduler_configs, self.name)
        if not self.piped:
            return
        if self.fitting:
            self.turns.parts.keep_own(self.optimizers)
            self._begin_rounding()
            self._watch_modes()
        self.turns.begin(fitting=self.fitting)
        if self.fitting and self.is_global_zero:
            rank_zero_info(self._first_line())

    def _begin_rounding(self) -> None:
        """Half-precision weights are stepped in float32."""
        own = {id(p) for p in self.turns.parts.own()}
        named = [(name, p) for name, p in self.trainer.lightning_module.named_parameters() if id(p) in own]
        self.rounding.begin(named, self.resumed.get("exact", {}))
        self.resumed = {key: value for key, value in self.resumed.items() if key != "exact"}  # it is of the whole

    def _watch_modes(self) -> None:
        """Optimizers that show averages do it in the precision of their steps, and do not while late gradients come."""
        assert self._leash is not None  # since `setup_environment`
        for optimizer, shown in zip(self.optimizers, compat.lightnings(self), strict=True):
            if self.rounding.narrow:
                widen_modes(optimizer, shown, self._leash, partial(self.rounding.around_mode, optimizer))
            self.turns.modes.watch(optimizer, shown, self._leash)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # no DDP wrapper
        """Make all ranks equal to rank 0, and keep the weights of the own stage."""
        module, leash = self.trainer.lightning_module, self._leash
        if leash is None:
            raise RuntimeError("there is no pipeline before `setup_environment`")
        self._wrap_log(module, leash)
        if not self.piped:
            return model
        self.office.check_alike(creed(self) | plan(self.trainer, self.trainer.limit_train_batches))
        handover = Handover(module, self.stages)
        seed = self.together(self._equalise(module))
        if self.fitting:
            self.together(self.averages.equalise())
        handover.take(leash)
        blocks = handover.blocks
        self.cuts = self._cuts(handover)
        spans = partition.spans(self.cuts, len(blocks))
        self._turns = Turns(self, handover, Parts(module, blocks, spans, self.index), seed=seed)
        if self.fitting:
            self.turns.batches = self.resumed.get("batches", 0)
            self.turns.passes = self.resumed.get("passes", 0)
            self.epoch_began = self.resumed.get("epoch_began", 0)
            self.turns.parts.send_away()
            self.averages.take(leash)
            give_whole_groups(self, leash)
            compat.skip_backward(self.trainer, leash, not self.last)
            self._watch_loop(module, leash)
            if self.clip == "pipe":
                leash.wrap(self.precision_plugin, "clip_grad_by_norm", self._clip)
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
                self.found = self._saved_cuts(blocks) or self.together(self._measured(handover))
            return self.found or partition.even(blocks, self.depth)
        except ValueError as error:
            raise MisconfigurationException(f"strategy={self.name!r}: `{handover.name}`: {error}") from None

    def _saved_cuts(self, blocks: int) -> tuple[int, ...]:
        """Those that the run was measured for first, if they cut this network into as many stages."""
        with suppress(ValueError):
            return partition.check_cuts(self.resumed.get("cuts", ()), blocks, self.depth)
        return ()

    def _measured(self, handover: Handover) -> Wait[tuple[int, ...]]:
        """The cuts by rank 0's measurement of the blocks, on the first batch."""
        seconds = measured(self, handover)
        cuts = list(partition.balanced(seconds, self.depth)) if self.global_rank == 0 else []
        return tuple((yield from words.broadcast(self.office.rounds, cuts, 0)))

    def _clip(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Lightning clips by norm: by that of the whole pipe, in the place of this stage's own."""
        if clip_val > 0:
            self.turns.place.norms.clip(self.precision_plugin.main_params(optimizer), clip_val)

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
            compat.let_plateaus_step(self.trainer)

        def on_run_start(fetcher: Any) -> None:
            self.skip_done(fetcher)
            run_start(fetcher)
            self.keep_stop()

        def advance(fetcher: Any) -> None:
            self.fetch_next()
            batch(fetcher)

        def run() -> None:
            fit()
            if not self.begun:  # the run that it was to go on from was at its end
                self.take_home()

        fit = leash.wrap(self.trainer.fit_loop, "run", run)
        original = leash.wrap(module, "on_train_epoch_end", on_train_epoch_end)
        run_start = leash.wrap(self.trainer.fit_loop.epoch_loop, "on_run_start", on_run_start)
        batch = leash.wrap(self.trainer.fit_loop.epoch_loop, "advance", advance)
        self.validate_together(leash)
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
        self.rounding.end()
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

    def accounts_of_stages(self, *, edge: int = 0) -> list[Account]:
        """What each stage holds, first to last; `edge`: bytes of a batch as it goes from stage to stage."""
        module = self.trainer.lightning_module
        state = sum(p.numel() * p.element_size() for p in module.state_dict().values() if isinstance(p, Tensor))
        limits = [stash_limit(stage, self.depth, self.order) for stage in range(self.depth)]
        return [
            staged(
                self.turns.parts.nbytes(stage),
                state,
                self.world_size,
                held=held,
                semantics=self.semantics,
                edges=[edge] * (2 if 0 < stage < self.depth - 1 else 1),
                wider=sum(wider_steps(o, self.turns.parts.stepped_at(stage, o)) for o in self.optimizers),
                piece=self.office.piece,
            )
            for stage, held in enumerate(limits)
        ]

    def _first_line(self) -> str:
        return of_stages(self)
