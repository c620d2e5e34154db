"""Sync: D-PSGD, the honest lock-step baseline: x_i <- sum_j W_ij x_j - lr * g_i(x_i), weight 1 / (neighbours + 1) each.

    snapshot x_i(k) --> both neighbours  |  forward, backward, optimizer (while it travels)  |  wait for theirs, mix

Gradients are taken at the weights before the mixing, so the exchange hides behind the step. Both ends of an edge mix
the same two snapshots, so the mean is kept; that needs equal numbers of steps, and a member that ends early or dies
stops the others with a sentence instead of leaving them waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_async.algorithms.gossip import Gossip
from lightning_async.algorithms.topology import neighbours
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

WEIGHTS, END = FIRST_FREE_KIND, FIRST_FREE_KIND + 1


class SyncRing(Gossip):
    """Synchronous neighbour averaging. It waits by definition."""

    in_step = True
    shrinks = "nothing"  # all are of the same step
    kinds: ClassVar[Mapping[int, str]] = {WEIGHTS: "weights", END: "end"}

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """Round 1 mixes the initial weights."""
        super().begin(replica, mail, mass, rounds)
        self._scratch, self._snapshot = torch.empty_like(replica.flat), replica.weights()
        self._round = 1
        self._unsent: set[int] | None = None
        self._early: list[Letter] = []
        self._members = mail.members()

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Wait for the neighbours' weights of this round, mix, and send those of the next one ahead."""
        self._step = step
        if step % self.period == 0:
            yield from self._mix(replica, mail, step)
            self._next_round(replica)
            self._send(mail)
        return self.arrived()

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """Drop the snapshots that were sent ahead (they moved nobody), then average."""
        for peer in neighbours(self.topology, mail.members(), mail.me):
            while peer in mail.members() and not mail.post(peer, Message(END)):
                yield f"rank {peer} to take the last word"
            self.wrote_to.add(peer)
        return (yield from super().meet(replica, mail))

    def pump(self, replica: Replica, mail: Mail) -> None:
        """What was sent ahead, or to who died, moved nobody: nothing to account for."""
        super().pump(replica, mail)
        for letter in self._early + mail.take(WEIGHTS) + mail.take(END):
            mail.folded(letter)
        self._early = []

    def state_dict(self) -> dict[str, Any]:
        """Also the number of the round."""
        return {**super().state_dict(), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also the number of the round."""
        super().load_state_dict(state)
        self._round = state["round"]

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """The next round mixes what the replicas are now."""
        super().resume(replica, adopted=adopted)
        self._next_round(replica)

    def midway(self) -> dict[str, Any]:
        """There is no such state: what a snapshot moves is known only with the one that crosses it."""
        raise RuntimeError(
            "mode='sync' is in lock-step and cannot be cut between meetings: save at meetings, or use mode='pairwise'"
        )

    def _next_round(self, replica: Replica) -> None:
        self._snapshot.copy_(replica.flat)
        self._round += 1
        self._unsent = None

    def _send(self, mail: Mail) -> None:
        """Post this round's snapshot to the neighbours that do not have it."""
        if self._unsent is None:
            self._unsent = set(neighbours(self.topology, mail.members(), mail.me))
        body = self.on_wire(self._snapshot)
        for peer in sorted(self._unsent):
            if mail.post(peer, Message(WEIGHTS, body, step=self._round, version=self._round, weight=self.mass)):
                self._unsent.discard(peer)
                self.wrote_to.add(peer)

    def _mix(self, replica: Replica, mail: Mail, step: int) -> Wait[None]:
        """x += sum over the neighbours of weight * (their snapshot - mine)."""
        came: dict[int, Letter] = {}
        while True:
            self._send(mail)
            for letter in self._letters(mail):
                came[letter.peer] = letter
            self._check_death(mail)
            around = neighbours(self.topology, mail.members(), mail.me)
            missing = [r for r in around if r not in came or r in (self._unsent or ())]
            if not missing:
                break
            self._check_end(mail, missing)
            yield f"rank {missing[0]}'s weights of round {self._round}"
        rate = 2 / (len(came) + 1)  # as many neighbours as everybody has
        mine = self.on_wire(self._snapshot)
        for peer in sorted(came):
            letter = came[peer]
            theirs, weights = letter.message.weight, letter.message.body
            assert weights is not None  # snapshots always have a body
            pull = self._scratch.copy_(weights).sub_(mine)
            replica.shift(pull, rate * theirs / (theirs + self.mass))
            self.record(self.arrival(letter, step))
            mail.folded(letter)

    def _letters(self, mail: Mail) -> list[Letter]:
        """The letters of this round; a neighbour may be one round ahead."""
        letters = self._early + mail.take(WEIGHTS)
        self._early = [letter for letter in letters if letter.message.version != self._round]
        return [letter for letter in letters if letter.message.version == self._round]

    def _check_end(self, mail: Mail, missing: list[int]) -> None:
        for letter in mail.take(END):
            mail.folded(letter)
            if letter.peer in missing:
                raise RuntimeError(
                    f"rank {letter.peer} has no more batches in this epoch while rank {mail.me} goes on: mode='sync' "
                    "needs equal numbers of batches: use balance='equal' and streams of equal length"
                )

    def _check_death(self, mail: Mail) -> None:
        dead = sorted(set(self._members) - set(mail.members()))
        if dead:
            raise RuntimeError(
                f"rank {dead[0]} is gone, and mode='sync' cannot go on without it: start again with those that live, "
                "or use mode='pairwise', which goes on"
            )
