"""EF-SIGNGD with a deadline: a round closes without the late, whose sheets count when they come.

    weights of round r    those of round r - 1 + the mean over all n ranks of the sheets that its servers counted in r

Each slice has its server, a service beside the training (`sign_server`); a rank's rounds are in `sign_late`. A slow
rank takes fewer steps, each from the newest weights, so shares of the data follow the speed.

Laws: what a rank sends counts in one round of each server. Weights + mean rest + the servers' rest have taken all
ranks' steps, one n-th of each. Weights after round r are the same on all ranks that are ever there. With nobody late
it is `LazySign` by slices, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.algorithms.press import Source, Values
from lightning_async.algorithms.settle import settle
from lightning_async.algorithms.sign_exchange import MEAN, PART
from lightning_async.algorithms.sign_late import LateRounds
from lightning_async.algorithms.sign_server import ASK, DONE, PASS, SERVED, SliceServer
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds


class LateSign(LazySign):
    """Knobs are those of `LazySign`; `max_skip` is how many rounds in a row may close without a rank.

    Args:
        deadline: Seconds that a rank waits for the late.
        knobs: The others.
    """

    in_step = False
    _way: ClassVar[Mapping[str, str]] = {"way": "always, with a deadline"}
    kinds: ClassVar[Mapping[int, str]] = {PART: "part", MEAN: "mean", PASS: "pass", ASK: "ask", DONE: "done"}
    late: LateRounds

    def __init__(self, *, deadline: float, **knobs: Any) -> None:
        super().__init__(**knobs)
        _check(deadline, self)
        self.deadline = deadline

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All weights are equal; nothing was left over yet."""
        self._begin(mail, rounds)
        if self._alone:
            return
        self._kept = replica.weights()
        cuts = self._cuts(replica, parts=len(self._members))
        mine = cuts[self._members.index(self._me)]

        def serve(rest: Tensor | None) -> None:
            server = SliceServer(self._me, mine, self._members, max_skip=self.max_skip, press=self._press, rest=rest)
            mail.serve(SERVED, server)

        self.late = LateRounds(
            self._press(replica.flat),
            cuts,
            self._me,
            self._members,
            deadline=self.deadline,
            like=replica.flat,
            guard=self._guard,
            counted=self._counted,
            serve=serve,
        )

    def _go_on(self, before: Mapping[str, Any], carried: Callable[[Tensor], Tensor]) -> None:
        self.late.number, self.late.missed = before["round"], self.skipped

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Send this rank's step; take those that all agreed on, of one round or of several."""
        if not self._alone:
            self._step = step
            yield from self._round(mail, Values(replica.flat, since=self._kept))
            self.late.agreed(self._kept)
            self.skipped = self.late.missed
            replica.go_to(self._kept)
        return self.arrived()

    def stop(self, mail: Mail) -> Wait[None]:
        """This rank goes to where all wait for each other: from now on nobody waits for it."""
        if not self._alone:
            yield from self.late.stop(mail)

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """All that was sent has been counted, and all have the same weights."""
        if not self._alone:
            yield from self.late.finish(mail, self._kept)
            replica.go_to(self._kept)
        yield from settle(mail, self._rounds, self._peers, lambda: self._pump(mail), lambda: ())
        self._met = self._step
        return replica.weights()

    def _take(self, mail: Mail, source: Source) -> Wait[bool]:
        yield from self.late.take(mail, source)
        return True

    def _counted(self, peer: int, base: int, rounds: int, seconds: float) -> None:
        """The last server has counted what this rank sent, so many rounds after those that it knew."""
        self._arrivals.append(Arrival(peer, base, self._step, self._step + rounds - 1, seconds))

    @property
    def _course(self) -> LateRounds:
        return self.late

    def _pump(self, mail: Mail) -> None:
        mail.lost()


def _check(deadline: object, knobs: LazySign) -> None:
    if not isinstance(deadline, (int, float)) or isinstance(deadline, bool) or not 0 <= deadline < math.inf:
        raise ValueError(
            f"`deadline` must be a number of seconds of at least 0, or None for no deadline, got {deadline!r}"
        )
    needed = {"rule": ("always",), "compress": ("update",), "form": ("auto", "slices"), "warm_up": (0,)}
    for name, values in needed.items():
        if (value := getattr(knobs, name)) not in values:
            raise ValueError(f"`deadline` goes with {name}={values[0]!r} alone, got {value!r}: leave one of them out")
