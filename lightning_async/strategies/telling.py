"""What callbacks of all ranks tell each other: at meetings, in one round that is held anyway, and never between them.

    callback  --join(name, say, hear)-->  strategy
    meeting      say(stretch) -> this rank's word       [ one round ]       hear({rank: word}) <- everybody's words

All words of a rank travel as one. A rank that has no callback of a name says nothing under it: callbacks that differ by
rank make nobody wait. The spread of the replicas, which every meeting tells, travels in the same round.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_async.progress.stretch import Stretch
from lightning_async.progress.tally import ZERO, Tally
from lightning_async.strategies.words import CHUNK
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

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
    """One rank's words, and its hours between meetings."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        self._strategy = strategy
        self._voices: dict[str, tuple[Say, Hear]] = {}
        self._began: float | None = None
        self._off = self._met = _Mark()
        self.idle = 0.0

    def join(self, name: str, say: Say, hear: Hear) -> None:
        """Take part under this name, once a fit. What `say` returns must be what JSON can hold."""
        self._voices[name] = (say, hear)

    def forget(self) -> None:
        """The run is over."""
        self._voices.clear()
        self._began, self.idle = None, 0.0
        self._off = self._met = _Mark()

    def set_off(self) -> None:
        """This rank leaves a meeting."""
        self._off = self._mark()
        self._began = self._off.now if self._began is None else self._began

    def arrive(self) -> None:
        """This rank comes to a meeting."""
        self._met = self._mark()

    def exchange(self, consensus: Tensor) -> Wait[float]:
        """Tell and hear. Returns the mean over ranks and coordinates of the squared distance to the consensus."""
        replica = self._strategy.replica
        own = replica.flat.cpu()
        self.idle = self._strategy.office.flags.waited - self._met.waited

        def apart() -> list[float]:
            pairs = zip(replica.parts(own), replica.parts(consensus), strict=True)
            return [float((a - b).double().square().sum()) for a, b in pairs]

        stretch = self._stretch(apart)
        said = {name: say(stretch) for name, (say, _) in self._voices.items()}
        word = zlib.compress(json.dumps([_mean_square(own, consensus), said]).encode())
        words = yield from self._strategy.office.rounds.agree(word, what="what ranks tell")
        heard = {rank: json.loads(zlib.decompress(word)) for rank, word in words.items()}
        for name, (_, hear) in self._voices.items():
            hear({rank: told[name] for rank, (_, told) in heard.items() if name in told})
        return float(sum(square for square, _ in heard.values()) / len(heard))

    def _stretch(self, apart: Callable[[], list[float]]) -> Stretch:
        off, met = self._off, self._met
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
        office, progress = self._strategy.office, self._strategy.clock.progress
        trained = ZERO if progress is None else progress.own
        return _Mark(office.carrier.now(), trained, office.flags.spent, office.flags.waited)


def _mean_square(one: Tensor, other: Tensor) -> float:
    """The mean over coordinates of the squared difference, in parts: a large temporary costs page faults."""
    pairs = zip(torch.split(one, CHUNK), torch.split(other, CHUNK), strict=True)
    return sum(float((a - b).double().square().sum()) for a, b in pairs) / one.numel()
