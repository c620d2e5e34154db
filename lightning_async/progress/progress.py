"""One member's view of how far all have come, and of where they stop together.

    batch ended -> count -> publish a note
                            the others' notes, carried forward: near a point? -> propose an appointment
                            appointment known, own part done -> MEETING: words -> outcome

Between meetings nobody waits: notes are a moment old and the sum is an estimate. At a meeting every member brings its
exact count, so all agree on the sum, on what is due, and on what anybody wished for. What a dead member did after its
last meeting does not count: its samples are trained on again.

A point that is near already at a meeting is appointed there, by the same arithmetic on the same words on every member.

Updates do not add up to an epoch's steps where members end it with a rest: of accumulated batches, or of other sizes.

    7 steps of 2 x 4 batches    member 0  43 batches: 11 updates     15 in all, of which the run counts 7 * 2 = 14
                                member 1  13 batches:  4 updates     "evened" is the sum of such differences: -1

So a whole epoch counts for the steps that a synchronous run has in it, whoever took them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lightning_async.data.crew import Desk
from lightning_async.data.pace import Pace
from lightning_async.progress.agenda import Agenda, Due, Item
from lightning_async.progress.others import Others
from lightning_async.progress.report import Report, Wish
from lightning_async.progress.stops import Stops
from lightning_async.progress.tally import Tally, Unit
from lightning_async.transport.mail import Wait

LOOK = 0.1
"""Seconds between looks at the others' notes."""


@dataclass(frozen=True)
class Outcome:
    """What a meeting agreed on.

    Attributes:
        ended: Whether the epoch is over, for all members; else those that have ended it wait for the next meeting.
        now: The sum over all members.
        due: What is due.
        wishes: What anybody asked for.
        first: What the first member asked for.
        empty: The members that have not trained in this epoch.
    """

    ended: bool
    now: Tally
    due: Due
    wishes: Wish
    first: Wish
    empty: tuple[int, ...] = ()


