"""The board of a virtual cluster: it stands apart, never fails, and is one latency away from everybody.

    member --up--> [ board: first value wins, counters, notes ] --down--> member

What a member says to the board, and hears from it, keeps its order. A member that is cut off is heard when its cut
heals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning_async.transport.virtual_clock import Action, VirtualClock
from lightning_async.transport.virtual_health import Health


class Lane:
    """One direction between a member and the board: in order, held back while the member is cut off."""

    __slots__ = ("held", "last", "member")

    def __init__(self, member: int) -> None:
        self.member = member
        self.last = 0.0
        self.held: list[tuple[Action, tuple[Any, ...]]] = []


class VirtualBoard:
    """Keys, counters and notes that all members share."""

    def __init__(
        self, clock: VirtualClock, health: Health, lag: Callable[[], float], stir: Callable[[int], None], world: int
    ) -> None:
        self._clock = clock
        self._stir = stir
        self._health = health
        self._lag = lag
        self._ups = [Lane(member) for member in range(world)]
        self._downs = [Lane(member) for member in range(world)]
        self._values: dict[str, tuple[float, bytes]] = {}
        self._askers: dict[str, dict[int, None]] = {}
        self._counters: dict[str, int] = {}
        self.notes: dict[int, bytes] = {}

    def up(self, member: int, action: Action, *arguments: Any) -> None:
        """Let a member's word reach the board."""
        self._send(self._ups[member], action, arguments)

    def down(self, member: int, action: Action, *arguments: Any) -> None:
        """Let an answer, or news, reach a member."""
        self._send(self._downs[member], action, arguments)

    def release(self) -> None:
        """Let pass what was held back by a cut that is no more."""
        for lane in (*self._ups, *self._downs):
            if lane.held and not self._health.is_cut_off(lane.member):
                held, lane.held = lane.held, []
                for action, arguments in held:
                    action(*arguments)

    def read(self, member: int, key: str) -> bytes | None:
        """What this member knows of the key; if nothing, it is told when there is something."""
        known, value = self._values.get(key, (math.inf, b""))
        if known <= self._clock.time and known <= self._health.cut_since(member):
            return value
        self._askers.setdefault(key, {})[member] = None
        return None

    def drop(self, key: str) -> None:
        """Nobody will ask for this key again."""
        self._values.pop(key, None)

    # -- what happens at the board, when a member's word arrives ------------------------------------------------------

    def write(self, key: str, value: bytes) -> None:
        """The first value stays; everybody knows it a latency later."""
        if key not in self._values:
            known = self._clock.time + self._lag()
            self._values[key] = known, value
            self._clock.at(known, self._tell, key)

    def count(self, counter: str, amount: int, tell: Action) -> None:
        """Give away the next tickets."""
        first = self._counters.get(counter, 0)
        self._counters[counter] = first + amount
        tell(counter, first, amount)

    def pin(self, member: int, note: bytes) -> None:
        """The newest word of a member."""
        self.notes[member] = note

    def _tell(self, key: str) -> None:
        for member in self._askers.pop(key, {}):
            self._stir(member)

    def _send(self, lane: Lane, action: Action, arguments: tuple[Any, ...]) -> None:
        when = max(self._clock.time + self._lag(), math.nextafter(lane.last, math.inf))
        lane.last = when
        self._clock.at(when, self._pass, lane, action, arguments)

    def _pass(self, lane: Lane, action: Action, arguments: tuple[Any, ...]) -> None:
        if self._health.is_cut_off(lane.member):
            lane.held.append((action, arguments))
        else:
            action(*arguments)
