"""The course of a replay: what all members recomputed, causes before what came of them, and how it may end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_async.arrival import Arrival


class WrongInput(ValueError):  # noqa: N818
    """What the replay was given is not what was recorded; the sentence says what is wrong and what to do."""


class Difference(RuntimeError):  # noqa: N818
    """The first thing that is not as recorded.

    Attributes:
        member: Whose it is.
        step: The step in which it shows; 0: before the first one.
    """

    def __init__(self, member: int, step: int, sentence: str) -> None:
        super().__init__(sentence)
        self.member, self.step = member, step


@dataclass
class Step:
    """What a member did in one batch; the movements are relative to the norm of its weights, if they were measured.

    Samples of data of its own (a stream, a split of the user's own) have no numbers, but the `batch` has one: it is the
    how-many-th that the member trained on.
    """

    member: int
    step: int
    samples: list[Any]
    loss: float | None
    own: float = 0.0
    folds: float = 0.0
    arrivals: list[Arrival] = field(default_factory=list)
    batch: int = 0

    @property
    def data(self) -> str:
        """What it was trained on, for people."""
        return f"batch {self.batch} of its own data" if self.batch else f"samples {self.samples}"


@dataclass
class Course:
    """What became of a replay so far; all members tell it.

    Attributes:
        world: How many members the run began with.
        until: A member's last step that is wanted; None: to the end.
        tolerance: How far a loss may be off, relatively; None: not at all, and digests are compared.
        measure: Whether movements of the weights are wanted.
        tell: Is told each meeting that all members had, in a sentence.
        steps: The batches, in the order in which they were recomputed.
        taken: How many steps were taken, by all members together.
        folds: How many messages were folded.
        digests: How many digests were compared.
        losses: How many losses were compared.
        off: The largest relative difference of a loss.
        short: Who could not be recomputed to the end of its log, since another one's ends before.
        met: By the number of a meeting, who met there after how many steps.
    """

    world: int
    until: int | None = None
    tolerance: float | None = None
    measure: bool = False
    tell: Callable[[str], object] = print
    steps: list[Step] = field(default_factory=list)
    taken: int = 0
    folds: int = 0
    digests: int = 0
    losses: int = 0
    off: float = 0.0
    short: list[int] = field(default_factory=list)
    met: dict[int, dict[int, int]] = field(default_factory=dict)

    def meets(self, number: int, member: int, step: int, here: set[int]) -> None:
        """A member had a meeting; it is told when all that are `here` had it."""
        met = self.met.setdefault(number, {})
        met[member] = step
        if set(met) >= here:
            after = "/".join(str(met.get(rank, "-")) for rank in range(self.world))
            same = "weights as recorded" if self.tolerance is None else "losses as recorded"
            self.tell(f"meeting {number} after steps {after}: {same}")
