"""At most so many arrivals of a shard are in no mirror: when few more may come, one leaves, and too many wait for it.

    arrivals    1 2 3 4 5 6 7 8 . . .          most = 8
                      ^ image of 4 leaves      5 to 8 are merged while it travels; 9 waits
                          ^ it is there        two came meanwhile: the next image leaves when four more may come,
                              ^ image of 8     twice as many (at first it is half of all)

So what dies with an owner is never more, and images, which are as long as answers, are as few as the network allows.
Whoever waits trains on: only its answer is late, and its push is not lost, since the heir finds out that it was never
merged.
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
        journey: Arrivals while the last one was; None: half of all that may.
    """

    fresh: int = 0
    leaving: int = 0
    travelling: int = HOME
    journey: int | None = None

    def is_due(self, most: int) -> bool:
        """Whether an image must leave now, if `most` arrivals may be in no mirror."""
        half = most // 2
        room = half if self.journey is None else min(half, 2 * self.journey + 1)
        return self.travelling == HOME and most - self.fresh - self.leaving <= room

    def is_full(self, most: int) -> bool:
        """Whether the next arrival must wait for a mirror."""
        return self.fresh + self.leaving >= most

    def left(self, version: int) -> None:
        """An image of this version is on its way."""
        self.leaving, self.fresh, self.travelling = self.leaving + self.fresh, 0, version

    def came(self, version: int) -> None:
        """A mirror of this version is there; if it is an older one, not all that left is in it."""
        if version == self.travelling:
            self.leaving, self.travelling, self.journey = 0, HOME, self.fresh

    def anew(self, most: int) -> None:
        """Nobody holds a mirror of this: the next arrival brings one on its way."""
        self.leaving, self.travelling, self.journey = 0, HOME, None
        self.fresh = max(self.fresh, (most + 1) // 2)
