"""What callbacks may see of a pipeline is what they see of every strategy: arrivals, traffic, shrink, what ranks tell.

arrivals()    the gradients that came from the stage behind, with their delays in own updates
shrink        the factor on them: a number, or a law that is asked for each
at_meetings   told and heard at the rests of a fit, where all stages are after the same batch
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from lightning_async.algorithms.algorithm import no_shrink
from lightning_async.arrival import Arrival
from lightning_async.pipeline.edge import ACTIVATIONS, GRADIENTS
from lightning_async.pipeline.place import Shrink
from lightning_async.pipeline.replicas import AVERAGES
from lightning_async.progress.stretch import Stretch
from lightning_async.progress.tally import Tally
from lightning_async.strategies.office import CALLBACKS
from lightning_async.strategies.own_state import Part
from lightning_async.strategies.pipe_saving import PipeSaving
from lightning_async.strategies.telling import Hear, Say
from lightning_async.transport.mail import KIND_NAMES, Wait
from lightning_async.transport.pages import Desk

_KINDS = {"activation": ACTIVATIONS, "gradient": GRADIENTS, "replicas": AVERAGES}


class PipeShown(PipeSaving):
    """The face of a pipeline.

    Attributes:
        last_meeting: How long the last rest took, and for how long of that this rank waited. There are no replicas to
            be apart.
        healthy_delay: Every delay of a pipeline is part of its method, and a law acts on all of it.
        shrinks: What the factors multiply.
        skipped: No exchange is ever left out.
        kinds: The names of the kinds of messages that `traffic` counts.
    """

    healthy_delay = 0
    shrinks = "gradients"
    skipped = 0
    kinds: Mapping[int, str] = {**KIND_NAMES, **{kind: name for name, kinds in _KINDS.items() for kind in kinds}}
    _law: float | Shrink = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.last_meeting = {"spread": 0.0, "seconds": 0.0, "idle": 0.0}
        self._voices: dict[str, tuple[Say, Hear]] = {}
        self._began = self._since = self._arrived = (0.0, 0.0, Tally())

    @property
    def shrink(self) -> float | Shrink:
        """The factor on what comes from the stage behind, or the law that is asked for it."""
        return no_shrink if self._law == 1.0 else self._law

    @shrink.setter
    def shrink(self, law: float | Shrink) -> None:
        self._law = 1.0 if law is no_shrink else law
        if self.piped and self._turns is not None:
            self.turns.place.shrink = self._law

    def arrivals(self, reader: object = None) -> list[Arrival]:
        """The gradients that reached this stage since this reader's last call."""
        return self._turns.arrivals.read(reader) if self._turns is not None else []

    def traffic(self) -> Mapping[Any, Any]:
        """Bytes and messages by peer and kind, counted by the carrier."""
        return self.office.traffic()

    @property
    def board(self) -> Desk:
        """A page of this rank's note for callbacks, and the others'."""
        return self.office.desk(CALLBACKS)

    def accounts(self) -> dict[str, tuple[int, int]]:
        """Nothing is conserved in a pipeline but what its laws say."""
        return {}

    def at_meetings(self, name: str, say: Say, hear: Hear) -> None:
        """Tell something at every rest of this fit, and hear what all ranks told under this name."""
        self._voices[name] = (say, hear)

    def keep(self, name: str, part: Part) -> None:
        """Save a state of this rank's own with every checkpoint, and put it back where a run goes on."""
        self.kept[name] = part

    def forget(self) -> None:
        """The run is over."""
        self._voices.clear()
        self.kept.clear()
        self._began = (0.0, 0.0, Tally())

    def set_out(self) -> None:
        """The first batch comes next."""
        self._began = self._since = self._mark()

    def arrive(self) -> None:
        """This rank comes to a rest."""
        self._arrived = self._mark()

    def tell(self) -> Wait[None]:
        """All have come: tell and hear, all in one round. Before the first batch there is nothing to tell."""
        before, arrived = self._since, self._arrived
        now = self._since = self._mark()
        voices = self._voices if self._began[0] else {}
        self.last_meeting = {"spread": 0.0, "seconds": now[0] - arrived[0], "idle": now[1] - arrived[1]}
        stretch = Stretch(
            trained=arrived[2].minus(before[2]),
            seconds=arrived[0] - before[0],
            waited=arrived[1] - before[1],
            idle=self.last_meeting["idle"],
            until=arrived[0] - self._began[0],
        )
        said = {name: say(stretch) for name, (say, _) in voices.items()}
        words = yield from self.office.rounds.agree(zlib.compress(json.dumps(said).encode()), what="what ranks tell")
        heard = {rank: json.loads(zlib.decompress(word)) for rank, word in words.items()}
        for name, (_, hear) in voices.items():
            hear({rank: told[name] for rank, told in heard.items() if name in told})

    def _mark(self) -> tuple[float, float, Tally]:
        """The clock, what the waits have cost, and what was trained on."""
        turns = self.turns
        return turns.place.mail.now(), self.office.flags.waited, Tally(turns.batches, turns.place.updates)
