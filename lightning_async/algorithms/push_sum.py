"""Push-sum: a share of (weights, mass) goes to a neighbour; the receiver merges by mass (GoSGD on the ring).

    sender:    (x, a/2) leaves, a/2 stays                  mass is an integer: held + in flight + ledger never changes
    receiver:  x += a_s / (a + a_s) * (x_s - x),  a += a_s

Plain push-sum is unfair: while half of its mass travels a member's step counts half, and a slow member hoards the mass
of its fast neighbours, whose steps then count little. So each step is stretched by (mass born with) / (mass held): one
sample moves the mass-weighted mean equally, whoever saw it and whatever it held. For the same reason a link carries one
unfolded share, the neighbours take turns, and nobody goes below half its first mass. A late share is bounced.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.gossip import Gossip
from lightning_async.algorithms.topology import partner
from lightning_async.algorithms.worth import Worth
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Loss, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

SHARE, RETURN = FIRST_FREE_KIND, FIRST_FREE_KIND + 1
FLOOR = 2  # a member keeps at least this part of the mass it was born with: steps are stretched twice at most
LEAST = 16  # less than this part is not worth a message


class PushSum(Gossip):
    """One-sided gossip that keeps the mass-weighted mean."""

    kinds: ClassVar[Mapping[int, str]] = {SHARE: "share", RETURN: "return"}
    ring_limit = 8  # members keep half of their mass, and what travels is little: 16 on a ring did not agree at all

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """The first turn goes to the next member."""
        super().begin(replica, mail, mass, rounds)
        self._turn = 0
        self._scratch, self._before = torch.empty_like(replica.flat), torch.empty_like(replica.flat)
        self._seen = 0

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Remember the weights, to see how far the optimizer moves them."""
        if self._seen != step:  # several optimizers may step in one batch
            self._seen = step
            self._before.copy_(replica.flat)
        return (yield from super().before_step(replica, mail, step))

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Merge what came, then push half to the neighbour whose turn it is."""
        self._step = step
        self.own_steps.arrive(replica.flat, step)
        if self._seen == step and self.mass != self._born_with:
            moved = self._scratch.copy_(replica.flat).sub_(self._before)
            replica.shift(moved, self._born_with / self.mass - 1)
        self.pump(replica, mail)
        if step % self.period == 0:
            self._push(replica, mail)
        yield from ()  # never waits
        return self.arrived()

    def pump(self, replica: Replica, mail: Mail) -> None:
        """Everything but pushing."""
        super().pump(replica, mail)
        for letter in mail.take(SHARE):
            arrival = self.arrival(letter, self._step)
            if self.late(arrival):
                self._refuse(mail, letter)
                self.record(arrival.refused())
            else:
                self._merge(replica, letter, arrival)
            mail.folded(letter)
        for letter in mail.take(RETURN):
            self._merge(replica, letter, None)
            mail.folded(letter)

    def lose(self, replica: Replica, loss: Loss) -> None:
        """A share that nobody merges is missing, weights and mass."""
        m = loss.message
        if m.kind in (SHARE, RETURN) and m.body is not None and self.in_these_accounts(m):
            self.ledger.enter(Fate.LOST, m.body.to(replica.flat.dtype), m.weight / UNIT, m.weight)

    def state_dict(self) -> dict[str, Any]:
        """Also whose turn it is."""
        return {**super().state_dict(), "turn": self._turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also whose turn it is."""
        super().load_state_dict(state)
        self._turn = state["turn"]

    def worth(self, message: Message, *, lost: bool = False) -> Worth | None:
        """A share, on its way there or back: its mass, and that much of its weights."""
        m = message
        if m.kind not in (SHARE, RETURN) or m.body is None or (lost and not self.in_these_accounts(m)):
            return None
        return Worth(m.body.to("cpu", torch.float64) * (m.weight / UNIT), m.weight)

    def _push(self, replica: Replica, mail: Mail) -> None:
        peer = partner(self.topology, mail.members(), mail.me, self._turn)
        self._turn += 1
        share = min(self.mass // 2, self.mass - self._born_with // FLOOR)
        if peer is None:
            return
        if LEAST * share < self._born_with or not mail.free(peer, SHARE):
            self.skipped += 1
            return
        sent = self.on_wire(replica.flat)
        if mail.post(peer, Message(SHARE, sent, step=self._step, weight=share)):
            self.mass -= share
            self.wrote_to.add(peer)
            if sent is not replica.flat:  # what rounding cut off stays here
                error = self._scratch.copy_(replica.flat).sub_(sent)
                replica.shift(error, share / self.mass)

    def _merge(self, replica: Replica, letter: Letter, arrival: Arrival | None) -> None:
        """Fold a share by mass; what a shrink withholds goes into the ledger, its mass does not."""
        theirs, weights = letter.message.weight, letter.message.body
        assert weights is not None  # a share always has a body
        pull = self._pull(replica, weights)
        factor = 1.0
        if arrival is not None:
            factor = self.shrink(arrival, pull, partial(self.own_steps.cosine, pull))
        self.mass += theirs
        replica.shift(pull, factor * theirs / self.mass)
        if factor < 1:
            self.ledger.enter(Fate.SHRUNK, pull, (1 - factor) * theirs / UNIT)
        if arrival is not None:
            self.record(arrival.shrunk(factor))

    def _pull(self, replica: Replica, weights: Tensor) -> Tensor:
        return self._scratch.copy_(weights).sub_(replica.flat)

    def _refuse(self, mail: Mail, letter: Letter) -> None:
        """Bounce the whole share. Behind a marker nothing may be posted: then the ledger takes it."""
        m = letter.message
        back = Message(RETURN, m.body, self._step, echo=m.step, weight=m.weight)
        if self.settling or not mail.post(letter.peer, back):
            assert m.body is not None  # a share always has a body
            self.ledger.enter(Fate.REFUSED, m.body.to(self._scratch.dtype), m.weight / UNIT, m.weight)
        else:
            self.wrote_to.add(letter.peer)
