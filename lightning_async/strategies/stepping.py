"""One step is one batch, however many optimizers stepped in it; the algorithm stands on both sides of it.

closure: backward -> before_step   the gradients, this rank's own and not clipped (under fp16's scaler: scaled)
                                   where the algorithm takes them away: behind clipping, right before the optimizer
clipping -> optimizer              on float32, of half-precision weights too; counted if fp16's scaler skipped it;
                                   Adam's second moment corrected for n ranks
batch ended -> after_step          what came is folded, what is asked is answered; an accumulated batch: nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.algorithms.adam import SecondMoment
from lightning_async.algorithms.common_step import CommonStep
from lightning_async.arrival import Arrival, ArrivalLog
from lightning_async.strategies import compat
from lightning_async.strategies.added_up import Carried, divided_anew, mass_of
from lightning_async.strategies.scaling import SkippedSteps, scale_of
from lightning_async.strategies.wide_steps import Step, instead, parameters_of, widen_modes, widened
from lightning_async.transport.gathering import When
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Stepping:
    """The steps of one rank.

    Attributes:
        taken: How many.
        skipped: Those of them that moved nothing.
        only_forward: Whether batches have no way back, and end in no step: nothing is trained.
    """

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.taken = 0
        self.only_forward = False
        self.skipped = SkippedSteps()
        self._strategy = strategy
        self._moments: dict[int, SecondMoment] = {}
        self._arrivals = ArrivalLog()
        self._common = CommonStep()
        self._carried = Carried()
        self._stepped = self._adds_up = False
        self._divided: int | None = None

    def begin(self) -> None:
        """A fit begins."""
        self.taken = self.skipped.count = 0
        self._adds_up = self.only_forward = False
        self._carried, self._divided = Carried(), None

    @property
    def adds_up(self) -> bool:
        """Whether there are gradients of a step that is still to come."""
        return self._adds_up or bool(self._carried)

    def state_dict(self) -> dict[str, Any]:
        """A part of the rank's own state. (`taken` is saved beside it: the mail counts by it too.)

        Where a step is still to come, what its batches have added up so far belongs to it: their samples are done.
        What they weigh, by how many batches of a step they are divided, and fp16's scale, say what other ranks, or
        other steps, can make of it (`added_up`).
        """
        strategy = self._strategy
        return {
            "skipped": self.skipped.count,
            "gradients": self._gradients() if self._adds_up else {},
            "carried": self._carried.state_dict(strategy.trainer.lightning_module),
            "mass": mass_of(strategy),
            "divided": self.divided,
            "scale": scale_of(strategy.precision_plugin),
        }

    @property
    def divided(self) -> int:
        """By how many batches of a step what was added up is divided."""
        return self._divided or int(self._strategy.trainer.accumulate_grad_batches)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from `state`, and add on to its gradients."""
        module = self._strategy.trainer.lightning_module
        self.skipped.count = state["skipped"]
        self._divided = state.get("divided")
        gradients = state.get("gradients", {})  # older versions did not save them
        self._adds_up = bool(gradients)
        self._carried.load_state_dict(module, state.get("carried", {}))
        for name, parameter in module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device, copy=True)

    def batch_started(self) -> None:
        """A batch begins. Only now is it known how many of them are a step where a run goes on. If not as many as when
        it was saved, what had been added up is divided as they are, and goes into the next step."""
        strategy, divided = self._strategy, self._divided
        self._divided, now = None, strategy.trainer.accumulate_grad_batches
        if divided in (None, now) or not self.adds_up:
            return
        module = strategy.trainer.lightning_module
        self._carried.load_state_dict(module, divided_anew(strategy, self.state_dict(), divided / now))
        self._adds_up = False
        for parameter in module.parameters():
            parameter.grad = None

    def _gradients(self) -> dict[str, Tensor]:
        module = self._strategy.trainer.lightning_module
        return {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}

    def look_at(self, optimizers: list[Optimizer]) -> None:
        """These are the run's optimizers. A state that one has made in half precision is as wide as its steps from here
        on."""
        replica = self._strategy.replica
        for optimizer in optimizers:
            if replica.narrow and optimizer.state:
                groups = optimizer.param_groups
                with replica.widened(parameters_of(optimizer), gradients=False):
                    optimizer.load_state_dict(optimizer.state_dict())
                optimizer.param_groups = groups  # torch makes new ones, and somebody may hold these
        self._moments = {id(o): SecondMoment(o) for o in optimizers if SecondMoment.concerns(o)}

    def widen_modes(self, leash: compat.Leash) -> None:
        """Where optimizers show other weights for a while, half-precision ones are their parts, too."""
        strategy = self._strategy
        if strategy.replica.narrow:
            for optimizer, shown in zip(strategy.optimizers, compat.lightnings(strategy), strict=True):
                widen_modes(optimizer, shown, leash, partial(self._whole, optimizer))

    def _whole(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        return self._strategy.replica.widened(parameters_of(optimizer), gradients=False)

    def moment(self, optimizer: Optimizer) -> SecondMoment | None:
        """What corrects the steps of this optimizer, if it is one of those that need it."""
        return self._moments.get(id(optimizer))

    def arrivals(self, reader: object) -> list[Arrival]:
        """What came since this reader's last call."""
        return self._arrivals.read(reader)

    def arrived(self, arrivals: list[Arrival]) -> None:
        """Something came."""
        self._arrivals.add(arrivals)
        self._strategy.office.recording.arrived(arrivals)

    def with_exchange(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, after which the algorithm sees the gradients: of all ranks of the member, if it has several."""
        if self._carried:
            closure = self._carried.behind(closure, optimizer, self._strategy.precision_plugin)
        if self._strategy.office.size > 1:
            closure = self._then_average(closure)
        return closure if self._strategy.algorithm.takes_gradients else self._then_exchange(closure)

    def _then_exchange(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_exchange() -> Any:
            result = closure()
            self._before_step()
            return result

        return closure_then_exchange

    def _then_average(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_average() -> Any:
            strategy, siblings = self._strategy, self._strategy.office.siblings
            assert siblings is not None  # as when it was wrapped
            with self._common.beside(strategy.replica, siblings.average) if self._overlaps() else nullcontext():
                result = closure()
            inside = self._common.average(strategy.replica, siblings.average)
            strategy.office.drive(inside, heed=strategy.clock.heed)
            return result

        return closure_then_average

    def _overlaps(self) -> bool:
        """Whether gradients may leave before backward is over: not where somebody is there to change them then."""
        strategy, module = self._strategy, self._strategy.trainer.lightning_module
        hooks: list[tuple[Any, object]] = [(module.backward, LightningModule.backward)]
        hooks += [(module.on_after_backward, LightningModule.on_after_backward)]
        hooks += [(c.on_after_backward, Callback.on_after_backward) for c in compat.callbacks(strategy.trainer)]
        plain = all(own is None or getattr(own, "__func__", None) is usual for own, usual in hooks)
        return plain and strategy.replica.device.type == "cpu"

    def _before_step(self) -> None:
        strategy = self._strategy
        self._exchange(strategy.voice.before_step(strategy.replica, strategy.office.mail, self.taken + 1), "together")

    def _taken_away(self, step: Step) -> Step:
        """Lightning clips inside of the closure that it hands to the optimizer; under fp16's scaler there is none."""

        def exchange_then_step(closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            if closure is not None:
                return step(self._then_exchange(closure), **options)
            self._before_step()
            return step(**options)

        return exchange_then_step

    def _widened(self, optimizer: Optimizer, step: Step) -> Step:
        """Half-precision weights are their parts of the flat vector where an optimizer steps them."""
        replica = self._strategy.replica
        return widened(step, lambda: replica.widened(p for p in parameters_of(optimizer) if p.grad is not None))

    @contextmanager
    def around(self, optimizer: Optimizer) -> Iterator[None]:
        """An optimizer steps inside of this block."""
        strategy = self._strategy
        self._stepped = True
        strategy.office.recording.step_with(optimizer, strategy.optimizers)
        with ExitStack() as watched:
            watched.enter_context(self.skipped.watch(strategy.precision_plugin, optimizer))
            if self._carried:
                watched.enter_context(self._carried.until_stepped(optimizer))
            if strategy.replica.narrow:
                watched.enter_context(instead(optimizer, partial(self._widened, optimizer)))
            if strategy.algorithm.takes_gradients:
                watched.enter_context(instead(optimizer, self._taken_away))
            yield
        if (moment := self.moment(optimizer)) is not None:
            n = strategy.voice.averaged_over(len(strategy.office.mail.members()))
            if n > 1:
                with strategy.replica.widened(parameters_of(optimizer), gradients=False):
                    moment.stretch(n)

    def batch_ended(self) -> None:
        """A batch is over; it was a step if an optimizer stepped in it."""
        strategy = self._strategy
        strategy.office.recording.batch()
        self._adds_up = not (self._stepped or self.only_forward)
        if not self._stepped:
            return
        self._stepped = False
        self.taken += 1
        if strategy.algorithm.takes_gradients:  # it tells the server these numbers now, those of a new epoch too
            for optimizer in strategy.optimizers:
                strategy.office.recording.step_with(optimizer, strategy.optimizers)
        mail = strategy.office.mail
        mail.at(self.taken)
        after = strategy.voice.after_step(strategy.replica, mail, self.taken)
        self._exchange(after, "together" if strategy.algorithm.in_step else "later")
        strategy.office.recording.stepped(self.taken, strategy.replica)

    def _exchange(self, waiting: Wait[list[Arrival]], leaves: When) -> None:
        """An algorithm in lock-step waits here: for whoever comes, and with an ear for who cannot."""
        self.arrived(self._strategy.office.drive(waiting, heed=self._strategy.clock.heed, leaves=leaves))
