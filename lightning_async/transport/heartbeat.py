"""Heartbeats, and the rule by which silence is judged.

    beat:     one value a member in the store: a counter, the links it wants, its note
    silence:  time in which a member's counter stood still WHILE we were looking

Nobody is judged on time in which we could not look. If our own look took long or came late (the store's host was
frozen, the network was cut at our side, this process was stopped), that time does not count, and those who were alive
before it start from nought: their beats may have been held up by the same thing. Those who were silent before stay so
until their counter moves.

    silent for `silence` seconds     not live: nobody waits for it
    silent for `patience` seconds    dead: what it has not folded is lost, and it never comes back
    broken link, and not live        dead at once: the kernel closed its connections
    not there for `late` seconds     dead: it never began
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_HEAD = struct.Struct("<qH")
_WANT = struct.Struct("<ii")


@dataclass(frozen=True, slots=True)
class Beat:
    """What one member says of itself.

    Attributes:
        count: Grows with every beat.
        wants: The generation of the link that it wants to each peer; equal wants on both sides make a link.
        note: Its note, if it ever published one.
    """

    count: int
    wants: Mapping[int, int] = field(default_factory=dict)
    note: bytes | None = None

    def pack(self) -> bytes:
        """As it lies in the store."""
        wants = b"".join(_WANT.pack(peer, generation) for peer, generation in self.wants.items())
        tail = b"" if self.note is None else b"=" + self.note
        return _HEAD.pack(self.count, len(self.wants)) + wants + tail

    @classmethod
    def unpack(cls, value: bytes) -> Beat | None:
        """A beat, or None for a member that has not begun."""
        if len(value) < _HEAD.size:
            return None
        count, links = _HEAD.unpack_from(value)
        end = _HEAD.size + links * _WANT.size
        wants = dict(_WANT.iter_unpack(value[_HEAD.size : end]))
        return cls(count, wants, value[end + 1 :] if value[end : end + 1] == b"=" else None)


class Silence:
    """How long each peer has been silent, by looks at their counters."""

    def __init__(
        self, peers: Iterable[int], *, silence: float, patience: float, start: float, late: float | None = None
    ) -> None:
        if not 0 < silence <= patience:
            raise ValueError(f"`silence` must be above 0 and at most `patience`, got {silence} and {patience}")
        self._silence, self._patience = silence, patience
        self._late = patience if late is None else late
        self._blink = silence / 2
        self._last = start
        self._quiet = dict.fromkeys(peers, 0.0)
        self._counts: dict[int, int] = {}

    def look(self, *, now: float, counts: Mapping[int, int]) -> None:
        """Enter the counters read by a look that ended `now`; a peer that is not in it has not begun."""
        passed = now - self._last
        self._last = now
        for peer, quiet in self._quiet.items():
            count = counts.get(peer)
            if count is not None and count != self._counts.get(peer):
                self._counts[peer], self._quiet[peer] = count, 0.0
            elif passed <= self._blink:
                self._quiet[peer] = quiet + passed
            elif quiet < self._silence:
                self._quiet[peer] = 0.0

    def live(self, peer: int) -> bool:
        """Whether the peer was heard of lately."""
        return peer in self._counts and self._quiet[peer] < self._silence

    def reset(self, peer: int) -> None:
        """Begin to count from nought."""
        self._quiet[peer] = 0.0

    def quiet(self, peer: int) -> float:
        """Seconds for which the peer's counter stood still while we were looking."""
        return self._quiet[peer]

    def verdict(self, peer: int, *, broken: bool) -> str | None:
        """Why this peer is to be declared dead, or None."""
        quiet = self._quiet[peer]
        if peer not in self._counts:
            return f"it did not come within {self._late:g} s" if quiet >= self._late else None
        if quiet >= self._patience:
            return f"silent for {quiet:.1f} s, patience is {self._patience:g} s"
        if broken and quiet >= self._silence:
            return f"its connection was closed and it was silent for {quiet:.1f} s"
        return None
