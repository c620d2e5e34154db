"""All members as one of them sees them: by their exact words at the last meeting, and by notes carried forward to now.

last meeting   0: 40   1: 12   2: 40                  exact
notes          0: 52   1: 15   2: dead                a moment old
by now         0: 53.4 1: 15.6 2: 40, elsewhere       what the dead did after their last meeting does not count
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_async.data.crew import Desk
from lightning_async.progress.appointment import Sight
from lightning_async.progress.report import Report
from lightning_async.progress.tally import Tally, Unit, total


class Others:
    """What one member knows of all.

    Args:
        desk: The board and who is there.
        before: What an earlier part of the run did, as the run counts it.
        taken: How many updates members took in it.
    """

    def __init__(self, desk: Desk, before: Tally, taken: int) -> None:
        self._desk = desk
        self._before, self._taken = before, taken
        self._began: float | None = None
        self._met: dict[int, Report] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._reports: dict[int, Report] = {}

    def met(self, reports: Mapping[int, Report]) -> Tally:
        """What all said of themselves at a meeting; returns the sum of the run."""
        self._began = self._desk.now() if self._began is None else self._began
        self._met |= reports
        return total([self._before, *(report.weighed for report in self._met.values())])

    def at(self, reports: Mapping[int, Report]) -> tuple[Tally, int]:
        """The sum of the run, and the updates that members took, where these are their words; nobody has met."""
        words = {**self._met, **reports}.values()
        sums = total([self._before, *(report.weighed for report in words)])
        return sums, self._taken + sum(report.tally.updates for report in words)

    @property
    def taken(self) -> int:
        """How many updates members had taken when they met."""
        return self._taken + sum(report.tally.updates for report in self._met.values())

    def even_out(self, updates: int) -> None:
        """From here on the run counts so many updates more."""
        self._before = self._before.plus(Tally(updates=updates))

    def go_on(self, reports: Mapping[int, Report]) -> None:
        """They leave the meeting like this."""
        self._reports |= reports

    def set_off(self) -> None:
        """A meeting is over: all go on now, wherever their notes are from."""
        now = self._desk.now()
        self._heard = {rank: (raw, now) for rank, (raw, _) in self._heard.items()}

    def listen(self, mine: Report) -> dict[int, Report]:
        """The newest report of every living member, this one's included."""
        for rank, raw in self._desk.notes().items():
            if rank not in self._heard or self._heard[rank][0] != raw:
                self._heard[rank] = (raw, self._desk.now())
                report = Report.unpack(raw)
                self._reports[rank] = report if report.meetings == mine.meetings else replace(report, ended=False)
        self._reports[self._desk.me] = mine
        return {rank: self._reports.get(rank, Report()) for rank in self._desk.members()}

    def sights(self, unit: Unit, mine: Report) -> dict[int, Sight]:
        """All that live, by now; who has told no speed has not ended a batch since the beginning."""
        reports, live, now = self.listen(mine), {*self._desk.live(), self._desk.me}, self._desk.now()
        most = 1 / max(1e-3, now - (now if self._began is None else self._began))
        return {
            rank: report.sight(unit, age=self._age(rank, now), live=rank in live, most=most)
            for rank, report in reports.items()
        }

    def told(self, unit: Unit, mine: Report) -> int:
        """What all the others have done at least, by their own words."""
        others = (report.weighed for rank, report in self.listen(mine).items() if rank != self._desk.me)
        return total(others)[unit] + self.elsewhere(unit)

    def about(self, unit: Unit, mine: Report) -> int:
        """What all the others have done by now, as far as one can foresee it."""
        others = (sight for rank, sight in self.sights(unit, mine).items() if rank != self._desk.me)
        return int(sum(sight.count * sight.weight for sight in others)) + self.elsewhere(unit)

    def told_taken(self, mine: Report) -> int:
        """How many updates members have taken at least, this one's included."""
        here = self.listen(mine)
        gone = (report for rank, report in self._met.items() if rank not in here)
        return self._taken + sum(report.tally.updates for report in (*here.values(), *gone))

    @property
    def weight(self) -> int:
        """What a batch of each member that is there counts for, together, by their words at the last meeting."""
        members = set(self._desk.members())
        return sum(report.weight for rank, report in self._met.items() if rank in members)

    def stuck(self, mine: Report) -> tuple[int, int] | None:
        """Who has nothing more to train on while this member is in a step that takes all of them; and after how many
        batches."""
        others = ((rank, report) for rank, report in self.listen(mine).items() if rank != self._desk.me)
        for rank, report in others:
            if report.ended and report.meetings == mine.meetings and report.tally.batches <= mine.tally.batches:
                return rank, report.tally.batches
        return None

    def elsewhere(self, unit: Unit) -> int:
        """What nobody who is there did: the earlier part of the run, and the dead up to their last meeting."""
        members = set(self._desk.members())
        gone = total(report.weighed for rank, report in self._met.items() if rank not in members)
        return self._before.plus(gone)[unit]

    def _age(self, rank: int, now: float) -> float:
        return now - self._heard[rank][1] if rank in self._heard and rank != self._desk.me else 0.0
