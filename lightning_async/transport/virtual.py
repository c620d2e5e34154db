"""A virtual cluster: n members in one process, on one virtual clock, with faults; all from one seed.

    cluster = VirtualCluster(8, bandwidth=1e8, seed=1)
    cluster.freeze(3, 5.0, at=1.0)
    cluster.join(7, at=2.0)
    results = cluster.run({carrier.me: life(carrier) for carrier in cluster.carriers})

    virtual_programs   who computes, who waits
    virtual_carrier    a member's end of everything: the contract
    virtual_wire       links, uplinks, buffers          virtual_board   keys, counters, notes
    virtual_service    what is done on arrival
    virtual_health     joins, faults, silence, patience, death
    virtual_clock      the event heap

A *program* is a generator. It yields a float: so many seconds of computing, by its own speed; or a str: it waits, and
is resumed when something changed for it. Between two yields no time passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_async.transport.virtual_board import VirtualBoard
from lightning_async.transport.virtual_carrier import VirtualCarrier
from lightning_async.transport.virtual_clock import Action, VirtualClock
from lightning_async.transport.virtual_health import Health, Subject, pair
from lightning_async.transport.virtual_programs import Deadlock, Program, Programs
from lightning_async.transport.virtual_wire import Wire

__all__ = ["Deadlock", "Program", "VirtualCluster"]

CLOCK_SPREAD = 1000.0


class VirtualCluster:
    """Members, wires, a board, a clock and faults.

    Args:
        n: How many members.
        bandwidth: Bytes per second of each member's uplink; None: no limit.
        latency: Seconds that anything is under way, at least.
        jitter: A message takes up to this share of the latency longer.
        seed: Decides jitter, the order of ties and the members' clocks.
        silence: Seconds after which a member that is not heard of is not live.
        patience: Seconds after which it is declared dead; a killed one is after `silence`.
        limit: Seconds that a program may wait for one thing.
    """

    def __init__(
        self,
        n: int,
        *,
        bandwidth: float | None = None,
        latency: float = 0.001,
        jitter: float = 0.1,
        seed: int = 0,
        silence: float = 2.0,
        patience: float = 30.0,
        limit: float = 600.0,
    ) -> None:
        _check(n, bandwidth, latency, jitter, silence, patience)
        self.clock = VirtualClock(seed)
        self.health = Health(self.clock, self, silence=silence, patience=patience)
        self._programs = Programs(self.clock, self.health, n, limit=limit, grace=2 * patience + 1.0)
        self._stirred: set[int] = set()
        wire = Wire(self.clock, self.health, bandwidth=bandwidth, latency=latency, jitter=jitter)
        board = VirtualBoard(self.clock, self.health, wire.lag, self._stir, n)
        offsets = [self.clock.random.uniform(0.0, CLOCK_SPREAD) for _ in range(n)]
        self.carriers = [
            VirtualCarrier(
                me,
                offsets,
                clock=self.clock,
                health=self.health,
                wire=wire,
                board=board,
                stir=self._stir,
                rest=self._rest,
            )
            for me in range(n)
        ]
        wire.ends = list(self.carriers)
        self._wire, self._board = wire, board

    @property
    def time(self) -> float:
        """Virtual seconds since the start."""
        return self.clock.time

    # -- who comes late; faults, now or at a virtual time -----------------------------------------------------------

    def join(self, member: int, *, at: float) -> None:
        """Let a member come late: announced, so it is one of the `members` from the start, but not `live` before then.

        Until then nothing can be posted to it, its program does not run, and it is not dead, however long that takes:
        patience with it begins when it joins. Between meetings nobody waits for it; a meeting does. From then on it is
        a member like any other.
        """
        if self._programs.running or self.time > 0:
            raise RuntimeError(f"member {member} is there already: say who comes late before any time has passed")
        if not 0 < at < math.inf:
            raise ValueError(f"`at` must be a number of seconds above 0, got {at}")
        if self.health.is_awaited(self._member(member)):
            raise ValueError(f"member {member} joins at another time already: a member joins once")
        self.health.join(member, at)

    def freeze(self, member: int, seconds: float, *, at: float | None = None) -> None:
        """Stop a member's time for so long."""
        self._fault(at, self.health.freeze, self._member(member), seconds)

    def kill(self, member: int, *, at: float | None = None) -> None:
        """End a member."""
        self._fault(at, self.health.kill, self._member(member))

    def cut(self, a: int, b: int | None = None, *, seconds: float = math.inf, at: float | None = None) -> None:
        """Let nothing pass between two members, or between one and all the rest; it is late, not lost."""
        subject: Subject = self._member(a) if b is None else pair(self._member(a), self._member(b))
        if a == b:
            raise ValueError(f"member {a} has no link to itself that could be cut")
        self._fault(at, self.health.cut, subject, seconds)

    def slow(self, member: int, factor: float, *, at: float | None = None) -> None:
        """From now on, let computing take `factor` times what the program says."""
        if not factor > 0:
            raise ValueError(f"`factor` must be positive, got {factor}")
        self._fault(at, self._programs.slow, self._member(member), factor)

    # -- time -------------------------------------------------------------------------------------------------------

    def run(self, programs: Mapping[int, Program]) -> dict[int, Any]:
        """Let time pass until all programs ended; what those returned that were not killed or declared dead."""
        self._only_one_driver()
        return self._programs.run({self._member(member): program for member, program in programs.items()})

    def advance(self, seconds: float) -> None:
        """Let so much time pass, with no program running."""
        self._only_one_driver()
        self._pass_until(self.clock.time + seconds, lambda: False)

    def _rest(self, member: int, seconds: float) -> None:
        self._only_one_driver()
        self._stirred.discard(member)
        self._pass_until(self.clock.time + seconds, lambda: member in self._stirred)

    def _pass_until(self, end: float, done: Callable[[], bool]) -> None:
        while not done():
            due = self.clock.next()
            if due is None or due > end:
                self.clock.time = end
                return
            self.clock.step()

    def _stir(self, member: int) -> None:
        self._stirred.add(member)
        self._programs.stir(member)

    # -- what health tells the cluster ------------------------------------------------------------------------------

    def froze(self, member: int) -> None:
        """Its time stands still."""
        self._programs.froze(member)

    def thawed(self, member: int) -> None:
        """Its time goes on."""
        self._programs.thawed(member)
        self.carriers[member].look()

    def joined(self, member: int) -> None:
        """It is there from now on."""
        self._programs.joined(member)

    def stopped(self, member: int) -> None:
        """It does nothing any more."""
        self._programs.stopped(member)

    def healed(self) -> None:
        """Let pass what was held back."""
        self._wire.release()
        self._board.release()
        self.hearing_changed()

    def died(self, member: int) -> None:
        """Everybody hears of it, one after the other."""
        for carrier in self.carriers:
            if carrier.me != member:
                self._board.down(carrier.me, carrier.learn_death, member)

    def hearing_changed(self) -> None:
        """Who waits looks again."""
        for carrier in self.carriers:
            self._stir(carrier.me)
            carrier.look()

    # -- checks -----------------------------------------------------------------------------------------------------

    def _fault(self, at: float | None, action: Action, *arguments: Any) -> None:
        if at is None and not self._programs.running:
            action(*arguments)
        else:
            self.clock.at(self.time if at is None else at, action, *arguments)

    def _member(self, member: int) -> int:
        if not 0 <= member < len(self.carriers):
            raise ValueError(f"there is no member {member} among the {len(self.carriers)} of this cluster")
        return member

    def _only_one_driver(self) -> None:
        if self._programs.running:
            raise RuntimeError("programs are running: a program on a virtual cluster lets time pass by yielding")


def _check(n: int, bandwidth: float | None, latency: float, jitter: float, silence: float, patience: float) -> None:
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"`bandwidth` must be positive or None, got {bandwidth}")
    if latency < 0 or jitter < 0:
        raise ValueError(f"`latency` and `jitter` must not be negative, got {latency} and {jitter}")
    if not 0 < silence <= patience:
        raise ValueError(f"`silence` must be positive and at most `patience`, got {silence} and {patience}")
