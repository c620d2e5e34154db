"""The ledger holds what left the conserved sum, so that sum plus ledger stays constant and nothing is lost silently.

An entry is a vector in units of (mass x weights) and a mass; it is made when a correction is refused, shrunk or lost
after the other side has already moved. Vectors are allocated at the first entry of their fate: a healthy run has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_async.arrival import Fate


@dataclass
class Ledger:
    """Sums of what was not folded, by fate."""

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

    def total(self, like: Tensor) -> Tensor:
        """Everything that is missing, as one vector."""
        total = like.new_zeros(like.shape)
        for vector in self.moved.values():
            total += vector.to(like.device)
        return total

    def total_mass(self) -> int:
        """All the mass that is missing."""
        return sum(self.mass.values())
