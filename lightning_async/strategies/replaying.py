"""Comparing: what a run wrote into its log, its replay looks up there in the same places. The first difference ends it.

    loss of each batch         names the step and the samples where something differs
    digests of the weights     at the start, at each meeting, at every 100th step: to the bit
    numbers of optimizers, states of random generators, accumulation: not compared but taken from the log

A member stops at its first difference, before it posts anything that came of it: what is found first is a first cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from lightning_async.strategies.compat import set_global_step
from lightning_async.strategies.course import Course, Difference, Step, WrongInput
from lightning_async.strategies.facts import Recorded
from lightning_async.strategies.recording import Recording, Weights
from lightning_async.strategies.saved_loops import Loop
from lightning_async.transport import chance
from lightning_async.transport.hall import Hall
from lightning_async.transport.log import Log
from lightning_async.transport.mail import Letter, Loss, Mail
from lightning_async.transport.replay import ReplayCarrier

WEIGHTS = {
    "weights": "its weights",
    "own": "its weights, with which it came to the meeting,",
    "consensus": "the weights that the members agreed on",
    "drained": "its weights, with all gradients applied,",
}
UNKNOWN = " (by how much the weights differ is not known: a log holds no weights)"
START = (
    ": the replay does not begin with the weights of the run. Give the checkpoint that it began with (--ckpt), or a "
    "--module that is built as the run's was: same arguments, same seed, nothing random before it"
)
DATA = ", though the weights before it are as recorded: the samples are others, or the module draws numbers of its own"


class Replayed(Recorded, Protocol):
    """The strategy of a replay."""

    def arrivals(self, reader: object = None) -> list[Arrival]:
        """What came since this reader's last call."""


