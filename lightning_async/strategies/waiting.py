"""Every wait has an owner, a bound and a way out: whoever waits says for what, and stops when the run is stopped.

flags on the board:   "stop"  (a SIGTERM somewhere: everybody stops cleanly)
                      "abort" (an exception somewhere: everybody stops with that exception named)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.transport.mail import Carrier, Wait

T = TypeVar("T")
GLANCE = 0.2  # seconds between two looks at the flags while waiting
UNHEARD = 2.0  # seconds in which the board decides that the run is to end, if it answers
log = logging.getLogger(__name__)


class PeerFailedError(RuntimeError):
    """Another rank stopped with an exception, or this rank was left behind; the sentence says which and why."""


@dataclass
class Flags:
    """The run's two flags. Reading costs a dictionary look-up; the control thread does the rest.

    Attributes:
        carrier: This rank's mail and board.
        grace: Seconds in which a run that was told to end may still meet, and save.
        sigterm: Whether this rank's process got a SIGTERM.
        failed: Why this rank stopped, if it did.
        patient: Whether this rank is on its way to such a meeting.
        heed: Called at every look; it may not wait for anybody.
        spent: Seconds that this rank's thread was in `drive`.
        waited: Seconds of these in which there was nothing to do but wait.
        siblings: The other ranks of this rank's member, which ends with each of them.
        orphaned: Whether it ended so.
        unheard: Whether this rank ended by itself, told to end where the board does not answer.
        overdue: Whether it did not come to its end within the grace: a SIGKILL may follow at any time.
    """

    carrier: Carrier
    grace: float = 0.0
    sigterm: bool = False
    failed: str | None = None
    patient: Callable[[], bool] = field(default=lambda: False)
    heed: Callable[[], object] = field(default=lambda: None)
    spent: float = 0.0
    waited: float = 0.0
    siblings: tuple[int, ...] = ()
    orphaned: bool = False
    unheard: bool = False
    overdue: bool = False
    _stopping: float | None = None
    _told: float | None = None  # when this rank's own SIGTERM was seen
    _mourned: set[int] = field(default_factory=set)  # whose deaths were told

    @property
    def terminating(self) -> bool:
        """Whether the run was told to end."""
        return self._stopping is not None

    @property
    def told_to_end(self) -> bool:
        """Whether this rank knows of a SIGTERM: of the run's, or of its own that the others may not have heard of."""
        return self.terminating or self.sigterm

    def raise_if_set(self) -> None:
        """Raise if the run is to stop. Called before every batch and at every glance of a wait."""
        self._mourn()
        self.heed()
        if self.sigterm:  # set by a signal handler, which may not do more than that
            self._told = self._told or time.monotonic()
            self.carrier.propose("stop", str(self.carrier.me).encode())
        abort = self.carrier.decided("abort")
        if abort is not None:
            raise PeerFailedError(f"{abort.decode()} (this is rank {self.carrier.me}, which stops because of it)")
        fault: RuntimeError | None = getattr(self.carrier, "fault", None)
        if fault is not None:
            raise fault
        if (lost := getattr(self.carrier, "failed", None)) is not None:
            raise PeerFailedError(f"rank {self.carrier.me} cannot go on: {lost}")
        self._check_siblings()
        if self.carrier.decided("stop") is not None:
            self._stopping = self._stopping or time.monotonic()
            if not self.patient():
                raise SIGTERMException()
            if time.monotonic() - self._stopping >= self.grace:
                self.overdue = True
                raise SIGTERMException()
        elif self._told is not None and time.monotonic() - self._told >= self.grace + UNHEARD:
            self.unheard = self.overdue = True
            raise SIGTERMException()  # the board does not answer, and this process is to end

    def _check_siblings(self) -> None:
        """The ranks of one member step together: without one of them there is no step for the others."""
        deaths: dict[int, str] = getattr(self.carrier, "deaths", {}) if self.siblings else {}
        for rank in self.siblings:
            if rank in deaths:
                self.orphaned = True
                raise PeerFailedError(
                    f"rank {rank} is dead ({deaths[rank]}), and rank {self.carrier.me} of the same member stops with "
                    "it: the ranks of a member step together. The other members go on"
                )

    def _mourn(self) -> None:
        """Tell the user of each death, once, by the first rank that lives: Lightning's rank 0 may be the dead one."""
        deaths: dict[int, str] = getattr(self.carrier, "deaths", {})
        for rank in sorted(deaths.keys() - self._mourned - {*self.carrier.members()} if deaths else ()):
            self._mourned.add(rank)
            if self.carrier.me == (left := self.carrier.members())[0]:
                log.warning("rank %d is dead: %s. Left: rank %s", rank, deaths[rank], ", ".join(map(str, left)))

    def announce(self, exception: BaseException) -> None:
        """Tell the others that this rank stops, unless it stops because of them."""
        if self.failed is None and not isinstance(exception, (PeerFailedError, SIGTERMException)):
            self.failed = f"rank {self.carrier.me} stopped: {type(exception).__name__}: {exception}"
            self.carrier.propose("abort", self.failed.encode()[:2000])


def drive(
    waiting: Wait[T],
    flags: Flags,
    *,
    limit: float,
    sign: Callable[[], object] | None = None,
    heed: Callable[[], object] | None = None,
) -> T:
    """Run a `Wait` to its end in this thread.

    With a `sign` the limit counts from its last change; `heed` is called at every look, and may raise.
    """
    carrier, start, seen = flags.carrier, time.monotonic(), None
    began = start
    try:
        while True:
            what = next(waiting)
            if sign is not None and (now := sign()) != seen:
                seen, start = now, time.monotonic()
            waited = time.monotonic() - start
            if waited > limit:
                raise TimeoutError(
                    f"rank {carrier.me} waited {waited:.0f} s for {what}; the limit is {limit:.0f} s. Look at the "
                    "output of the rank that did not come; if it is only slow, raise `meeting_timeout` (of a pipeline: "
                    "`waiting_timeout`)"
                )
            flags.raise_if_set()
            if heed is not None:
                heed()
            before = time.monotonic()
            carrier.wait(GLANCE)
            flags.waited += time.monotonic() - before
    except StopIteration as end:
        result: T = end.value
        flags.spent += time.monotonic() - began
        return result
