"""The ledger holds what left the conserved sum, so that sum plus ledger stays constant and nothing is lost silently.

An entry is a vector in units of (mass x weights) and a mass; it is made when a correction is refused, shrunk or lost
after the other side has already moved. Vectors are allocated at the first entry of their fate: a healthy run has none.

The sum that is conserved is that of one account: from the start, or from a meeting at which all adopted the consensus
and took their first masses again, to the next such meeting. What was missing then is no part of the new sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_async.arrival import Fate


@dataclass
class Ledger:
    """Sums of what was not folded, by fate.

    Attributes:
        moved: The vectors, in units of (mass x weights).
        mass: The masses.
        count: How often it happened, over the whole run.
    """

    moved: dict[Fate, Tensor] = field(default_factory=dict)
    mass: dict[Fate, int] = field(default_factory=dict)
    count: dict[Fate, int] = field(default_factory=dict)

    def enter(self, fate: Fate, vector: Tensor, factor: float, mass: int = 0) -> None:
        """Add `factor * vector` and `mass` to what is missing by this fate."""
        if fate not in self.moved:
            self.moved[fate] = vector.detach().mul(factor).to("cpu")
        else:
            self.moved[fate].add_(vector.to("cpu"), alpha=factor)
        self.mass[fate] = self.mass.get(fate, 0) + mass
        self.count[fate] = self.count.get(fate, 0) + 1

    def open_anew(self) -> None:
        """Nothing is missing any more; how often something was stays."""
        self.moved.clear()
        self.mass.clear()

    def total(self, like: Tensor) -> Tensor:
        """Everything that is missing, as one vector."""
        total = like.new_zeros(like.shape)
        for vector in self.moved.values():
            total += vector.to(like.device)
        return total

    def total_mass(self) -> int:
        """All the mass that is missing."""
        return sum(self.mass.values())

    def state_dict(self) -> dict[str, Any]:
        """The entries, by the names of their fates."""
        return {
            "moved": {fate.value: vector for fate, vector in self.moved.items()},
            "mass": {fate.value: mass for fate, mass in self.mass.items()},
            "count": {fate.value: count for fate, count in self.count.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """These entries and no others."""
        self.moved = {Fate(name): vector.clone() for name, vector in state["moved"].items()}
        self.mass = {Fate(name): mass for name, mass in state["mass"].items()}
        self.count = {Fate(name): count for name, count in state["count"].items()}