class Replaying(Recording):
    """Compares with the log, or takes from it, what `Recording` writes there."""

    def __init__(self, carrier: ReplayCarrier, log: Log, course: Course, hall: Hall) -> None:
        super().__init__(None)
        self._scribe = self._carrier = carrier
        self._log, self._course, self._hall = log, course, hall
        self._sure = 0
        self._clock = (0, False)
        self._last_fold: Arrival | None = None
        self._meetings = 0
        self._before: Tensor | None = None
        self.strategy: Replayed | None = None
        self.samples: list[Any] = []  # of the batch that was trained on last
        self.batches = 0  # of data of the member's own: the how-many-th that was

    def meets(self) -> bool:
        """Whether the members met at this point."""
        return self._carrier.meets()

    def goes_on(self, fit: Loop) -> None:
        """From this state of the loop over epochs: it must be that of the checkpoint that the run went on from."""
        was = self._log.first("start")
        batch, epoch = (fit[name]["current"] for name in ("epoch_loop.batch_progress", "epoch_progress"))
        if (batch["ready"], epoch["processed"]) != (was["batch"], was["epoch"]):
            raise WrongInput(
                f"the run went on behind batch {was['batch']} of epoch {was['epoch']}, and this checkpoint is of batch "
                f"{batch['ready']} of epoch {epoch['processed']}: give the one that it began with (--ckpt)"
            )

    def through(self, mail: Mail, letters: Sequence[Letter], losses: Sequence[Loss]) -> Mail:
        """What was handed out, and when, is in the log; what no replay makes again is in the checkpoint."""
        self._carrier.restore(letters, losses)
        return self._carrier

    def opens(self, loader: DataLoader[Any]) -> None:
        """The seed of the workers is drawn from what it was drawn from."""
        if loader.generator is not None and not self._opened:
            self._opened = True
            if (state := self._carrier.note("workers", None)) is not None:
                loader.generator.set_state(chance.unpacked(state))

    def clock(self, trainer: Trainer) -> None:
        """The run's step and the end of an epoch go by all members: as the log has them."""
        self._clock = self._carrier.note("clock", None) or self._clock
        step, last = self._clock
        set_global_step(trainer, step)
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = last

    def step_with(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> None:
        """The recorded numbers go into the optimizer: no scheduler is needed, nor what it went by."""
        number = next((i for i, one in enumerate(optimizers) if one is optimizer), 0)
        recorded = self._carrier.note(f"knobs{number}", None) or []
        for group, numbers in zip(optimizer.param_groups, recorded, strict=False):
            for name, value in numbers.items():
                _set_number(group, name, value)
        if self._course.measure and self._before is None:
            self._before = self._shown()

    def shrink(self, arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
        """What the run's law of shrinking said."""
        return self.factor(arrival, lambda: 1.0)

    def batch(self) -> None:
        """The loss is compared; movements are measured."""
        step = Step(self._log.me, self._log.step + 1, self.samples, self._loss, batch=self.batches)
        self._course.steps.append(step)
        super().batch()
        if self._before is not None:
            now = self._shown()
            self._course.steps[-1].own = _moved(self._before, now)
            self._before = now

    def stepped(self, step: int, replica: Weights) -> None:
        """A step is over; perhaps it is the last that is wanted."""
        done = next(one for one in reversed(self._course.steps) if one.member == self._log.me)
        done.arrivals = self._arrived()
        if self._before is not None:
            done.folds = _moved(self._before, self._shown())
            self._before = None
        self._course.taken += 1
        super().stepped(step, replica)
        if step == self._course.until:
            self._hall.stage.park()

    def meeting(self, replica: Weights) -> None:
        """What is folded from here on belongs to the meeting."""
        super().meeting(replica)
        self._meetings += 1

    def met(self, replica: Weights) -> None:
        """Say so when all have met."""
        self._arrived()
        super().met(replica)
        self._course.meets(self._meetings, self._log.me, self._log.step, self._hall.here)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _shown(self) -> Tensor:
        """The weights as the module has them. (To read a replica of narrow weights is to carry over what they hold.)"""
        assert self.strategy is not None  # it is there before anything can be trained
        parameters = self.strategy.trainer.lightning_module.parameters()
        return torch.cat([p.detach().reshape(-1).float() for p in parameters if p.requires_grad])

    def _arrived(self) -> list[Arrival]:
        assert self.strategy is not None
        arrivals = self.strategy.arrivals(self)
        folded = [arrival for arrival in arrivals if arrival.factor > 0]
        self._course.folds += len(folded)
        self._last_fold = folded[-1] if folded else self._last_fold
        return arrivals

    def _news_of_chance(self) -> dict[str, str]:
        return {}

    def _compare(self, name: str, now: Any, recorded: Any) -> None:
        if recorded is None:
            return
        if name in ("epoch", "fetching", "taking", "off"):
            self._go_on_from(name, now, recorded)
        elif name == "start":
            self._compare_start(now, recorded)
        elif self._course.tolerance is None:
            self._course.digests += 1
            if now != recorded:
                self._differ(self._log.step, f"the digest of {WEIGHTS[name]} was {recorded} and is {now} now{UNKNOWN}")
            self._sure = self._log.step

    def _go_on_from(self, name: str, now: dict[str, Any], recorded: dict[str, Any]) -> None:
        if name == "epoch" and now["data"] != recorded["data"]:
            raise WrongInput(
                f"the data set of the run had {recorded['data']} samples, this one has {now['data']}: their numbers "
                "would not mean the same samples"
            )
        if name == "off" and self.strategy is not None:
            self.strategy.trainer.accumulate_grad_batches = recorded["accumulate"]
        chance.put_back(chance.read(recorded["chance"]))

    def _compare_start(self, now: dict[str, Any], recorded: dict[str, Any]) -> None:
        if now["numbers"] != recorded["numbers"]:
            raise WrongInput(
                f"the module of the run, {self._log.header['module']}, had {recorded['numbers']} trainable numbers, "
                f"this one has {now['numbers']}: it is another module, or its arguments are others (--init)"
            )
        self._sure = self._log.step
        if self._course.tolerance is None:
            self._course.digests += 1
            if now["weights"] != recorded["weights"]:
                said = f"the digest of its first weights was {recorded['weights']} and is {now['weights']} now"
                self._differ(0, said + START)

    def _compare_loss(self, now: float | None, recorded: float | None) -> None:
        if recorded is None:
            return
        if now is None:
            self._differ(self._log.step + 1, f"its loss was {recorded!r}, and the training step returns none now")
        self._course.losses += 1
        off = _off(now, recorded)
        self._course.off = max(self._course.off, off)
        if off > (self._course.tolerance or 0.0):
            cause = DATA if self._sure == self._log.step else ""
            said = f"its loss was {recorded!r} and is {now!r} now (relative difference {off:.2g})"
            self._differ(self._log.step + 1, said + cause)

    def _differ(self, step: int, what: str) -> NoReturn:
        me, last = self._log.me, self._last_fold
        said = [f"{self._log.name}, {f'step {step}' if step else 'before its first step'}: {what}"]
        mine = [one for one in self._course.steps if one.member == me]
        if step and mine:
            said.append(mine[-1].data)
        if step and self._course.tolerance is None:
            said.append(f"its weights were last seen as recorded after step {self._sure}")
        if last is not None:
            said.append(
                f"last fold in step {last.folded}, from {self._log.kind} {last.other} (its step {last.base}, delay "
                f"{last.delay})"
            )
        raise Difference(me, step, "; ".join(said))


def _set_number(group: dict[str, Any], name: str, value: Any) -> None:
    now = group.get(name)
    if isinstance(now, Tensor):
        now.fill_(value)
    else:
        group[name] = tuple(value) if isinstance(now, tuple) else value


def _moved(before: Tensor, now: Tensor) -> float:
    norm = float(now.norm())
    return float((now - before).norm()) / norm if norm else math.inf


def _off(now: float, recorded: float) -> float:
    if now == recorded or (math.isnan(now) and math.isnan(recorded)):
        return 0.0
    off = abs(now - recorded) / max(abs(now), abs(recorded))
    return math.inf if math.isnan(off) else off
