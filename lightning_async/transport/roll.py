"""The roll says who is there: who is silent too long is declared dead by those who notice, for good, for one reason.

counters of beats --> silence --verdict--> compare_set dead/k: the first reason stays, and all read the same
                                           bell/j: the others look at once
dead/k read       --> buried, off the roll; a member that reads its own name there ends
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from lightning_async.transport.gloo import Keys
from lightning_async.transport.heartbeat import Silence

NOBODY = b"-"
"""What stands under a member's `dead` key while it lives."""
LEFT = b"it left the run"
"""What a member writes there itself: this is no accident, and nobody needs to be patient."""


class Roll:
    """All members as one of them knows them; in its control thread, but for `members` and `live`.

    Args:
        me: This member.
        world: How many there were at the start.
        members: Those alive at the start.
        silence: See `heartbeat`.
        patience: See `heartbeat`.
        late: See `heartbeat`.
        bury: Called with each peer found dead, before anybody is told that it is.

    Attributes:
        reasons: Why each dead member is.
        failed: Why this member is dead, by the word of the others.
        members: Those not declared dead.
        live: Those heard of lately.
    """

    def __init__(
        self,
        *,
        me: int,
        world: int,
        members: Iterable[int] | None,
        silence: float,
        patience: float,
        late: float | None,
        bury: Callable[[int], None],
    ) -> None:
        alive = sorted(range(world) if members is None else set(members))
        if not 0 <= me < world or me not in alive or alive[0] < 0 or alive[-1] >= world:
            raise ValueError(f"`me` ({me}) must be one of `members`, and these below `world` ({world}), got {alive}")
        self.reasons: dict[int, str] = {k: "not there at the start" for k in range(world) if k not in alive}
        self.failed: str | None = None
        self.members = tuple(alive)
        self.live: tuple[int, ...] = (me,)
        self.peers = tuple(k for k in alive if k != me)
        self._me = me
        self._bury = bury
        self._judge = Silence(self.peers, silence=silence, patience=patience, start=time.monotonic(), late=late)
        self._broken: set[int] = set()
        self._condemned: dict[int, str] = {}

    @property
    def deaths(self) -> dict[int, str]:
        """Why each member died that did; not those that left."""
        return {k: why for k, why in list(self.reasons.items()) if k in self.peers and why != LEFT.decode()}

    @property
    def shrinks(self) -> bool:
        """Whether somebody is gone of whom that is not public yet."""
        return any(k in self.reasons for k in self.members)

    def broken(self, peer: int, broken: bool) -> None:
        """Whether the connection to `peer` was closed by the other side and is not up again."""
        (self._broken.add if broken else self._broken.discard)(peer)

    def condemn(self, peer: int, reason: str) -> None:
        """Declare a peer dead for a reason of the carrier's."""
        self._condemned[peer] = reason

    def look(self, counts: Mapping[int, int], flags: Mapping[int, bytes]) -> None:
        """What was read: everybody's number of beats, and under everybody's `dead` key."""
        self._judge.look(now=time.monotonic(), counts=counts)
        self._mourn(flags)

    def declare(self, store: Keys) -> bool:
        """Declare dead who is; whether there is one."""
        declared = False
        for peer in self.peers:
            reason = self._condemned.get(peer) or self._judge.verdict(peer, broken=peer in self._broken)
            if reason is not None and peer not in self.reasons:
                self._mourn({peer: store.compare_set(f"dead/{peer}", NOBODY, reason.encode())})
                declared = True
        return declared

    def settle(self) -> bool:
        """Make public who is there; whether that is news."""
        peers = [k for k in self.peers if k not in self.reasons]
        for dead in set(self.members).difference(peers, [self._me]):
            self._bury(dead)
        members = tuple(sorted([*peers, self._me]))
        live = tuple(sorted([*(k for k in peers if self._judge.live(k)), self._me]))
        news = (members, live) != (self.members, self.live) or self.failed is not None
        self.members, self.live = members, live
        return news

    def _mourn(self, flags: Mapping[int, bytes]) -> None:
        for k, flag in flags.items():
            if flag != NOBODY and k not in self.reasons:
                self.reasons[k] = flag.decode()
                if k == self._me:
                    self.failed = (
                        f"member {k} (this one) was declared dead by the others ({self.reasons[k]}), and the dead do "
                        "not come back: it must end, and may join the next run"
                    )
