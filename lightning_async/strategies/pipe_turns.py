"""What a batch is on this rank: an ordinary step on the last stage, a turn in the pipe on the others.

    last      step of the user's, whose call gets what arrived -> Lightning's backward -> gradient to the stage before
              -> Lightning's optimizer step
    first     gradient that is due -> its step -> the user's code up to the call -> own blocks -> to the stage behind
    middle    likewise, with what the stage before sent in place of the user's code

Before each of these, and after them, the generators of random numbers are set (`draws`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.algorithms.algorithm import no_shrink
from lightning_async.algorithms.scale_free import sees_no_factor
from lightning_async.arrival import ArrivalLog
from lightning_async.pipeline import compensate, draws, schedule
from lightning_async.pipeline.place import Place
from lightning_async.pipeline.replicas import Replicas
from lightning_async.pipeline.stage import Stage, gradient_of
from lightning_async.strategies import compat
from lightning_async.strategies.handover import Answer, HandedOver, Handover
from lightning_async.strategies.parts import Parts
from lightning_async.strategies.pipe_modes import Modes

if TYPE_CHECKING:
    from lightning_async.strategies.pipe_setup import PipeSetup

Step = Callable[[], Any]
EVENED = "evened"
"""In a log: the buffers were averaged here."""


class Turns:
    """The batches of one rank.

    Attributes:
        batches: How many were trained on, in all epochs.
        passes: How many were evaluated.
        arrivals: The gradients that came from the stage behind.
        modes: Which modules and optimizers train.
        only_forward: Whether batches go through the stages without a way back: nothing is trained.
    """

    def __init__(self, strategy: PipeSetup, handover: Handover, parts: Parts, *, seed: int) -> None:
        self.handover, self.parts, self.seed = handover, parts, seed
        self.batches = self.passes = 0
        self.arrivals = ArrivalLog()
        self.modes = Modes()
        self.stamp = 0
        self.only_forward = False
        self._strategy = strategy
        self._entered: Tensor | None = None
        self._noted: list[Tensor | nn.Module] = []
        self._started = 0.0
        self._looked = self._begun = False

    def begin(self, *, fitting: bool) -> None:
        """Take this rank's place in the pipe."""
        strategy, seed, index = self._strategy, self.seed, self._strategy.index
        self._fitting = fitting
        stage = Stage(
            index,
            strategy.depth,
            self.parts.own() if fitting else (),
            buffers=self.parts.buffers(),
            semantics=strategy.semantics,
            reseed=lambda batch: draws.reseed(seed, batch, index + 1),
        )
        self._lr = 1.0
        shrink = strategy.shrink if strategy.shrink is not no_shrink else 1.0
        if fitting and isinstance(shrink, (int, float)) and shrink != 1.0 and self._is_blind():
            self._lr, shrink = shrink ** (strategy.depth - 1 - index), 1.0
        self.place = Place(
            stage,
            strategy.office.mail,
            strategy.ranks_of_pipe(),
            update=self._update,
            shrink=shrink,
            order=strategy.order,
            wire=strategy.wire,
            device=strategy.root_device,
            since=self.batches,
            aside=strategy.office.carrier,
            watch=strategy.recording.passed,
        )
        self.replicas = Replicas(strategy.office.mail, strategy.ranks_of_stage())
        if fitting and not self.replicas.alone:
            self.parts.refuse_unreal()
        self._even = self.batches
        self._begun = True
        self.modes.begin(self.parts.module)
        if fitting and strategy.compensate == "nesterov":
            for optimizer in strategy.optimizers:
                compensate.check_nesterov(optimizer)

    def end(self) -> None:
        """Hold nothing any more. A run that was refused has not begun."""
        if self._begun:
            self.place.stage.clear()

    @property
    def _late(self) -> float:
        """By how many updates a gradient is late, with the accumulation of now."""
        strategy = self._strategy
        batches = self.place.stage.delay - (strategy.order == "update_first")
        return max(0, batches) / strategy.trainer.accumulate_grad_batches

    def _is_blind(self) -> bool:
        blind = [o for o in self._strategy.optimizers if sees_no_factor(o)]
        if blind:
            rank_zero_warn(
                f"{self._strategy.name}: a factor on the gradients changes nothing for {type(blind[0]).__name__}; "
                "`shrink` is applied to the learning rate of each stage in its place"
            )
        return bool(blind)

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, step: Step, context: Callable[[], AbstractContextManager[Any]]) -> Any:
        """One batch. `step` runs the user's code; `context` is that of its precision."""
        self.batches += 1
        self.modes.trained()
        if self.only_forward:
            output = self.evaluate(step, context)
            return output if self.place.stage.last else torch.zeros((), device=self._strategy.root_device)
        place, batch, drive = self.place, self.batches, self._strategy.together
        ends = compat.ends_in_step(self._strategy.trainer)
        drive(place.begin(batch, ends=ends))
        if place.stage.last:
            started = place.now()
            output = self._run_user(step, batch, self._enter)
            place.note("F", batch, started)
            self._started = place.now()
            return output
        with self._ahead():
            if place.stage.index == 0:
                with place.stage.stash.keeping():
                    self._run_user(step, batch, self._hand_over)
            else:
                with context():
                    self._relay(batch)
        drive(place.end())
        if ends and self._strategy.baseline == "sync":
            drive(place.drain())
        self._settle(batch)
        return torch.zeros((), device=self._strategy.root_device)

    def went_back(self) -> None:
        """Lightning's backward pass of the last stage is done."""
        if self._entered is None:
            return
        self.parts.refuse_strays()
        entered, self._entered, place, batch = self._entered, None, self.place, self.batches
        place.note("B", batch, self._started)
        mine = place.wish
        place.wish = mine if self.replicas.alone else self.replicas.wish  # all of them name the same batch
        self._strategy.together(place.give_back(batch, gradient_of(entered)))
        place.wish = mine
        self._strategy.together(place.end())
        self._settle(batch)

    def average(self) -> None:
        """The gradients are those of all replicas."""
        if not self.replicas.alone:
            self.parts.refuse_unreal()
        self._strategy.together(self.replicas.average(self.parts.own(), wish=self.place.wish))
        self.parts.refuse_strays()

    def drain(self) -> None:
        """Apply what is on its way, as in training: who saves at the end of a validation finds modules that validate,
        and Lightning's loop without gradients."""
        recording, held = self._strategy.recording, self._strategy.held
        recording.meeting(held)
        with torch.inference_mode(False), self.modes.as_trained():
            self._strategy.together(self.place.drain())
        self._settle(self.batches)
        recording.met(held)

    def even_buffers(self) -> None:
        """All are after the same batch: what replicas have gathered, each of its own batches, becomes the mean. Who has
        nothing goes in too: another may have registered a buffer for a batch of its own."""
        if not self.replicas.alone and self._even != self.batches:
            self._even = self.batches
            self._strategy.recording.mark(EVENED)
            self.average_buffers()

    def average_buffers(self) -> None:
        """Now, whether or not something was trained on since; also where a validation begins, as in `drain`."""
        with torch.inference_mode(False):
            self._strategy.together(self.replicas.average_buffers(self.parts.all_buffers()))

    def go_on(self) -> None:
        """All have stopped after the same batch, for a moment: nothing is left of the wish."""
        self.drain()
        self.place.wish = self.replicas.wish = False
        self.place.halt = 0

    def _enter(self, x: Tensor) -> Tensor:
        """On the last stage: what the call gives is what came from the stage before, run through the last blocks."""
        self._look(x)
        parcel = self._strategy.together(self.place.arrived(self.batches))
        self._compare(parcel.stamp, self.batches)
        self._entered, out = self.place.stage.enter(self.batches, parcel.tensor, self._compute)
        return out

    def _hand_over(self, x: Tensor) -> Tensor:
        """On the first stage: run the own blocks, pass on what they made, and end the user's step."""
        self._look(x)
        out = self.place.forward(self.batches, x, self._compute)
        self._strategy.together(self.place.pass_on(self.batches, out, self.stamp))
        raise HandedOver

    def _relay(self, batch: int) -> None:
        parcel = self._strategy.together(self.place.arrived(batch))
        out = self.place.forward(batch, parcel.tensor, self._compute)
        self._strategy.together(self.place.pass_on(batch, out, parcel.stamp))

    def _update(self) -> None:
        """The step of a stage before the last: its gradients are there. Hooks and clipping as ever."""
        self.average()
        for optimizer in self._strategy.optimizers:
            self._strategy.step_now(optimizer)

    @contextmanager
    def around_step(self, optimizer: Optimizer) -> Iterator[None]:
        """What shrinking and compensation do to a step."""
        how, factor = self._strategy.compensate, self._lr
        if how == "lr":
            factor *= compensate.annealed(self.place.updates, self._late, self._strategy.anneal)
        with compensate.scaled(optimizer, factor) if factor != 1.0 else nullcontext():
            yield
            if how == "nesterov":
                with self._strategy.rounding.around_step(optimizer):
                    compensate.spike(optimizer, self._late)

    @contextmanager
    def _ahead(self) -> Iterator[None]:
        optimizers = self._strategy.optimizers if self._strategy.compensate == "predict" else []
        with compensate.predicted(optimizers[0], self._late * self._lr) if optimizers else nullcontext():
            yield

    def _settle(self, batch: int) -> None:
        self.arrivals.add(self.place.arrivals)
        self._strategy.recording.arrived(self.place.arrivals)
        self.place.arrivals.clear()
        draws.reseed(self.seed, batch, draws.BETWEEN)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, step: Step, context: Callable[[], AbstractContextManager[Any]]) -> Any:
        """A batch through all stages, as they are now."""
        self.passes += 1
        place, number, together = self.place, -self.passes, self._strategy.together

        def answer(x: Tensor) -> Tensor:
            if place.stage.last:
                parcel = together(place.arrived(number))
                self._compare(parcel.stamp, number)
                return place.stage.evaluate(number, parcel.tensor, self._compute)
            together(place.pass_on(number, place.stage.evaluate(number, x, self._compute), self.stamp))
            raise HandedOver

        output = None
        if place.stage.last or place.stage.index == 0:
            output = self._run_user(step, number, answer)
        else:
            parcel = together(place.arrived(number))
            with context():
                out = place.stage.evaluate(number, parcel.tensor, self._compute)
            together(place.pass_on(number, out, parcel.stamp))
        draws.reseed(self.seed, number, draws.BETWEEN)
        return output

    # -- inside --------------------------------------------------------------------------------------------------------

    def _compute(self, x: Tensor) -> Tensor:
        with self._strategy.precision_plugin.forward_context():
            return self.handover.run(self.parts.blocks, x)

    def _run_user(self, step: Step, number: int, answer: Answer) -> Any:
        """The user's step; on the first stage, up to the call."""
        draws.reseed(self.seed, number, draws.BEFORE_THE_CALL)
        with self._noting_buffers(), self.handover.answering(answer):
            try:
                return step()
            except HandedOver:
                return None

    def _look(self, x: Tensor) -> None:
        """In the first batch of a run the call shows what lies before it."""
        if not self._looked:
            self._looked = True
            self.parts.saw_call(x, self._noted, self._strategy.optimizers)

    @contextmanager
    def _noting_buffers(self) -> Iterator[None]:
        """In the first batch, note the modules outside the blocks that run before the call, and what of
        them is frozen: it has no gradient that would show it, and may have one later."""
        if self._looked or not self._fitting:
            yield
            return
        self._noted.clear()  # a validation before it has gone on behind the call
        inside = {id(part) for block in self.handover.blocks for part in block.modules()}
        outside = [part for part in self.parts.module.modules() if id(part) not in inside]

        def note(part: Any, _: Any) -> None:
            self._noted.append(part)
            self._noted.extend(p for p in part.parameters(recurse=False) if not p.requires_grad)

        hooks = [part.register_forward_pre_hook(note) for part in outside]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, stamp: int, number: int) -> None:
        if stamp != self.stamp:
            raise MisconfigurationException(
                f"strategy={self._strategy.name!r}: the first and the last stage were given different data in batch "
                f"{abs(number)}: every rank must read the same batches. Let the order of the data, and what is random "
                "in it, depend on the seed alone (not on the rank, and not on numbers that one rank draws by itself)"
            )


def stash_limit(index: int, depth: int, order: schedule.Order) -> int:
    """How many batches a stage holds at most."""
    return schedule.delay(index, depth) + int(order == "forward_first" and index < depth - 1)
