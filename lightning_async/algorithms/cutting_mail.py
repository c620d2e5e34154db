"""A mail through which cuts are taken: it stands between an algorithm, which knows nothing of them, and its carrier.

    algorithm  <--take--  [ early | ready | lent ]  <--take--  carrier
               --post-->  [ marker first         ]  --post-->

1. A member records its state between two steps; then a marker goes to every peer before anything else does. While it
   cannot be posted (slot taken, peer frozen, link not up), `post` answers False: what would have left stays at home.
2. What was posted behind a marker is handed out only after the receiver's own record: a step later at most.
3. What was posted before its sender's record, and not folded before its receiver's, was under way: it is in the cut.
   So is what an algorithm has taken and keeps for later; it must not have acted on it yet.

Nobody waits: a member that is frozen, or still to come, delays the end of a cut, and the others train on. A
second cut is recorded here when the first has ended here, complete or given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Generic, TypeVar

from lightning_async.algorithms.cut import Part, copied, from_before
from lightning_async.transport.mail import CUT, FIRST_FREE_KIND, SUM, Letter, Loss, Mail, Message, Service, Wait
from lightning_async.transport.rounds import Rounds

S = TypeVar("S")
KINDS = range(FIRST_FREE_KIND, 64)  # those of algorithms


class CuttingMail(Generic[S]):
    """The mail of one member.

    Args:
        mail: The carrier's. Everything that the algorithm posts and takes must go through here from the start.
        record: This member's state (weights, algorithm, steps, ...), copied. Called between two steps only.
        letters: Of a restored cut: what was under way to this member. It is delivered before anything else.
        losses: Of a restored cut: what its algorithm had not heard of.
    """

    def __init__(
        self, mail: Mail, record: Callable[[], S], *, letters: Iterable[Letter] = (), losses: Iterable[Loss] = ()
    ) -> None:
        self._mail, self._state = mail, record
        self._newest = 0  # the cut recorded last
        self._wished = 0  # the one somebody here asked for
        self._open: Part[S] | None = None
        self._ends: dict[int, int] = {}  # of the open cut: where the peers' mail from before their records ends
        self._marks: dict[int, tuple[int, int]] = {}  # each peer's newest marker: (its cut, its number on the link)
        self._unmarked: set[int] = set()  # the marker to them is not posted yet
        self._boxes: dict[int, list[Letter]] = {}  # arrived and not handed out, by kind
        self._since: dict[tuple[int, int], float] = {}  # when those that had to stay arrived
        self._lent: dict[tuple[int, int], Letter] = {}  # handed out and not folded
        self._losses = list(losses)  # known, and not handed out
        self._ended: list[Part[S]] = []
        for letter in from_before(letters):
            self._boxes.setdefault(letter.message.kind, []).append(letter)

    # -- cuts -------------------------------------------------------------------------------------------------------

    def begin_cut(self, number: int) -> None:
        """Between two steps: take part in cut `number` now, or as soon as an older one has ended here.

        Any member may begin a cut, and several may begin the same. Begin the next one when all parts of the last are
        there, or one of them is given up.
        """
        if number < 1:
            raise ValueError(f"the `number` of a cut must be at least 1, got {number}")
        self._wished = max(self._wished, number)
        self.between_steps()

    def between_steps(self) -> None:
        """This member's state is whole at this moment: record it if there is a cut to take part in."""
        self._look()
        self._go_on(self._asked())

    @property
    def open(self) -> int | None:
        """The number of the cut that is recorded here and waits for markers."""
        return None if self._open is None else self._open.number

    @property
    def newest(self) -> int:
        """The number of the newest cut that is known of here; 0 before the first."""
        return self._asked()

    def taken(self) -> Part[S] | None:
        """The next part that has ended, complete or given up; each once."""
        return self._ended.pop(0) if self._ended else None

    def finish(self, rounds: Rounds) -> Wait[None]:
        """Between two steps, before a meeting: end the newest cut that anybody knows of. None may begin until after it.

        A member that waits in a meeting is between no two steps, and would never see what is behind a marker.
        """
        words = yield from rounds.agree(str(self._asked()).encode(), what="cut")
        newest = self._wished = max(int(word) for word in words.values())
        while True:
            self._look()
            self._go_on(newest)
            missing = self._missing() or self._unmarked
            if not missing:
                return
            yield f"rank {min(missing)} to take part in cut {self._newest}"

    # -- mail -------------------------------------------------------------------------------------------------------

    @property
    def me(self) -> int:
        """See `Mail.me`."""
        return self._mail.me

    @property
    def world(self) -> int:
        """See `Mail.world`."""
        return self._mail.world

    def post(self, peer: int, message: Message) -> bool:
        """See `Mail.post`. While the marker to `peer` cannot be posted, nothing else can."""
        return self._has_marked(peer) and self._mail.post(peer, message)

    def free(self, peer: int, kind: int) -> bool:
        """See `Mail.free`."""
        return self._has_marked(peer) and self._mail.free(peer, kind)

    def take(self, kind: int) -> list[Letter]:
        """See `Mail.take`. What was posted behind a marker stays here until this member has recorded."""
        self._look(kind)
        box = self._boxes.pop(kind, [])
        ready = [self._aged(letter) for letter in box if not self._is_early(letter)]
        if early := [letter for letter in box if self._is_early(letter)]:
            self._boxes[kind] = early
        self._lent.update({(letter.peer, letter.number): letter for letter in ready})
        self._date_what_stays()
        return ready

    def folded(self, letter: Letter) -> None:
        """See `Mail.folded`."""
        self._lent.pop((letter.peer, letter.number), None)
        if letter.number > 0:
            self._mail.folded(letter)

    def lost(self) -> list[Loss]:
        """See `Mail.lost`."""
        losses, self._losses = self._losses + self._new_losses(), []
        return losses

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """A service's state changes between any two letters, so it is whole at no step of its member: refused."""
        raise NotImplementedError("methods with a service cannot be cut between meetings: save at meetings")

    def at(self, step: int) -> None:
        """See `Mail.at`."""
        self._mail.at(step)

    def members(self) -> tuple[int, ...]:
        """See `Mail.members`."""
        return self._mail.members()

    def live(self) -> tuple[int, ...]:
        """See `Mail.live`."""
        return self._mail.live()

    def now(self) -> float:
        """See `Mail.now`."""
        return self._mail.now()

    def wait(self, timeout: float) -> None:
        """See `Mail.wait`."""
        self._mail.wait(timeout)

    # -- within -----------------------------------------------------------------------------------------------------

    def _asked(self) -> int:
        """The newest cut that was asked for. The dead ask for nothing."""
        alive = self._mail.members()
        return max(self._newest, self._wished, *(cut for peer, (cut, _) in self._marks.items() if peer in alive))

    def _missing(self) -> set[int]:
        """Those whose markers the open cut waits for."""
        return set() if self._open is None else {*self._open.members} - {self._open.member, *self._ends}

    def _go_on(self, newest: int) -> None:
        """Between two steps: give up what the dead spoilt, record if it is time (up to cut `newest`), post markers."""
        alive = self._mail.members()
        if self._open is not None and (deaths := self._missing().difference(alive)):
            self._end(replace(self._open, letters=[], losses=[], deaths=tuple(sorted(deaths))))
        number = min(self._asked(), newest)
        if self._open is None and number > self._newest:
            self._record(number)
        self._unmarked.intersection_update(alive)
        for peer in sorted(self._unmarked):
            self._has_marked(peer)
        self._date_what_stays()

    def _record(self, number: int) -> None:
        """Rule 1. What is in this member's hands was under way to it when it recorded."""
        self._look(*KINDS)
        members = self._mail.members()
        self._losses += self._new_losses()
        self._newest = number
        self._unmarked = {*members} - {self.me}
        self._ends = {peer: at for peer, (cut, at) in self._marks.items() if cut >= number and peer in members}
        self._open = Part(number, self.me, members, self._state(), losses=[copied(loss) for loss in self._losses])
        for letter in (*self._lent.values(), *(letter for box in self._boxes.values() for letter in box)):
            self._note(letter)
        self._end_if_complete()

    def _has_marked(self, peer: int) -> bool:
        """Whether the marker to `peer` is on its way, if there has to be one."""
        if peer in self._unmarked and self._mail.post(peer, Message(CUT, reference=self._newest)):
            self._unmarked.discard(peer)
        return peer not in self._unmarked

    def _look(self, *kinds: int) -> None:
        """Take the letters of these kinds; where markers came, also all that was posted before them."""
        markers = True
        while markers:
            for letter in [letter for kind in kinds for letter in self._mail.take(kind)]:
                self._boxes.setdefault(letter.message.kind, []).append(letter)
                self._note(letter)
            came = self._mail.take(CUT)  # after the letters: whatever is here was posted behind markers that are here
            for marker in came:
                self._mark(marker)
            markers, kinds = bool(came), tuple(KINDS)
        self._end_if_complete()

    def _mark(self, marker: Letter) -> None:
        """A later cut's marker stands for an earlier one's: nothing was posted in between."""
        self._mail.folded(marker)
        self._marks[marker.peer] = cut, number = marker.message.reference, marker.number
        part = self._open
        if part is not None and cut >= part.number and marker.peer in part.members:
            self._ends.setdefault(marker.peer, number)
            part.letters = [letter for letter in part.letters if self._is_under_way(letter)]

    def _note(self, letter: Letter) -> None:
        """Rule 3."""
        if self._open is not None and self._is_under_way(letter):
            self._open.letters.append(copied(letter))

    def _is_under_way(self, letter: Letter) -> bool:
        """Whether a letter that was not folded at the own record was posted before its sender's."""
        end = self._ends.get(letter.peer)
        return letter.message.kind >= FIRST_FREE_KIND and (end is None or letter.number < end)

    def _is_early(self, letter: Letter) -> bool:
        """Rule 2: whether a letter is from behind the marker of a cut that this member has not recorded yet."""
        cut, number = self._marks.get(letter.peer, (0, 0))
        return cut > self._newest and letter.number > number and letter.peer in self._mail.members()

    def _date_what_stays(self) -> None:
        if self._boxes:
            now = self._mail.now()
            for letter in [letter for box in self._boxes.values() for letter in box]:
                self._since.setdefault((letter.peer, letter.number), now)

    def _aged(self, letter: Letter) -> Letter:
        """It is older by as long as it had to stay here."""
        since = self._since.pop((letter.peer, letter.number), None)
        return letter if since is None else replace(letter, seconds=letter.seconds + self._mail.now() - since)

    def _end_if_complete(self) -> None:
        if self._open is not None and not self._missing():
            self._end(self._open)

    def _end(self, part: Part[S]) -> None:
        self._ended.append(part)
        self._open = None

    def _new_losses(self) -> list[Loss]:
        return [loss for loss in self._mail.lost() if loss.message.kind not in (CUT, SUM)]
