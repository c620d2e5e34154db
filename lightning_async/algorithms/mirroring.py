"""At most so many arrivals of a shard are in no mirror: half of them bring one on its way, and too many wait for it.

    arrivals    1 2 3 4 5 6 7 8 . . .          most = 8
                      ^ image of 4 leaves      5 to 8 are merged while it travels; 9 waits
                              ^ it is there    up to 12 may be merged, the next image leaves

So what dies with an owner is never more. Whoever waits trains on: only its answer is late, and its push is not lost,
since the heir finds out that it was never merged.
"""

from __future__ import annotations

from dataclasses import dataclass

HOME = -1


@dataclass
class Mirroring:
    """How far the mirror of one shard is behind.

    Attributes:
        fresh: Arrivals since the newest image.
        leaving: Those in that image which may be in no mirror yet.
        travelling: The version of the image that is on its way; HOME: none is.
    """

    fresh: int = 0
    leaving: int = 0
    travelling: int = HOME

    def is_due(self, most: int) -> bool:
        """Whether an image must leave now, if `most` arrivals may be in no mirror."""
        return self.travelling == HOME and 2 * (self.fresh + self.leaving) >= most

    def is_full(self, most: int) -> bool:
        """Whether the next arrival must wait for a mirror."""
        return self.fresh + self.leaving >= most

    def left(self, version: int) -> None:
        """An image of this version is on its way."""
        self.leaving, self.fresh, self.travelling = self.leaving + self.fresh, 0, version

    def came(self, version: int) -> None:
        """A mirror of this version is there; if it is an older one, not all that left is in it."""
        if version == self.travelling:
            self.leaving, self.travelling = 0, HOME

    def anew(self, most: int) -> None:
        """Nobody holds a mirror of this: the next arrival brings one on its way."""
        self.leaving, self.travelling = 0, HOME
        self.fresh = max(self.fresh, (most + 1) // 2)