class Progress:
    """The run's progress, as one member sees it.

    Args:
        desk: The board and who is there.
        n: What a step of the run counts for: the members that it began with, each with its weight.
        agenda: What is due, and when.
        batch: This member's samples of a batch.
        weight: What each of its batches and updates counts for: 1 where all members' batches are alike.
        in_step: Whether all members take their steps together: then one's own count is everybody's.
        before: What an earlier part of the run did, scaled to `n` members.
        epoch: What had been done when the epoch began.
        evened: How many updates of `before` were counted, but not taken; negative for taken, but not counted.
        taken: How many updates members took in it, whatever they weigh; None: as many as were counted.

    Attributes:
        length: How many steps of the run the epoch under way has; 0 where it is not known. None are counted beyond.
        whole: The same when nothing of the epoch is left for this member; else 0. To be set before `word`.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        n: int,
        agenda: Agenda,
        batch: int = 1,
        weight: int = 1,
        in_step: bool = False,
        before: Tally | None = None,
        epoch: Tally | None = None,
        evened: int = 0,
        taken: int | None = None,
    ) -> None:
        self.n = n
        self.agenda = agenda
        self.before = before or Tally()
        self.agreed = self.before
        self.epoch = epoch or Tally()
        self.evened = evened
        self.taken = self.before.updates - evened if taken is None else taken
        self.length = self.whole = 0
        self.own = Tally()
        self.ended = False
        self.wishes = Wish.NOTHING
        self.meetings = 0
        self._desk = desk
        self._batch, self._weight = batch, weight
        self._in_step = in_step
        self._others = Others(desk, self.before, self.taken)
        self._stops = Stops(desk, self._others, agenda, in_step=in_step)
        self._pace = Pace()
        self._rates = (0.0, 0.0, 0.0)
        self._next_look = 0.0
        self._told = 0
        self._said = Wish.NOTHING
        self._began: dict[int, int] = {}
        self._meeting = True

    # -- the training thread, between meetings --------------------------------------------------------------------

    def batch_started(self) -> None:
        """A batch begins; after a meeting all begin now."""
        self._pace.start(self._desk.now())
        if self._meeting:
            self._meeting = False
            self._others.set_off()
            self._look_around()

    def batch_ended(self, *, updates: int, samples: int) -> None:
        """A batch was trained on."""
        self.own = self.own.plus(Tally(1, updates, samples))
        self._pace.completed(1, self._desk.now())
        done = self.own
        self._rates = tuple(self._pace.rate * count / done.batches for count in done)  # type: ignore[assignment]
        self._desk.publish(self._report().pack())
        if self._desk.now() >= self._next_look:
            self._look_around()
            self._stops.look_ahead(self._report())

    def renew(self, items: Iterable[Item]) -> None:
        """Between two epochs: from now on these are due, for all members."""
        self.agenda.items = tuple(items)
        self._stops.anew()

    def is_last(self) -> bool:
        """Whether the batch under way is this member's last before the epoch ends by the agenda."""
        return self._stops.ends_epoch(self.own)

    def comes(self) -> Wait[bool]:
        """Whether this member stops for the others now; waits only where all take their steps together."""
        return self._stops.comes(self._report())

    def heed(self) -> None:
        """To be called by who waits inside of a step: see `Stops.heed`."""
        if self._in_step:
            self._stops.heed(self._report())

    def call(self, wishes: Wish) -> None:
        """Ask for a meeting as soon as all can hear of it. Who waits at one, its word given, asks for the next."""
        self.wishes |= wishes
        self._stops.ask(self._report())

    def overhear(self) -> None:
        """Called by who waits for the others at a meeting. Nothing: this rank is a member by itself."""

    def look(self) -> None:
        """To be called by who waits and goes by how far the others come: it has no batch that would look around."""
        if self._desk.now() >= self._next_look:
            self._look_around()

    def steps(self) -> int:
        """Steps of the run by now: never less than before, not the next point before all are there, and none beyond the
        epoch's."""
        return self._within(self._steps(self._told))

    def about(self) -> int:
        """Steps of the run by now, the others carried forward at their speeds: smoother, and perhaps too many."""
        return self._steps(self._others.about(Unit.UPDATES, self._report()))

    def told(self) -> Tally:
        """What all have done at least, by their own words; at a meeting, exactly."""
        evened = Tally(updates=self.evened)
        if self._meeting:
            return self.agreed.minus(evened)
        mine = self._report()
        done = (mine.weighed[unit] + self._others.told(unit, mine) for unit in Unit)
        return Tally(*map(max, self.agreed, done)).minus(evened)

    def told_taken(self) -> int:
        """The updates of it, one by one and not weighed."""
        return self.taken if self._meeting else max(self.taken, self._others.told_taken(self._report()))

    def _steps(self, others: int) -> int:
        if self._in_step:
            weights = self._others.weight - self._weight
            others = self._others.elsewhere(Unit.UPDATES) + self.own.updates * weights
        if self._meeting:
            return self.agreed.updates // self.n
        count = others + self.own.updates * self._weight
        for unit, point in self.agenda.points(self.agreed, self.epoch):
            there = self.agreed.updates + int((point - self.agreed[unit]) * self._updates_for_one(unit))
            count = min(count, there - self.n)
        return max(self.agreed.updates // self.n, self._within(count // self.n))

    def _within(self, steps: int) -> int:
        """The same, but none beyond the epoch's."""
        return min(steps, self.epoch.updates // self.n + self.length) if self.length else steps

    def _updates_for_one(self, unit: Unit) -> float:
        """How many steps of an optimizer go with one of this unit, as seen here."""
        own = self.own.times(self._weight)
        return own.updates / own[unit] if own[unit] and unit != Unit.UPDATES else 1.0

    # -- meetings ---------------------------------------------------------------------------------------------------

    def sign(self) -> int:
        """Grows as long as somebody gets on."""
        return sum(report.tally.batches for report in self._others.listen(self._report()).values())

    def word(self) -> bytes:
        """What this member brings to a meeting. Its note says that it stands still: nobody is to foresee more of it."""
        self._said = self.wishes
        self._desk.publish(replace(self._report(), ended=True).pack())
        return replace(self._report(), kept=self._stops.kept(self.own), whole=self.whole).pack()

    def says(self) -> bytes:
        """This member's own counts by now, for who adds them up later (`at`)."""
        return self._report().pack()

    def at(self, words: Mapping[int, bytes]) -> tuple[Tally, int, int]:
        """Where the run was when each said so: the sum over all, the updates that were taken, the run's steps."""
        now, taken = self._others.at({rank: Report.unpack(word) for rank, word in words.items()})
        agreed = Tally(*map(max, self.agreed, now))
        return agreed, taken, self._within(agreed.updates // self.n)

    def settle(self, words: Mapping[int, bytes]) -> Outcome:
        """Draw the same conclusion from all words on every member."""
        reports = {rank: Report.unpack(word) for rank, word in words.items()}
        last, kept = self.agreed, {report.kept for report in reports.values()}
        now = done = self._others.met(reports)
        self.taken = self._others.taken
        if len(kept) == 1:  # all did their parts of one appointment: its point is reached, even if a death left less
            unit, target = next(iter(kept))
            now = now.at_least(Unit(unit), target)
        self.agreed = Tally(*map(max, last, now))
        due = self.agenda.due(last, self.agreed, self.epoch)
        ended = bool(due & Due.END_EPOCH) or all(report.ended for report in reports.values())
        if ended and bool(due & Due.END_EPOCH) == self.agenda.ends_epochs:
            self._even_out(reports, done)
        outcome = self._outcome(reports, due, ended=ended)
        self._begin_anew(reports, ended=ended)
        return outcome

    def _even_out(self, reports: Mapping[int, Report], done: Tally) -> None:
        """The epoch is over: if it is whole, and all say the same of it, it counts for its steps."""
        said = {report.whole for report in reports.values()}
        if len(said) == 1 and (steps := next(iter(said))):
            target = self.epoch.updates + steps * self.n
            self.agreed = self.agreed._replace(updates=target)
            self._others.even_out(target - done.updates)
            self.evened += target - done.updates

    def _outcome(self, reports: Mapping[int, Report], due: Due, *, ended: bool) -> Outcome:
        wishes = Wish.NOTHING
        for report in reports.values():
            wishes |= report.wishes
        return Outcome(
            ended=ended,
            now=self.agreed,
            due=due,
            wishes=wishes,
            first=reports[min(reports)].wishes,
            empty=tuple(r for r, report in reports.items() if report.tally.batches == self._began.get(r, 0)),
        )

    def _begin_anew(self, reports: Mapping[int, Report], *, ended: bool) -> None:
        self.meetings += 1
        self.wishes &= ~self._said
        self._pace.stop()
        if ended:
            self.epoch = self.agreed
            self.ended = False
            self._began = {rank: report.tally.batches for rank, report in reports.items()}
            reports = {rank: replace(report, ended=False) for rank, report in reports.items()}
        self._others.go_on(reports)
        self._stops.begin(self.agreed, self.epoch, reports, self._report())
        self._meeting = True

    # -- inside -------------------------------------------------------------------------------------------------------

    def _report(self) -> Report:
        return Report(self.own, self._rates, self.ended, self.wishes, self.meetings, self._batch, weight=self._weight)

    def _look_around(self) -> None:
        """What the others have told: a little less than they have done, so that the run's steps are never too many."""
        self._next_look = self._desk.now() + LOOK
        self._told = self._others.told(Unit.UPDATES, self._report())
