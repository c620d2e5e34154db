"""What callbacks and users may see of a strategy is the same for each: arrivals, traffic, steps, the last meeting.

arrivals()   what came, from whom, how late        traffic()       bytes and messages by peer and kind
shrink       the one thing that they may set: by how much a late contribution counts less
at_meetings  what callbacks of all ranks tell each other, there only        board   a page of the notes, between
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_async.algorithms.algorithm import Algorithm, Shrink, no_shrink
from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from lightning_async.strategies.consensus import Consensus
from lightning_async.strategies.office import CALLBACKS
from lightning_async.strategies.own_state import Part
from lightning_async.strategies.recording import Recording
from lightning_async.strategies.saving import Saving
from lightning_async.strategies.stepping import Stepping
from lightning_async.strategies.telling import Hear, Say
from lightning_async.transport.mail import KIND_NAMES
from lightning_async.transport.pages import Desk
from lightning_async.transport.siblings import SIBLING_KINDS


class Shown(Saving):
    """The face of every asynchronous strategy.

    Attributes:
        algorithm: What is computed and exchanged.
        voice: What is called around this rank's steps: the algorithm, or what stands for it if a member has several.
        stepping: This rank's steps.
        consensus: This rank's way to meetings and back.
    """

    algorithm: Algorithm
    voice: Algorithm
    stepping: Stepping
    consensus: Consensus

    def arrivals(self, reader: object = None) -> list[Arrival]:
        """What reached this rank since this reader's last call. A callback passes itself, so that each sees all."""
        return self.stepping.arrivals(reader)

    def traffic(self) -> Mapping[Any, Any]:
        """Bytes and messages by peer and kind, counted by the carrier."""
        return self.office.traffic()

    @property
    def last_meeting(self) -> dict[str, float]:
        """How far apart the replicas were before the last meeting ("spread"), how long it took ("seconds"), and for how
        long of that this rank waited ("idle")."""
        return self.consensus.last

    def at_meetings(self, name: str, say: Say, hear: Hear) -> None:
        """Tell something at every meeting of this fit, and hear what all ranks told under this name (see `telling`)."""
        self.consensus.telling.join(name, say, hear)

    def keep(self, name: str, part: Part) -> None:
        """Save a state of this rank's own with every checkpoint, and put it back on the rank that takes its place."""
        self.checkpoints.parts[name] = part

    @property
    def board(self) -> Desk:
        """A page of this rank's note for callbacks, and the others': small, and as old as the last heartbeat."""
        return self.office.desk(CALLBACKS)

    def accounts(self) -> dict[str, tuple[int, int]]:
        """What this rank has and should have of what is conserved; over all ranks the sums are equal, at meetings."""
        return self.voice.accounts()

    @property
    def members(self) -> int:
        """How many members the run begins with: each is a rank, or several that step together."""
        return len(self.office.ranks_of_members) or self.world_size

    @property
    def healthy_delay(self) -> int:
        """The delay that a message has among equal, healthy ranks; what is later is excess."""
        return self.algorithm.healthy_delay(self.members)

    @property
    def shrinks(self) -> str:
        """What the factors of `shrink` multiply: "corrections", "gradients", ... (see `Algorithm.shrinks`)."""
        return self.algorithm.shrinks

    @property
    def has_replicas(self) -> bool:
        """Whether every rank has weights of the whole module: yes."""
        return True

    @property
    def inherited(self) -> float:
        """The part of a contribution's delay by which it was shrunk already on its way here: none."""
        return 0.0

    def watch_curvature(self, tell: Callable[[float, float], object]) -> bool:
        """Whether it is told how gradients turn along the way of the weights: no, that way is the others' too."""
        return False

    @property
    def kinds(self) -> Mapping[int, str]:
        """The names of the kinds of messages that `traffic` counts."""
        return {**KIND_NAMES, **SIBLING_KINDS, **self.algorithm.kinds}

    @property
    def skipped(self) -> int:
        """How many exchanges were due and left out, because the one before was still under way."""
        return self.algorithm.skipped

    @property
    def steps(self) -> int:
        """How many steps this rank has taken."""
        return self.stepping.taken

    @property
    def skipped_steps(self) -> int:
        """How many of this rank's steps moved nothing, because fp16's gradient scaler found them not finite."""
        return self.stepping.skipped.count

    @property
    def shrink(self) -> Shrink:
        """Asked before every fold for a factor in (0, 1]; assign a function to shrink late contributions."""
        law = self.algorithm.shrink
        return law.law if isinstance(law, Logged) else law

    @shrink.setter
    def shrink(self, law: Shrink) -> None:
        recording = self.office.recording
        self.algorithm.shrink = Logged(law, recording) if recording.on and law is not no_shrink else law


@dataclass(frozen=True)
class Logged:
    """A law, and the log that its answers go into."""

    law: Shrink
    recording: Recording

    def __call__(self, arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
        """What the law says."""
        return self.recording.factor(arrival, lambda: self.law(arrival, correction, fresh))
