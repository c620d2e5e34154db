"""What callbacks of all ranks tell each other: at meetings, in one round, and never between them.

    callback  --join(name, say, hear)-->  strategy
    meeting      say(stretch) -> this rank's word       [ one round ]       hear({rank: word}) <- everybody's words

All words of a rank travel as one. A rank that has no callback of a name says nothing under it: callbacks that differ by
rank make nobody wait. The spread of the replicas, which every meeting tells, travels in the same round.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_async.progress.stretch import Stretch
from lightning_async.progress.tally import ZERO, Tally
from lightning_async.strategies.own_state import Part
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.office import Office

Say = Callable[[Stretch], Any]
Hear = Callable[[Mapping[int, Any]], None]


@dataclass(frozen=True)
class _Mark:
    """A moment: the clock, what was trained on, and what the waits had cost by then."""

    now: float = 0.0
    trained: Tally = ZERO
    spent: float = 0.0
    waited: float = 0.0


class Telling:
    """One rank's words, and its hours between meetings.

    Args:
        office: This rank's place in the run, when it is asked for.
        trained: What this rank has trained on by now.

    Attributes:
        idle: Seconds for which this rank waited at the last meeting.
        lasted: Seconds that the last meeting had taken when all had told.
        parts: What callbacks keep with checkpoints, where the strategy has no place of its own for it.
    """

    def __init__(self, office: Callable[[], Office], trained: Callable[[], Tally]) -> None:
        self._office, self._trained = office, trained
        self.parts: dict[str, Part] = {}
        self.forget()

    def join(self, name: str, say: Say, hear: Hear) -> None:
        """Take part under this name, once a fit. What `say` returns must be what JSON can hold."""
        self._voices[name] = (say, hear)

    def forget(self) -> None:
        """The run is over."""
        self._voices: dict[str, tuple[Say, Hear]] = {}
        self._began: float | None = None
        self._off: _Mark | None = None
        self._met = _Mark()
        self.idle = self.lasted = 0.0
        self.parts.clear()

    @property
    def begun(self) -> bool:
        """Whether this rank has ever set off in this fit: before that there is nothing to tell."""
        return self._began is not None

    def set_off(self) -> None:
        """This rank leaves a meeting."""
        self._off = self._mark()
        self._began = self._off.now if self._began is None else self._began

    def arrive(self) -> None:
        """This rank comes to a meeting."""
        self._met = self._mark()

    def exchange(self, square: float = 0.0, apart: Callable[[], Iterable[float]] = tuple) -> Wait[float]:
        """Tell and hear; returns the mean of all ranks' `square`.

        Args:
            square: How far this rank's weights were from the consensus: the mean over coordinates of the square.
            apart: See `Stretch.apart`.
        """
        self.idle = self._office().flags.waited - self._met.waited
        stretch = self._stretch(apart)
        voices = self._voices if self._office().speaks else {}
        said = {name: say(stretch) for name, (say, _) in voices.items()}
        word = zlib.compress(json.dumps([square, said]).encode())
        words = yield from self._office().rounds.agree(word, what="what ranks tell")
        heard = {rank: json.loads(zlib.decompress(word)) for rank, word in words.items()}
        for name, (_, hear) in self._voices.items():
            hear({rank: told[name] for rank, (_, told) in heard.items() if name in told})
        self._off, self.lasted = None, self._office().carrier.now() - self._met.now
        return float(sum(square for square, _ in heard.values()) / len(heard))

    def _stretch(self, apart: Callable[[], Iterable[float]]) -> Stretch:
        """The time since this rank set off; nothing, if it did not since the last meeting."""
        met = self._met
        off = met if self._off is None else self._off
        waited = met.waited - off.waited
        return Stretch(
            trained=met.trained.minus(off.trained),
            seconds=met.now - off.now,
            exchange=max(0.0, met.spent - off.spent - waited),
            waited=waited,
            idle=self.idle,
            until=met.now - (met.now if self._began is None else self._began),
            apart=apart,
        )

    def _mark(self) -> _Mark:
        office = self._office()
        return _Mark(office.carrier.now(), self._trained(), office.flags.spent, office.flags.waited)
