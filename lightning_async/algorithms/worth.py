"""What counts in the sum that a method keeps: what members hold, what is under way, what is declared missing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Worth:
    """A part of the sum.

    Attributes:
        vector: Mass x weights, in UNITs of mass, in double precision.
        mass: The mass, exactly.
    """

    vector: Tensor
    mass: int

    def __add__(self, other: Worth) -> Worth:
        return Worth(self.vector + other.vector, self.mass + other.mass)
