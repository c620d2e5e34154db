"""What a callback may know of a strategy: the same few things of each; it imports none.

`watched(trainer)` is the strategy if it has them, and None for Lightning's own, as `ddp`: there a callback sees what
every strategy shows, and says once what it cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from lightning.pytorch import Trainer

from lightning_async.algorithms.algorithm import Shrink
from lightning_async.arrival import Arrival
from lightning_async.progress.stretch import Stretch
from lightning_async.transport.traffic import Count

Say = Callable[[Stretch], Any]
Hear = Callable[[Mapping[int, Any]], None]


class Part(Protocol):
    """Something that is saved with every checkpoint and put back, on each rank its own."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


class Board(Protocol):
    """A page of each rank's note."""

    def publish(self, note: bytes) -> None:
        """Replace this rank's page; it travels with the next heartbeat."""

    def notes(self) -> dict[int, bytes]:
        """The newest known page of every rank."""


class Watched(Protocol):
    """What every strategy of this package shows.

    Attributes:
        shrink: Asked before a late contribution is used, for a factor in (0, 1].
        last_meeting: "spread" of the replicas (rms of their distance to the consensus), "seconds" that the meeting
            took, "idle" seconds of these in which this rank waited.
    """

    shrink: Shrink
    last_meeting: Mapping[str, float]

    @property
    def has_replicas(self) -> bool:
        """Whether every rank has weights of the whole module."""

    @property
    def shrinks(self) -> str:
        """What the factors multiply: "corrections", "gradients", "served gradients" or "nothing" (see `Algorithm`)."""

    @property
    def inherited(self) -> float:
        """The part of a contribution's delay by which others have shrunk it on its way; 0 but in a pipeline."""

    @property
    def healthy_delay(self) -> int:
        """The delay among equal, healthy ranks."""

    @property
    def members(self) -> int:
        """How many members the ranks form: one of each tells at meetings."""

    @property
    def skipped(self) -> int:
        """How many exchanges were left out, because the one before was still under way."""

    @property
    def kinds(self) -> Mapping[int, str]:
        """The names of the kinds of messages."""

    @property
    def board(self) -> Board:
        """A page of this rank's note, and those of the others."""

    def arrivals(self, reader: object) -> list[Arrival]:
        """What reached this rank since this reader's last call."""

    def traffic(self) -> Mapping[int, Mapping[int, Count]]:
        """What the carrier counted, by peer and kind."""

    def accounts(self) -> dict[str, tuple[int, int]]:
        """What this rank has and should have of what is conserved, at a meeting."""

    def at_meetings(self, name: str, say: Say, hear: Hear) -> None:
        """Tell something at every meeting of this fit, and hear what all ranks told under this name."""

    def keep(self, name: str, part: Part) -> None:
        """Save this with every checkpoint."""

    def watch_curvature(self, tell: Callable[[float, float], object]) -> bool:
        """Tell from now on how gradients turn along the way of the weights. False: here they do not show it."""


NAMES = tuple(name for name in {**Watched.__annotations__, **vars(Watched)} if not name.startswith("_"))


def watched(trainer: Trainer) -> Watched | None:
    """The strategy, if it shows all this."""
    kind = type(trainer.strategy)
    shown = all(hasattr(kind, name) for name in NAMES if name != "last_meeting")
    return cast(Watched, trainer.strategy) if shown and hasattr(trainer.strategy, "last_meeting") else None
