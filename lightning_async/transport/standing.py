"""A body with as many fragments as the last one of its kind need not be announced: receives for it stand already.

    first body of a kind    DATA --->  GOT <---  FRAGMENT 0, ... --->
    its receiver folds it   receives for the next are posted, then the fold is told
    the next body           DATA, FRAGMENT 0, ... --->

GOT travels behind all that goes the other way: on a slow link that is busy both ways, about as long as a body.
Each end keeps the same books of one direction, from what it sent or received and from the folds told, so neither asks.
Receives cannot be called back: where the number of fragments changes, the kind is announced again and stands no more.
Bodies that stand travel under a tag of their kind, so a receive that is left over meets nothing.
"""

from __future__ import annotations

TAG = 64
"""And the kind: above all other tags."""


class Standing:
    """One direction of a line.

    Args:
        fragment: The longest piece in which a body travels, in bytes.
        possible: Whether bodies go over the network in this direction; through memory an answer is there at once.
    """

    def __init__(self, fragment: int, *, possible: bool) -> None:
        self._fragment, self._possible = fragment, possible
        self._carried: dict[int, tuple[int, int]] = {}
        self._standing: dict[int, int] = {}
        self._over: set[int] = set()

    def carried(self, number: int, kind: int, nbytes: int) -> None:
        """A long message of this number goes over this line."""
        if self._possible:
            self._carried[number] = kind, self._fragments(nbytes)

    def folded(self, number: int) -> tuple[int, int] | None:
        """That message was folded: the kind that stands from now on, and in how many fragments."""
        kind, fragments = self._carried.pop(number, (0, 0))
        if not fragments or kind in self._over:
            return None
        self._standing[kind] = fragments
        return kind, fragments

    def claim(self, kind: int, nbytes: int) -> bool:
        """Whether this body goes into what stands, which is used up with it or left for ever."""
        standing = self._standing.pop(kind, 0)
        if standing and standing != self._fragments(nbytes):
            self._over.add(kind)
            return False
        return standing > 0

    def room(self, nbytes: int) -> int:
        """What a box must hold so that the next body fits, too."""
        return self._fragments(nbytes) * self._fragment if self._possible else nbytes

    def _fragments(self, nbytes: int) -> int:
        return -(-nbytes // self._fragment)
