"""A stage's place in the pipe: its turns, and the edges to its neighbours.

    turn n of stage s:   gradient of batch n - delay  <-- s + 1      apply it, pass it on to s - 1
                         batch n  <-- s - 1                          run it forward, pass it on to s + 1

The delay is part of the method, so what is computed does not depend on who is fast: the same numbers come out at any
speed of the stages and links, and in one process (`simulator`).

At a rest (validation, a checkpoint, the end) each place tells its neighbours after which batch: two that rest after
different batches hear it at once, in place of waiting for each other.

A wish to stop goes down with the batches; the last stage names a batch, which goes up with the gradients and is known
to each stage before it gets there: so all stop after the same one (`halt`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_async.arrival import Arrival, Fate
from lightning_async.fresh import Fresh
from lightning_async.pipeline import schedule
from lightning_async.pipeline.edge import (
    ACTIVATIONS,
    GRADIENTS,
    LostStageError,
    Parcel,
    Receiver,
    Sender,
    Wire,
    present,
)
from lightning_async.pipeline.norms import Norms
from lightning_async.pipeline.schedule import Order
from lightning_async.pipeline.stage import Compute, Stage
from lightning_async.transport.mail import MARKER, Mail, Message, Wait

Shrink = Callable[[Arrival, Tensor, Fresh], float]
WISH = 1 << 31
"""Beside the stamp of a batch, which is below it: somebody on the way down wishes to stop."""
REMEMBERED = 400
"""So many passes are in the timeline: how a run begins says how it goes on."""


class Place:
    """One stage among its neighbours.

    Args:
        stage: Its mathematics.
        mail: This member's mail.
        ranks: Who holds which stage, first to last.
        update: Applies the summed gradients; called when the last batch of a group has come back.
        shrink: The factor on what comes from the stage behind: a number, or a law that is asked each time.
        order: Update first, or forward first.
        wire: How tensors travel.
        device: Where this stage computes.
        since: The last batch before the first one, where a run goes on.
        aside: Carries what is no part of the training: rests, and what is evaluated; None: the mail.
        watch: Is given what each pass of a batch passes on, before it leaves.
    """

    def __init__(
        self,
        stage: Stage,
        mail: Mail,
        ranks: Sequence[int],
        *,
        update: Callable[[], object],
        shrink: float | Shrink = 1.0,
        order: Order = "update_first",
        wire: Wire = "as_is",
        device: torch.device | None = None,
        since: int = 0,
        aside: Mail | None = None,
        watch: Callable[[schedule.Pass, int, Tensor], object] = lambda direction, batch, made: None,
    ) -> None:
        self.stage, self.mail, self.shrink, self.order = stage, mail, shrink, order
        self.norms = Norms()
        self.updates = 0
        self.arrivals: list[Arrival] = []
        self.timeline: list[tuple[schedule.Pass, int, float, float]] = []
        self.wish, self.halt = False, 0
        self._update, self._watch = update, watch
        self._aside = mail if aside is None else aside
        self._ends: dict[int, bool] = {}
        self._batch = self._since = since
        self._ended: dict[int, int] = {}
        before = ranks[stage.index - 1] if stage.index else None
        behind = None if stage.last else ranks[stage.index + 1]
        self._before, self._behind = before, behind
        self._neighbours = [rank for rank in (before, behind) if rank is not None]
        if before is not None:
            self._from_before, self._evaluated_before = (
                Receiver(way, before, ACTIVATIONS, ended=lambda: self._has_ended(before), wire=wire, device=device)
                for way in (mail, self._aside)
            )
            self._to_before = Sender(mail, before, GRADIENTS, wire=wire)
        if behind is not None:
            self._from_behind = Receiver(
                mail, behind, GRADIENTS, ended=lambda: self._has_ended(behind), wire=wire, device=device
            )
            self._to_behind, self._evaluated_behind = (
                Sender(way, behind, ACTIVATIONS, wire=wire) for way in (mail, self._aside)
            )

    # -- one turn ------------------------------------------------------------------------------------------------------

    def begin(self, batch: int, *, ends: bool = True) -> Wait[None]:
        """A new batch is there: what comes before its forward pass. `ends`: an update is due when it has come back."""
        self._batch, self._ends[batch] = batch, ends
        if schedule.updates_first(self.stage.index, self.stage.stages, self.order):
            yield from self._apply_due()

    def arrived(self, batch: int) -> Wait[Parcel]:
        """What the stage before made of this batch; below 0: of one that is only evaluated."""
        parcel = yield from (self._from_before if batch > 0 else self._evaluated_before).receive(batch)
        self.wish = self.wish or bool(parcel.stamp & WISH)
        self.norms.before = parcel.told
        return replace(parcel, stamp=parcel.stamp & ~WISH)

    def forward(self, batch: int, x: Tensor, compute: Compute) -> Tensor:
        """Run it through the own blocks."""
        start = self.now()
        out = self.stage.forward(batch, x, compute, step=self.updates)
        self.note("F", batch, start)
        self._watch("F", batch, out)
        return out

    def pass_on(self, batch: int, out: Tensor, stamp: int = 0) -> Wait[None]:
        """Give the stage behind what this one made of the batch."""
        told = self.norms.before + self.norms.own
        way = self._to_behind if batch > 0 else self._evaluated_behind
        yield from way.send(batch, out, stamp | WISH * self.wish, told)

    def end(self) -> Wait[None]:
        """What comes after the forward pass."""
        if self.stage.last:
            self._ends.pop(self._batch, None)
        elif not schedule.updates_first(self.stage.index, self.stage.stages, self.order):
            yield from self._apply_due()

    def give_back(self, batch: int, gradient: Tensor) -> Wait[None]:
        """Give the stage before the gradient of what it sent."""
        if self.stage.last and self.wish and not self.halt:
            self.halt = batch + schedule.delay(0, self.stage.stages)
        self._watch("B", batch, gradient)
        yield from self._to_before.send(batch, gradient, self.halt, self.norms.behind + self.norms.own)

    def now(self) -> float:
        """Seconds on this member's clock."""
        return self._aside.now()

    def note(self, direction: schedule.Pass, batch: int, start: float) -> None:
        """Enter a pass that ends now in the timeline."""
        if len(self.timeline) < REMEMBERED:
            self.timeline.append((direction, batch, start, self.now()))

    def turn(self, batch: int, x: Tensor | None, compute: Compute, *, ends: bool = True) -> Wait[None]:
        """A whole turn of a stage that is not the last; `x` is what the first one begins with."""
        yield from self.begin(batch, ends=ends)
        stamp = 0
        if x is None:
            parcel = yield from self.arrived(batch)
            x, stamp = parcel.tensor, parcel.stamp
        yield from self.pass_on(batch, self.forward(batch, x, compute), stamp)
        yield from self.end()

    # -- gradients -----------------------------------------------------------------------------------------------------

    def drain(self) -> Wait[None]:
        """Apply what is still on its way back; afterwards the pipe fills anew."""
        for batch in schedule.drain(self._batch, self.stage.delay, self._since):
            yield from self._apply(batch)
        self.stage.drained()
        self._since = self._batch

    def _apply_due(self) -> Wait[None]:
        batch = schedule.due(self._batch, self.stage.delay, self._since)
        if batch:
            yield from self._apply(batch)

    def _apply(self, batch: int) -> Wait[None]:
        parcel = yield from self._from_behind.receive(batch)
        self.halt = parcel.stamp or self.halt
        self.norms.behind = parcel.told
        factor, start = self._factor(batch, parcel), self.now()
        gradient = self.stage.backward(batch, parcel.tensor, factor)
        self.note("B", batch, start)
        if gradient is not None:
            yield from self.give_back(batch, gradient)
        if self._ends.pop(batch):
            self.stage.before_step()
            self._update()
            self.stage.after_step()
            self.updates += 1

    def _factor(self, batch: int, parcel: Parcel) -> float:
        behind = self._behind if self._behind is not None else self.mail.me
        launched = self.stage.launched(batch)
        arrival = Arrival(behind, batch, launched, self.updates, parcel.seconds)
        law, fresh = self.shrink, self.stage.fresh
        factor = law if isinstance(law, (int, float)) else law(arrival, parcel.tensor, fresh)
        if factor != 1.0:
            arrival = Arrival(behind, batch, launched, self.updates, parcel.seconds, factor=factor, fate=Fate.SHRUNK)
        self.arrivals.append(arrival)
        return factor

    # -- rests ---------------------------------------------------------------------------------------------------------

    def rest(self, done: int) -> Wait[None]:
        """Stop here together with the neighbours, after so many batches; gradients may stay on their way."""
        unmarked = list(self._neighbours)
        while unmarked := [r for r in unmarked if not self._aside.post(r, Message(MARKER, step=done))]:
            yield from present(self._aside, unmarked[0])
            yield f"rank {unmarked[0]} to hear of a rest after batch {done}"
        for rank in self._neighbours:
            while (last := self._has_ended(rank)) is None:
                yield from present(self._aside, rank)
                yield f"rank {rank} to rest after batch {done}"
            if last != done:
                raise LostStageError(
                    f"rank {self.mail.me} has come to the end of its batches after {done}, rank {rank} after "
                    f"{last}: all stages must be given the same batches"
                )
            del self._ended[rank]

    def _has_ended(self, rank: int) -> int | None:
        for letter in self._aside.take(MARKER):
            self._ended[letter.peer] = letter.message.step
            self._aside.folded(letter)
        return self._ended.get(rank)
