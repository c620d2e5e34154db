"""One member's view of how far all have come, and of where they stop together.

    batch ended -> count -> publish a note
                            the others' notes, carried forward: near a point? -> propose an appointment
                            appointment known, own part done -> MEETING: words -> outcome

Between meetings nobody waits: notes are a moment old and the sum is an estimate. At a meeting every member brings its
exact count, so all agree on the sum, on what is due, and on what anybody wished for. What a dead member did after its
last meeting does not count: its samples are trained on again.

A point that is near already at a meeting is appointed there, by the same arithmetic on the same words on every member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_async.data.crew import Desk
from lightning_async.data.pace import Pace
from lightning_async.progress.agenda import Agenda, Due
from lightning_async.progress.appointment import Appointment, Sight, appoint, soon
from lightning_async.progress.report import Report, Wish
from lightning_async.progress.tally import Tally, Unit, total

LATENCY = 0.3
"""Seconds after which all that can hear have heard of an appointment."""
LATENCY_IN_STEP = 2.0
"""The same for members that wait for each other at every step: who heard too late would wait for ever."""
LEAD = 1.5
"""Seconds, besides two batches of the slowest, by which an appointment is made ahead."""
LOOK = 0.1
"""Seconds between looks at the others' notes."""
FEW = 32
"""Batches a member that are few enough to be shared out equally while no speed is known."""


@dataclass(frozen=True)
class Outcome:
    """What a meeting agreed on.

    Attributes:
        ended: Whether all members have ended the epoch; else those that have wait for the next meeting.
        now: The sum over all members.
        due: What is due.
        wishes: What anybody asked for.
        first: What the first member asked for.
    """

    ended: bool
    now: Tally
    due: Due
    wishes: Wish
    first: Wish


