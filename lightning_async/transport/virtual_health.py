"""Who is healthy in a virtual cluster, who is heard, and who is dead: faults are put in here, and looked up here.

    healthy --freeze, cut--> mute --silence--> hushed (not live) --patience--> dead, for everybody and for ever
     ^   ^                                         |                            ^
     |   +-------------- thaw, heal ---------------+          kill --silence----+
    join
     |
    awaited (a member from the start, and hushed: nobody heard of it yet)

A frozen member is hushed for the others. A member that is cut off is hushed for the others and they for it. A cut
between two members hushes them for each other only; if it outlasts patience, the higher of the two is declared dead,
because a link that never heals must end somehow and all must agree how. A member declared dead is stopped, also if it
was only frozen: a rank never comes back.

Of an awaited member no silence is counted: patience with it, with a cut of its links, and with its never coming because
it was killed before, begins with its join.
"""

from __future__ import annotations

import math
from typing import Protocol

from lightning_async.transport.virtual_clock import VirtualClock

Subject = int | tuple[int, int]
"""What can be mute: a member, or the pair of members (lower first) whose link is cut."""


class Affected(Protocol):
    """Who is told when health changes."""

    def froze(self, member: int) -> None:
        """Its time stands still from now on."""

    def thawed(self, member: int) -> None:
        """Its time goes on."""

    def healed(self) -> None:
        """A cut ended: what was held back may pass."""

    def joined(self, member: int) -> None:
        """It is there from now on."""

    def stopped(self, member: int) -> None:
        """It does nothing any more (killed, or declared dead)."""

    def died(self, member: int) -> None:
        """It is declared dead: everybody is to hear of it."""

    def hearing_changed(self) -> None:
        """Who hears whom is not what it was."""


def pair(a: int, b: int) -> tuple[int, int]:
    """The subject that stands for the link between two members."""
    return (a, b) if a < b else (b, a)


