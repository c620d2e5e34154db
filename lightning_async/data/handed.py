"""The batches on their way: handed out and not yet trained on, oldest first.

share --give--> [ workers' queues | prefetched | being trained on ] --trained--> completed
                <-------------------- outstanding ---------------->
"""

from __future__ import annotations

from collections import deque


class Handed:
    """The sizes of the batches that were handed out and not completed."""

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self.outstanding = 0

    def give(self, samples: int) -> None:
        """A batch goes out."""
        self._sizes.append(samples)
        self.outstanding += samples

    def back(self) -> None:
        """All of them come back untrained: their iterator was dropped."""
        self._sizes.clear()
        self.outstanding = 0

    def trained(self, samples: int | None = None) -> int:
        """The oldest batch was trained on, or so many samples; returns how many samples that is."""
        if samples is None:
            samples = self._sizes[0] if self._sizes else 0
        if not 0 <= samples <= self.outstanding:
            raise ValueError(f"{samples} samples cannot be completed: only {self.outstanding} are handed out")
        self.outstanding -= samples
        rest = samples
        while rest:
            self._sizes[0] -= (part := min(rest, self._sizes[0]))
            rest -= part
            if not self._sizes[0]:
                self._sizes.popleft()
        return samples
