"""How long the pieces are in which a long body travels: so long that each is read within a second or two.

    read by the peer within 0.5 s            twice as long as it, up to the longest  4 MiB on every quick network
    read after more than 2 s                 half as long as it
    the connection was lost on the way       an eighth                               64 KiB on the slowest

Between two pieces the headers pass that show life. A piece that is longer on its way than `patience` would look like a
cut: the link would be made anew, the body would begin again, and never arrive.
"""

from __future__ import annotations

from typing import Final

QUICK: Final = 0.5
SLOW: Final = 2.0
LEAST: Final = 1 << 16


class Pieces:
    """The length of pieces to one peer; it outlives connections.

    Args:
        longest: In bytes.

    Attributes:
        longest: See above.
        length: Of the next body's pieces. The receiver is told with the body, and cuts as its sender does.
    """

    def __init__(self, longest: int) -> None:
        if longest < 1:
            raise ValueError(f"`fragment_bytes` must be at least 1, got {longest}")
        self.longest = self.length = longest

    def read(self, seconds: float, nbytes: int, *, piece: int) -> None:
        """The peer has read so many bytes, so many seconds after they were sent, or after it had read what was before.

        `piece`: the length of that body's pieces. What was read says nothing of much longer pieces: many of one body do
        not make the next one's longer than twice as long.
        """
        if seconds > SLOW:
            self._set(min(self.length, piece // 2))
        elif seconds < QUICK:
            self._set(max(self.length, 2 * nbytes))

    def broke(self) -> None:
        """The connection was lost with a body on its way."""
        self._set(self.length // 8)

    def _set(self, length: int) -> None:
        self.length = min(self.longest, max(LEAST, length))
