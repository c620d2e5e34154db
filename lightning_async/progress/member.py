"""The progress of a member of several ranks is its speaker's; what its siblings do by it, they are told.

    a batch begins    is it the epoch's last?                    the speaker looks at the others, and says
    it has ended      the run's steps (learning rates go by      the same
                      them), and whether a meeting follows
    at a meeting      what all agreed on                         the same
    anywhere          what a sibling wishes for                  stands in its note, where its speaker reads it

Siblings that looked for themselves would see the others at other moments, and step at other learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from lightning_async.data.crew import Desk
from lightning_async.progress.agenda import Due
from lightning_async.progress.progress import Outcome, Progress
from lightning_async.progress.report import Report, Wish
from lightning_async.progress.tally import Tally
from lightning_async.transport.gathering import When
from lightning_async.transport.mail import Wait
from lightning_async.transport.siblings import Siblings


class Drive(Protocol):
    """Runs a `Wait` to its end; its short mail leaves then, or with what follows."""

    def __call__(self, waiting: Wait[Any], *, leaves: When = "together") -> Any:
        """See `Office.drive`."""


Members = Sequence[Sequence[int]]
"""The ranks of each member, the first of which speaks for it."""


class _Shared(Progress):
    """What speaker and siblings have in common.

    Args:
        desk: The board and who is there.
        siblings: The ranks of the member.
        members: The ranks of each member of the run.
        drive: Runs a `Wait` to its end.
        knobs: See `Progress`.
    """

    def __init__(self, desk: Desk, siblings: Siblings, members: Members, drive: Drive, **knobs: Any) -> None:
        super().__init__(desk, **knobs)
        self._siblings, self._drive = siblings, drive
        self._speaker_of = {rank: ranks[0] for ranks in members for rank in ranks}
        self._show()

    def steps(self) -> int:
        """As at the end of the last batch, or at the meeting since."""
        return self._shown[0]

    def about(self) -> int:
        """As at the end of the last batch, or at the meeting since."""
        return self._shown[1]

    def _show(self) -> None:
        """A meeting: all know it exactly."""
        steps = self.agreed.updates // self.n
        self._shown = (self._within(steps), steps)

    def _say(self, name: str, value: Any = None, *, leaves: When = "together") -> Any:
        return self._drive(self._siblings.word(name, value), leaves=leaves)


class ToldProgress(_Shared):
    """The speaker's."""

    def batch_ended(self, *, updates: int, samples: int) -> None:
        """A batch was trained on by the member."""
        super().batch_ended(updates=updates, samples=samples)
        if wishes := self._wished():
            self.call(wishes)
        self._shown = (Progress.steps(self), Progress.about(self))
        self._say("the run's steps", self._shown, leaves="later")  # with the next word, whether a meeting follows

    def overhear(self) -> None:
        """Call the others if a sibling wishes for something; its own word brings the wish, now or at the next one."""
        if self._wished():
            self._stops.ask(self._report())

    def is_last(self) -> bool:
        """See `Progress.is_last`."""
        return bool(self._say("whether the epoch ends with this batch", super().is_last()))

    def comes(self) -> Wait[bool]:
        """See `Progress.comes`."""
        comes = yield from super().comes()
        return bool((yield from self._siblings.word("whether a meeting follows", comes)))

    def settle(self, words: Mapping[int, bytes]) -> Outcome:
        """All ranks gave their words; members count, with what any of their ranks wishes for."""
        members: dict[int, Report] = {}
        for rank, word in sorted(words.items()):  # a speaker comes before its siblings
            report, speaker = Report.unpack(word), self._speaker_of[rank]
            if speaker in words:
                said = members.setdefault(speaker, report)
                members[speaker] = replace(said, wishes=said.wishes | report.wishes)
        outcome = super().settle({rank: report.pack() for rank, report in members.items()})
        self._show()
        self._say("what all agreed on", [_packed(outcome), self.agreed, self.epoch, self.evened, self.taken])
        return outcome

    def _wished(self) -> Wish:
        """What the siblings wish for since the last meeting, by their notes."""
        wishes, notes = Wish.NOTHING, self._desk.notes()
        for rank in self._siblings.others:
            report = Report.unpack(notes[rank]) if rank in notes else Report()
            wishes |= report.wishes if report.meetings == self.meetings else Wish.NOTHING
        return wishes


class HeardProgress(_Shared):
    """A sibling's. It counts nothing: its speaker counts for the member."""

    def batch_started(self) -> None:
        """Nothing to look at."""

    def batch_ended(self, *, updates: int, samples: int) -> None:
        """A batch was trained on by the member."""
        steps, about = self._say("the run's steps")
        self._shown = (steps, about)

    def is_last(self) -> bool:
        """See `Progress.is_last`."""
        return bool(self._say("whether the epoch ends with this batch"))

    def comes(self) -> Wait[bool]:
        """See `Progress.comes`."""
        return bool((yield from self._siblings.word("whether a meeting follows")))

    def heed(self) -> None:
        """The speaker does."""

    def call(self, wishes: Wish) -> None:
        """Let the speaker ask for a meeting."""
        self.wishes |= wishes
        self._desk.publish(self._report().pack())

    def word(self) -> bytes:
        """What this rank wishes for."""
        self._said = self.wishes
        return self._report().pack()

    def settle(self, words: Mapping[int, bytes]) -> Outcome:
        """What all agreed on, as the speaker heard it."""
        outcome, agreed, epoch, self.evened, self.taken = self._say("what all agreed on")
        self.agreed, self.epoch = Tally(*agreed), Tally(*epoch)
        self.meetings += 1
        self.wishes &= ~self._said
        found = _unpacked(outcome)
        if found.ended:
            self.ended = False
        self._show()
        return found


def _packed(outcome: Outcome) -> list[Any]:
    due, wishes, first = outcome.due.value, outcome.wishes.value, outcome.first.value
    return [outcome.ended, outcome.now, due, wishes, first, outcome.empty]


def _unpacked(said: list[Any]) -> Outcome:
    ended, now, due, wishes, first, empty = said
    return Outcome(bool(ended), Tally(*now), Due(due), Wish(wishes), Wish(first), tuple(empty))


def progress_of(siblings: Siblings | None, members: Members, drive: Drive) -> Callable[..., Progress]:
    """What this rank makes its view of the progress with."""
    if siblings is None:
        return Progress
    kind = ToldProgress if siblings.speaks else HeardProgress
    return partial(kind, siblings=siblings, members=members, drive=drive)
