"""Where one member stops for the others: at its part of an appointment, at a call, or in the dark; whichever is first.

a point is near     an appointment by counts and speeds, made once for all on the board, or by all alike at a meeting
somebody asks       a call on the board: who hears of it stops after the batch under way. Where all go in step it must
                    be confirmed (`call.py`)
no speed is known   in the first second: at an equal part of the way to the next point, so that none is passed
nobody foresaw it   at the point itself, and asks the others there

An appointment may be far off: nobody knows a speed when the first one is made. A call does not unmake it, so it does
not matter who hears of which: each stops once, at the first that it knows of, and all stop for the same meeting. The
point counts as kept if all did their parts; else the sum says whether it was reached, and it may lie ahead as before.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_async.data.crew import Desk
from lightning_async.progress import planning
from lightning_async.progress.agenda import Agenda
from lightning_async.progress.appointment import Appointment, Sight, soon, weigh
from lightning_async.progress.call import Call
from lightning_async.progress.others import Others
from lightning_async.progress.report import Report
from lightning_async.progress.tally import Tally, Unit
from lightning_async.transport.mail import Wait

DARK = 1.5
"""Seconds after the beginning in which not all may have heard of the others' speeds, and then of an appointment."""


class Stops:
    """One member's next stop.

    Args:
        desk: The board and who is there.
        others: What this member knows of all.
        agenda: What is due, and when.
        in_step: Whether all members take their steps together.
    """

    def __init__(self, desk: Desk, others: Others, agenda: Agenda, *, in_step: bool) -> None:
        self._desk, self._others, self._agenda, self._in_step = desk, others, agenda, in_step
        self._now = self._epoch = Tally()
        self._left: tuple[Tally, Tally, Mapping[int, Report], Report] | None = None
        self._dark: dict[Unit, int] = {}
        self._began = 0.0
        self._appointment: Appointment | None = None
        self._go_on(0)

    def begin(self, now: Tally, epoch: Tally, reports: Mapping[int, Report], mine: Report) -> None:
        """All leave a meeting like this; `now` and `epoch` are sums over all members."""
        self._left = now, epoch, reports, mine
        self._now, self._epoch = now, epoch
        self._go_on(mine.meetings)
        if self._in_step:
            self._appointment = planning.in_equal_parts(self._agenda, now, epoch, reports, mine.batch // mine.weight)
        else:
            self._appointment = planning.at_once(self._agenda, now, epoch, reports)
        self._began = self._desk.now() if mine.meetings == 1 else self._began
        dark = planning.in_the_dark(self._agenda, now, epoch, reports)
        self._dark = {unit: mine.tally[unit] + part for unit, part in dark.items()}
        _ = self.called  # looked for from here on, it is found behind the first batch already

    def anew(self) -> None:
        """The agenda is another one since the last meeting, for all, and nobody has trained since."""
        if self._left is not None:
            self.begin(*self._left)

    def _go_on(self, meetings: int) -> None:
        self._key, self._call_key = f"appointment/{meetings}", f"call/{meetings}"
        self._appointment = None
        self._call = Call(self._desk, self._key)
        self._asked = self._called = False

    @property
    def appointment(self) -> Appointment | None:
        """The one that was made, if any: the same on every member."""
        if self._appointment is None and (value := self._desk.decided(self._key)) is not None:
            self._appointment = Appointment.unpack(value)
        return self._appointment

    @property
    def called(self) -> bool:
        """Whether somebody asked for a meeting, where members are free of each other."""
        self._called = self._called or self._desk.decided(self._call_key) is not None
        return self._called

    def look_ahead(self, mine: Report) -> None:
        """Make an appointment if a point is near and nobody has."""
        if self._in_step or self.appointment is not None or self.called:
            return
        others = self._others
        made = planning.on_the_way(
            self._agenda,
            self._now,
            self._epoch,
            others.listen(mine),
            lambda unit: self._sights(unit, mine),
            others.elsewhere,
        )
        if made is not None and (self._is_in_time(made, mine) or not self._is_dark()):
            self._propose(made)

    def ask(self, mine: Report) -> None:
        """Ask for a meeting as soon as all can hear of it, unless one is near."""
        if self._in_step:
            latency = planning.LATENCY * 2**self._call.tries
            self._call.propose(soon(Unit.BATCHES, self._sights(Unit.BATCHES, mine), latency).in_step())
        elif not self._asked and not self._is_near(mine):
            self._asked = True
            self._desk.propose(self._call_key, b"")

    def _is_near(self, mine: Report) -> bool:
        """Whether all are about to stop at an appointment."""
        made = self.appointment
        return made is not None and planning.is_near(made, self._sights(made.unit, mine), self._others.listen(mine))

    def comes(self, mine: Report) -> Wait[bool]:
        """Whether this member stops here."""
        if self.has_kept(mine.tally):
            return True
        if not self._in_step:
            return self.called or self._is_blind(mine) or self._is_there(mine)
        done = mine.tally.batches
        self._call.heed(done)
        while self._call.reached(done):
            holds = yield from self._call.holds()
            if holds:
                return True
            self._call.heed(done)
        return False

    def has_kept(self, own: Tally) -> bool:
        """Whether this member has done its part of the appointment."""
        made = self.appointment
        return made is not None and own[made.unit] >= made.parts.get(self._desk.me, 0)

    def kept(self, own: Tally) -> tuple[int, int]:
        """What was appointed and done here: not all need to have heard of it, so each says it for itself."""
        made = self.appointment
        return (made.unit, made.target) if made is not None and self.has_kept(own) else (0, 0)

    def ends_epoch(self, own: Tally) -> bool:
        """Whether the batch under way is this member's last before the epoch ends by the agenda."""
        made = self.appointment
        if made is None or made.unit != Unit.BATCHES:
            return False
        mine = made.parts.get(self._desk.me, 0)
        return own.batches + 1 >= mine and self._agenda.ends_epoch(made.unit, made.target, self._epoch)

    def heed(self, mine: Report) -> None:
        """Called again and again by a member that waits inside of a step that takes all of them.

        It answers calls, and raises if the step can never end.
        """
        self._call.heed(mine.tally.batches + 1)
        if (stuck := self._others.stuck(mine)) is not None:
            rank, batches = stuck
            raise RuntimeError(
                f"rank {rank} has no more batches in this epoch (after {batches}) while rank {self._desk.me} goes on: "
                "where all ranks take each step together they need equal numbers of batches: use balance='equal' and "
                "streams of equal length, or limit_train_batches"
            )

    def _is_blind(self, mine: Report) -> bool:
        """Whether one more step might pass a point, for all that this member knows of the others: it asks for a
        meeting, where all tell their speeds."""
        if self.appointment is not None or not self._is_dark():
            return False
        if all(mine.tally[unit] < part for unit, part in self._dark.items()):
            return False
        self.ask(mine)
        return True

    def _is_there(self, mine: Report) -> bool:
        """Whether a point is reached, by what all have told, and no appointment for it was heard of.

        A member that all of a sudden gets ten times faster is there before anybody could foresee it: rather than pass,
        it asks for a meeting.
        """
        if self.appointment is not None:
            return False
        points = self._agenda.points(self._now, self._epoch)
        if all(mine.weighed[unit] + self._others.told(unit, mine) < point for unit, point in points):
            return False
        self.ask(mine)
        return True

    def _is_in_time(self, made: Appointment, mine: Report) -> bool:
        """Whether nobody has to go past its part, by all that is known."""
        sights = self._sights(made.unit, mine)
        over = weigh(made.parts, sights) + self._others.elsewhere(made.unit) - made.target
        return 0 <= over < min((sight.weight for sight in sights.values() if sight.goes_on), default=1)

    def _is_dark(self) -> bool:
        return self._desk.now() - self._began < DARK

    def _sights(self, unit: Unit, mine: Report) -> dict[int, Sight]:
        return self._others.sights(unit, mine)

    def _propose(self, appointment: Appointment) -> None:
        self._desk.propose(self._key, appointment.pack())