class Progress:
    """The run's progress, as one member sees it.

    Args:
        desk: The board and who is there.
        n: How many members the run began with; a step of the run is n updates.
        agenda: What is due, and when.
        batch: This member's samples of a batch.
        in_step: Whether all members take their steps together: then one's own count is everybody's.
        before: What an earlier part of the run did, scaled to `n` members.
        epoch: What had been done when the epoch began.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        n: int,
        agenda: Agenda,
        batch: int = 1,
        in_step: bool = False,
        before: Tally | None = None,
        epoch: Tally | None = None,
    ) -> None:
        self.n = n
        self.agenda = agenda
        self.before = before or Tally()
        self.agreed = self.before
        self.epoch = epoch or Tally()
        self.own = Tally()
        self.ended = False
        self.wishes = Wish.NOTHING
        self.meetings = 0
        self._desk = desk
        self._batch = batch
        self._in_step = in_step
        self._began = desk.now()
        self._pace = Pace()
        self._rates = (0.0, 0.0, 0.0)
        self._met: dict[int, Tally] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._reports: dict[int, Report] = {}
        self._appointment: Appointment | None = None
        self._next_look = 0.0
        self._others = 0
        self._said = Wish.NOTHING
        self._called = -1
        self._meeting = True

    # -- the training thread, between meetings --------------------------------------------------------------------

    def batch_started(self) -> None:
        """A batch begins; after a meeting all begin now."""
        now = self._desk.now()
        self._pace.start(now)
        if self._meeting:
            self._meeting = False
            self._heard = {rank: (raw, now) for rank, (raw, _) in self._heard.items()}
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
            self._keep_agenda()

    def is_last(self) -> bool:
        """Whether the batch under way is this member's last before the epoch ends by the agenda."""
        kept = self.appointment
        if kept is None or not kept.target or kept.unit != Unit.BATCHES:
            return False
        mine = kept.parts.get(self._desk.me, 0)
        return self.own.batches + 1 >= mine and self.agenda.ends_epoch(kept.unit, kept.target, self.epoch)

    def is_due(self) -> bool:
        """Whether this member has done its part and stops for the others now."""
        kept = self.appointment
        return kept is not None and self.own[kept.unit] >= kept.parts.get(self._desk.me, 0)

    def call(self, wishes: Wish) -> None:
        """Ask for a meeting as soon as all can hear of it."""
        self.wishes |= wishes
        if self.appointment is None and self._called < self.meetings:
            self._called = self.meetings
            latency = LATENCY_IN_STEP if self._in_step else LATENCY
            called = soon(Unit.BATCHES, self._sights(Unit.BATCHES), latency)
            self._propose(called.in_step() if self._in_step else called)

    @property
    def appointment(self) -> Appointment | None:
        """The one that was made, if any: the same on every member."""
        if self._appointment is None and (value := self._desk.decided(self._key)) is not None:
            self._appointment = Appointment.unpack(value)
        return self._appointment

    def steps(self) -> int:
        """Steps of the run by now: never less than before, and not the next point before all are there."""
        return self._steps(self._others)

    def about(self) -> int:
        """Steps of the run by now, the others carried forward at their speeds: smoother, and perhaps too many."""
        ahead = sum(sight.count for rank, sight in self._sights(Unit.UPDATES).items() if rank != self._desk.me)
        return self._steps(self._elsewhere(Unit.UPDATES) + int(ahead))

    def _steps(self, others: int) -> int:
        if self._in_step:
            others = self._elsewhere(Unit.UPDATES) + self.own.updates * (len(self._desk.members()) - 1)
        if self._meeting:
            return self.agreed.updates // self.n
        count = others + self.own.updates
        for unit, point in self.agenda.points(self.agreed, self.epoch):
            if unit == Unit.UPDATES:
                count = min(count, point - self.n)
        return max(self.agreed.updates // self.n, count // self.n)

    # -- meetings ---------------------------------------------------------------------------------------------------

    def sign(self) -> int:
        """Grows as long as somebody gets on."""
        return sum(report.tally.batches for report in self._listen().values())

    def word(self) -> bytes:
        """What this member brings to a meeting. Its note says that it stands still: nobody is to foresee more of it."""
        self._said = self.wishes
        self._desk.publish(replace(self._report(), ended=True).pack())
        return replace(self._report(), kept=self._kept()).pack()

    def _kept(self) -> tuple[int, int]:
        """What was appointed and done here: not all need to have heard of it, so each says it for itself."""
        made = self.appointment
        done = made is not None and self.own[made.unit] >= made.parts.get(self._desk.me, 0)
        return (made.unit, made.target) if made is not None and done else (0, 0)

    def settle(self, words: Mapping[int, bytes]) -> Outcome:
        """Draw the same conclusion from all words on every member."""
        reports = {rank: Report.unpack(word) for rank, word in words.items()}
        self._began = self._began if self.meetings else self._desk.now()
        self._met |= {rank: report.tally for rank, report in reports.items()}
        last, kept = self.agreed, {report.kept for report in reports.values()}
        now = total([self.before, *self._met.values()])
        if len(kept) == 1:  # all did their parts of one appointment: its point is reached, even if a death left less
            unit, target = next(iter(kept))
            now = now.at_least(Unit(unit), target)
        self.agreed = Tally(*map(max, last, now))
        outcome = self._outcome(reports, self.agenda.due(last, self.agreed, self.epoch))
        self._begin_anew(reports, ended=outcome.ended or bool(outcome.due & Due.END_EPOCH))
        return outcome

    def _outcome(self, reports: Mapping[int, Report], due: Due) -> Outcome:
        wishes = Wish.NOTHING
        for report in reports.values():
            wishes |= report.wishes
        return Outcome(
            ended=all(report.ended for report in reports.values()),
            now=self.agreed,
            due=due,
            wishes=wishes,
            first=reports[min(reports)].wishes,
        )

    def _begin_anew(self, reports: Mapping[int, Report], *, ended: bool) -> None:
        self.meetings += 1
        self._appointment = None
        self.wishes &= ~self._said
        self._pace.stop()
        if ended:
            self.epoch = self.agreed
            self.ended = False
            reports = {rank: replace(report, ended=False) for rank, report in reports.items()}
        self._reports |= reports
        self._appointment = self._at_once(reports)
        self._meeting = True

    def _at_once(self, reports: Mapping[int, Report]) -> Appointment | None:
        """The next appointment, if its point is near already; members that go in step need nobody's speed."""
        if self._in_step:
            return self._in_equal_parts(reports)
        found: list[tuple[float, Appointment]] = []
        for unit, point in self.agenda.points(self.agreed, self.epoch):
            sights = {rank: report.sight(unit, age=0.0, live=True) for rank, report in reports.items()}
            rates = [sight.rate for sight in sights.values() if sight.goes_on]
            left = point - self.agreed[unit]
            seconds = left / sum(rates) if rates and min(rates) > 0 else 0.0
            most = FEW * sum(report.batch if unit == Unit.SAMPLES else 1 for report in reports.values())
            few = bool(rates) and min(rates) <= 0 and left <= most
            if few or (seconds and seconds <= self._lead(reports)):
                elsewhere = self.agreed[unit] - total(report.tally for report in reports.values())[unit]
                found.append((seconds or left / most, appoint(unit, point, sights, 0.0, elsewhere)))
        return min(found, key=lambda one: one[0])[1] if found else None

    def _in_equal_parts(self, reports: Mapping[int, Report]) -> Appointment | None:
        """All stop after the same of their steps: one that went on would wait for one that stopped."""
        found: list[tuple[float, Unit, int, int]] = []
        for unit, point in self.agenda.points(self.agreed, self.epoch):
            each = -(-(point - self.agreed[unit]) // len(reports))
            found.append((each / (self._batch if unit == Unit.SAMPLES else 1), unit, point, each))
        if not found:
            return None
        _, unit, point, each = min(found)
        return Appointment(unit, point, {rank: report.tally[unit] + each for rank, report in reports.items()})

    # -- the others ---------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return f"appointment/{self.meetings}"

    def _report(self) -> Report:
        return Report(self.own, self._rates, self.ended, self.wishes, self.meetings, self._batch)

    def _look_around(self) -> None:
        """What the others have told: a little less than they have done, so that the run's steps are never too many."""
        self._next_look = self._desk.now() + LOOK
        told = total(report.tally for rank, report in self._listen().items() if rank != self._desk.me)
        self._others = told.updates + self._elsewhere(Unit.UPDATES)

    def _keep_agenda(self) -> None:
        """Make an appointment if a point is near and nobody has."""
        points = list(self.agenda.points(self.agreed, self.epoch))
        if not points or self._in_step or self.appointment is not None:
            return
        reports = self._listen()
        found: list[tuple[float, Unit, int]] = []
        for unit, point in points:
            sights = self._sights(unit)
            rate = sum(sight.rate for sight in sights.values() if sight.goes_on)
            left = point - self._elsewhere(unit) - sum(sight.count for sight in sights.values())
            found.append((left / rate if rate else 0.0 if left <= 0 else float("inf"), unit, point))
        seconds, unit, point = min(found)
        if seconds <= self._lead(reports):
            self._propose(appoint(unit, point, self._sights(unit), LATENCY, self._elsewhere(unit)))

    def _propose(self, appointment: Appointment) -> None:
        self._desk.propose(self._key, appointment.pack())

    def _lead(self, reports: Mapping[int, Report]) -> float:
        slowest = min((report.rates[0] for report in reports.values() if report.rates[0]), default=0.0)
        return LEAD + (2.0 / slowest if slowest else 0.0)

    def _listen(self) -> dict[int, Report]:
        """The newest report of every living member, this one's included."""
        for rank, raw in self._desk.notes().items():
            if rank not in self._heard or self._heard[rank][0] != raw:
                self._heard[rank] = (raw, self._desk.now())
                report = Report.unpack(raw)
                self._reports[rank] = report if report.meetings == self.meetings else replace(report, ended=False)
        self._reports[self._desk.me] = self._report()
        return {rank: self._reports.get(rank, Report()) for rank in self._desk.members()}

    def _sights(self, unit: Unit) -> dict[int, Sight]:
        """All that live, by now; who has told no speed has not ended a batch since the beginning."""
        reports, live, now = self._listen(), {*self._desk.live(), self._desk.me}, self._desk.now()
        most = 1 / max(1e-3, now - self._began)
        return {
            rank: report.sight(unit, age=self._age(rank, now), live=rank in live, most=most)
            for rank, report in reports.items()
        }

    def _age(self, rank: int, now: float) -> float:
        return now - self._heard[rank][1] if rank in self._heard and rank != self._desk.me else 0.0

    def _elsewhere(self, unit: Unit) -> int:
        """What nobody who is there did: the earlier part of the run, and the dead up to their last meeting."""
        members = set(self._desk.members())
        gone = total(tally for rank, tally in self._met.items() if rank not in members)
        return self.before.plus(gone)[unit]
