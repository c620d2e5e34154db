"""What callbacks may see of a pipeline: the same as of every strategy; its meetings are its rests.

rest    all stages are after the same batch: callbacks of all ranks tell each other what they have to tell
delays  structural: 2 (K - k) batches at stage k. Factors multiply on the way up, so a stage shrinks by what the stage
        behind has not: `inherited` is the part of the delay that it has
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_async.algorithms.algorithm import no_shrink
from lightning_async.arrival import Arrival
from lightning_async.pipeline import schedule
from lightning_async.pipeline.curvature import Tell
from lightning_async.pipeline.edge import ACTIVATIONS, GRADIENTS
from lightning_async.pipeline.place import Shrink
from lightning_async.pipeline.replicas import AVERAGES
from lightning_async.progress.tally import Tally
from lightning_async.strategies import words
from lightning_async.strategies.office import CALLBACKS
from lightning_async.strategies.own_state import Part
from lightning_async.strategies.pipe_counts import PipeCounts
from lightning_async.strategies.pipes import Pipes
from lightning_async.strategies.telling import Hear, Say, Telling
from lightning_async.transport.mail import KIND_NAMES, Wait
from lightning_async.transport.pages import Desk


class PipelineShown(Pipes):
    """The face of a pipeline towards callbacks.

    Attributes:
        order: Whether a stage updates before its forward pass: its gradients are an update less late then.
        telling: What callbacks tell each other.
        counts: How far the run has come.
        last_meeting: Of the last rest: "seconds" and "idle" seconds; there are no replicas that could be apart.
        has_replicas: Each rank has a part of the module.
        healthy_delay: All delay is shrunk: it is structural.
        shrinks: What the factors of `shrink` multiply.
        skipped: Nothing is ever left out.
        samples: How many samples this rank has trained on, if it holds the last stage.
        updates: How many steps this rank took by itself: on the last stage, where no gradient comes late.
        batches_alone: How many batches it has trained on in this fit, if there is one stage only.
    """

    order: schedule.Order
    telling: Telling
    counts: PipeCounts
    last_meeting: Mapping[str, float] = {"spread": 0.0, "seconds": 0.0, "idle": 0.0}
    has_replicas = False
    healthy_delay = 0
    shrinks = "gradients"
    skipped = 0

    samples = updates = batches_alone = 0
    _law: float | Shrink = 1.0
    _resting = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.telling = Telling(lambda: self.office, self._trained)
        self.counts = PipeCounts(lambda: Tally(0, self.updates, self.samples))

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
    def members(self) -> int:
        """Each rank is one."""
        return self.world_size

    @property
    def inherited(self) -> float:
        """The part of a gradient's delay by which it was shrunk already on its way here."""
        if self.index >= self.depth - 2:  # from the last stage, where nothing is late
            return 0.0
        early = schedule.updates_first(self.index, self.depth, self.order)
        behind, own = (schedule.delay(k, self.depth) - early for k in (self.index + 1, self.index))
        return behind / own

    @property
    def kinds(self) -> Mapping[int, str]:
        """The names of the kinds of messages that `traffic` counts."""
        edges = dict.fromkeys(ACTIVATIONS, "activations") | dict.fromkeys(GRADIENTS, "gradients")
        return KIND_NAMES | edges | dict.fromkeys(AVERAGES, "replicas")

    @property
    def board(self) -> Desk:
        """A page of this rank's note for callbacks, and the others'."""
        return self.office.desk(CALLBACKS)

    def watch_curvature(self, tell: Tell) -> bool:
        """Tell from now on how gradients turn along the way of the weights. False: here they do not show it."""
        return self._turns is not None and self.turns.place.stage.watch_curvature(tell)

    def accounts(self) -> dict[str, tuple[int, int]]:
        """Nothing is held between ranks that would have to add up."""
        return {}

    def at_meetings(self, name: str, say: Say, hear: Hear) -> None:
        """Tell something at every rest of this fit, and hear what all ranks told under this name (see `telling`)."""
        self.telling.join(name, say, hear)

    def keep(self, name: str, part: Part) -> None:
        """Save a state of this rank's own with every checkpoint, and put it back on the same rank."""
        self.telling.parts[name] = part

    def set_off(self) -> None:
        """A batch comes: this rank leaves a rest, if it was in one."""
        if self._resting:
            self._resting = False
            self.telling.set_off()

    def tell(self) -> Wait[None]:
        """All are after the same batch: tell and hear."""
        self._resting = True
        if not (self.fitting and self.telling.begun):
            return
        yield from self.telling.exchange()
        self.last_meeting = {"spread": 0.0, "seconds": self.telling.lasted, "idle": self.telling.idle}

    def hear_counts(self) -> None:
        """What all pipelines have trained on. Called by all."""
        if self.replicas > 1:
            mine = torch.tensor([self.counts.mine])
            self.counts.hear(int(self.together(words.reduce(self.office.rounds, mine, "sum"))) - self.counts.mine)

    def keeping(self) -> Wait[dict[str, Any]]:
        """What all ranks keep, by rank. Called by all; the states are what JSON can hold."""
        mine = {name: part.state_dict() for name, part in self.telling.parts.items()}
        said = yield from self.office.rounds.agree(json.dumps(mine).encode(), what="what ranks keep")
        return {str(rank): json.loads(word) for rank, word in said.items()}

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """This rank's own, if as many ranks have kept something; else it is no longer that of this stage."""
        mine = kept.get(str(self.global_rank), {}) if len(kept) == self.world_size else {}
        if lost := sorted(self.telling.parts.keys() & kept.get("0", {}).keys() - mine.keys()):
            rank_zero_warn(
                f"strategy={self.name!r}: what callbacks keep ({', '.join(lost)}) was saved by {len(kept)} ranks, and "
                f"now there are {self.world_size}: it begins anew"
            )
        for name in self.telling.parts.keys() & mine.keys():
            self.telling.parts[name].load_state_dict(mine[name])

    def _trained(self) -> Tally:
        """Batches and updates of this stage; samples are counted once, on the last one."""
        turns = self._turns
        if turns is None:
            return Tally(self.batches_alone, self.updates, self.samples)
        return Tally(turns.batches, self.updates + turns.place.updates, self.samples)
