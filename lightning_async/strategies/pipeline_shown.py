"""What callbacks may see of a pipeline: the same as of every strategy; its meetings are its rests.

rest    all stages are after the same batch: callbacks of all ranks tell each other what they have to tell
delays  structural: 2 (K - k) batches at stage k. Factors multiply on the way up, so a stage shrinks by what the stage
        behind has not: `inherited` is the part of the delay that it has
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_async.pipeline import schedule
from lightning_async.pipeline.edge import ACTIVATIONS, GRADIENTS
from lightning_async.strategies.office import CALLBACKS, Office
from lightning_async.strategies.own_state import Part
from lightning_async.strategies.telling import Hear, Say, Telling
from lightning_async.transport.mail import KIND_NAMES, Wait
from lightning_async.transport.pages import Desk


class PipelineShown(DDPStrategy):
    """The face of a pipeline towards callbacks.

    Attributes:
        office: This rank's place in the run.
        order: Whether a stage updates before its forward pass: its gradients are an update less late then.
        telling: What callbacks tell each other.
        last_meeting: Of the last rest: "seconds" and "idle" seconds; there are no replicas that could be apart.
        has_replicas: Each rank has a part of the module.
        healthy_delay: All delay is shrunk: it is structural.
        shrinks: What the factors of `shrink` multiply.
        skipped: Nothing is ever left out.
    """

    office: Office
    order: schedule.Order
    telling: Telling
    last_meeting: Mapping[str, float] = {"spread": 0.0, "seconds": 0.0, "idle": 0.0}
    has_replicas = False
    healthy_delay = 0
    shrinks = "gradients"
    skipped = 0

    @property
    def index(self) -> int:
        """The stage of this rank: the last one is rank 0's."""
        return self.world_size - 1 - self.global_rank

    @property
    def inherited(self) -> float:
        """The part of a gradient's delay by which it was shrunk already on its way here."""
        if self.index >= self.world_size - 2:  # from the last stage, where nothing is late
            return 0.0
        early = schedule.updates_first(self.index, self.world_size, self.order)
        behind, own = (schedule.delay(k, self.world_size) - early for k in (self.index + 1, self.index))
        return behind / own

    @property
    def kinds(self) -> Mapping[int, str]:
        """The names of the kinds of messages that `traffic` counts."""
        return KIND_NAMES | dict.fromkeys(ACTIVATIONS, "activations") | dict.fromkeys(GRADIENTS, "gradients")

    @property
    def board(self) -> Desk:
        """A page of this rank's note for callbacks, and the others'."""
        return self.office.desk(CALLBACKS)

    def accounts(self) -> dict[str, tuple[int, int]]:
        """Nothing is held between ranks that would have to add up."""
        return {}

    def at_meetings(self, name: str, say: Say, hear: Hear) -> None:
        """Tell something at every rest of this fit, and hear what all ranks told under this name (see `telling`)."""
        self.telling.join(name, say, hear)

    def keep(self, name: str, part: Part) -> None:
        """Save a state of this rank's own with every checkpoint, and put it back on the same rank."""
        self.telling.parts[name] = part

    def _rested(self) -> Wait[None]:
        """All are after the same batch: tell and hear."""
        yield from self.telling.exchange()
        self.last_meeting = {"spread": 0.0, "seconds": self.telling.lasted, "idle": self.telling.idle}

    def _kept(self) -> Wait[dict[str, Any]]:
        """What all ranks keep, by rank. Called by all; the states are what JSON can hold."""
        mine = {name: part.state_dict() for name, part in self.telling.parts.items()}
        words = yield from self.office.rounds.agree(json.dumps(mine).encode(), what="what ranks keep")
        return {str(rank): json.loads(word) for rank, word in words.items()}

    def _put_back(self, kept: Mapping[str, Any]) -> None:
        """This rank's own, if as many ranks have kept something."""
        mine = kept.get(str(self.global_rank), {}) if len(kept) == self.world_size else {}
        for name in self.telling.parts.keys() & mine.keys():
            self.telling.parts[name].load_state_dict(mine[name])