class Health:
    """Faults, and what follows from them after silence and patience."""

    def __init__(self, clock: VirtualClock, affected: Affected, *, silence: float, patience: float) -> None:
        self._clock = clock
        self._affected = affected
        self._silence = silence
        self._patience = patience
        self._frozen: dict[int, float] = {}
        self._cuts: dict[Subject, float] = {}
        self._cut_since: dict[Subject, float] = {}
        self._mute: dict[Subject, tuple[int, set[str]]] = {}
        self._epoch = 0
        self._hushed: set[Subject] = set()
        self._awaited: set[int] = set()
        self.killed: dict[int, float] = {}
        self.dead: set[int] = set()
        self.version = 0

    # -- what others ask --------------------------------------------------------------------------------------------

    def is_frozen(self, member: int) -> bool:
        """Whether its time stands still."""
        return member in self._frozen

    def is_awaited(self, member: int) -> bool:
        """Whether it is still to join."""
        return member in self._awaited

    def is_stopped(self, member: int) -> bool:
        """Whether it was killed or declared dead."""
        return member in self.killed or member in self.dead

    def is_cut_off(self, member: int) -> bool:
        """Whether nothing passes between it and the rest, the board included."""
        return member in self._cuts

    def cut_since(self, member: int) -> float:
        """When it was cut off; infinity if it is not."""
        return self._cut_since.get(member, math.inf)

    def is_cut(self, a: int, b: int) -> bool:
        """Whether nothing passes between the two."""
        cuts = self._cuts
        return bool(cuts) and (a in cuts or b in cuts or pair(a, b) in cuts)

    def hears(self, me: int, peer: int) -> bool:
        """Whether `me` heard of `peer` within the last `silence` seconds."""
        hushed = self._hushed
        if not hushed:
            return True
        deaf = me in hushed and (me in self._cuts or me in self._awaited)
        return not (peer in hushed or deaf or pair(me, peer) in hushed)

    # -- faults -----------------------------------------------------------------------------------------------------

    def join(self, member: int, at: float) -> None:
        """Await `member` from now until then."""
        self._awaited.add(member)
        self._hushed.add(member)
        self._count_anew(member)
        self._clock.at(at, self._come, member)
        self._changed()

    def freeze(self, member: int, seconds: float) -> None:
        """Stop the time of `member` for so long."""
        if self.is_stopped(member):
            return
        until = self._clock.time + seconds
        if member not in self._frozen:
            self._affected.froze(member)
            self._begin(member, "frozen")
        self._frozen[member] = max(until, self._frozen.get(member, until))
        self._clock.at(until, self._thaw, member)

    def cut(self, subject: Subject, seconds: float) -> None:
        """Let nothing pass to and from a member, or between a pair, for so long."""
        until = self._clock.time + seconds
        self._cuts[subject] = max(until, self._cuts.get(subject, until))
        self._cut_since.setdefault(subject, self._clock.time)
        self._begin(subject, "cut")
        if not math.isinf(until):
            self._clock.at(until, self._heal, subject)

    def kill(self, member: int) -> None:
        """End `member` at once; what it had not put on the wire is gone."""
        if self.is_stopped(member):
            return
        self.killed[member] = self._clock.time
        self._affected.stopped(member)
        self._begin(member, "killed")
        if member not in self._awaited:
            self._clock.at(self._clock.time + self._silence, self._declare, member)

    def _come(self, member: int) -> None:
        self._awaited.discard(member)
        self._count_anew(member)
        if member not in self._mute:
            self._hushed.discard(member)
        if not self.is_stopped(member):
            self._affected.joined(member)
        self._changed()

    def _thaw(self, member: int) -> None:
        if self._clock.time < self._frozen.get(member, math.inf):
            return
        del self._frozen[member]
        self._end(member, "frozen")
        self._affected.thawed(member)

    def _heal(self, subject: Subject) -> None:
        if self._clock.time < self._cuts.get(subject, math.inf):
            return
        del self._cuts[subject], self._cut_since[subject]
        self._end(subject, "cut")
        self._affected.healed()

    # -- what follows -----------------------------------------------------------------------------------------------

    def _begin(self, subject: Subject, reason: str) -> None:
        if subject in self._mute:
            self._mute[subject][1].add(reason)
            return
        self._count(subject, {reason})

    def _count(self, subject: Subject, reasons: set[str]) -> None:
        self._epoch += 1
        self._mute[subject] = (self._epoch, reasons)
        if self._awaited.isdisjoint(_members(subject)):
            now = self._clock.time
            self._clock.at(now + self._silence, self._hush, subject, self._epoch)
            self._clock.at(now + self._patience, self._give_up, subject, self._epoch)

    def _count_anew(self, member: int) -> None:
        """Count the silence of all that is mute with this member from now on, or not at all while it is awaited."""
        for subject, (_, reasons) in list(self._mute.items()):
            if member in _members(subject):
                self._count(subject, reasons)

    def _end(self, subject: Subject, reason: str) -> None:
        reasons = self._mute[subject][1]
        reasons.discard(reason)
        if not reasons:
            del self._mute[subject]
            if subject not in self._awaited:
                self._hushed.discard(subject)
            self._changed()

    def _hush(self, subject: Subject, epoch: int) -> None:
        if subject in self._mute and self._mute[subject][0] == epoch:
            self._hushed.add(subject)
            self._changed()

    def _give_up(self, subject: Subject, epoch: int) -> None:
        if subject not in self._mute or self._mute[subject][0] != epoch:
            return
        if isinstance(subject, int):
            self._declare(subject)
        elif self.dead.isdisjoint(subject):  # the link of a dead member is no longer anybody's fault
            self._declare(subject[1])

    def _declare(self, member: int) -> None:
        if member in self.dead:
            return
        self.dead.add(member)
        self._affected.stopped(member)
        self._affected.died(member)

    def _changed(self) -> None:
        self.version += 1
        self._affected.hearing_changed()


def _members(subject: Subject) -> tuple[int, ...]:
    return (subject,) if isinstance(subject, int) else subject
