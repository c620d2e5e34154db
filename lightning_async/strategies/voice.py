"""A member of several ranks has one voice, its speaker's algorithm: what that does to the weights, siblings take over.

    after a step     speaker: fold, answer, ask -> "moved" -> its weights        siblings: be those, to the bit
    at a meeting     speaker: the consensus of all members                       siblings: hear it

All ranks of a member take the same optimizer steps (`common_step`), so between two corrections they are equal anyway.
The algorithm itself knows nothing of siblings; to its peers the member is one rank, its speaker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lightning_async.algorithms.algorithm import Algorithm
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.siblings import Siblings

Drive = Callable[[Wait[Any]], Any]
"""Runs a `Wait` to its end."""


def voice(algorithm: Algorithm, siblings: Siblings | None, drive: Drive) -> Algorithm:
    """What this rank calls around its steps: the algorithm itself, or what stands for it in a member of several."""
    if siblings is None:
        return algorithm
    return Speaker(algorithm, siblings, drive) if siblings.speaks else Listener(algorithm, siblings, drive)


class _Voice(Algorithm):
    """What speaker and listener have in common.

    Args:
        algorithm: The member's; a listener never begins it.
        siblings: The ranks of the member.
        drive: Runs a `Wait` to its end.
    """

    def __init__(self, algorithm: Algorithm, siblings: Siblings, drive: Drive) -> None:
        self._algorithm, self._siblings, self._drive = algorithm, siblings, drive

    def averaged_over(self, n: int) -> int:
        """As many as the speaker says: siblings may hear of a death at other moments, and must step alike."""
        mine = self._algorithm.averaged_over(n) if self._siblings.speaks else None
        return int(self._drive(self._siblings.word("averaged over", mine)))


class Speaker(_Voice):
    """The member's algorithm, and a word to the siblings of what it did."""

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """See `Algorithm.begin`."""
        self._algorithm.begin(replica, mail, mass, rounds)
        self._moves = replica.moves

    def renew(self, old: Replica, new: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """See `Algorithm.renew`."""
        self._algorithm.renew(old, new, mail, mass, rounds)
        self._moves = new.moves

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """See `Algorithm.before_step`."""
        return self._algorithm.before_step(replica, mail, step)

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """See `Algorithm.after_step`; then the siblings get what it moved."""
        arrivals = yield from self._algorithm.after_step(replica, mail, step)
        yield from self._show(replica)
        return arrivals

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """See `Algorithm.meet`; own weights may have moved on the way there."""
        consensus = yield from self._algorithm.meet(replica, mail)
        yield from self._show(replica)
        yield from self._siblings.spread(consensus)
        return consensus

    def _show(self, replica: Replica) -> Wait[None]:
        replica.check()  # half-precision weights are rounded here, so at the same point on all
        moved, self._moves = replica.moves != self._moves, replica.moves
        if (yield from self._siblings.word("whether weights moved", moved)):
            yield from self._siblings.spread(replica.flat)

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """See `Algorithm.resume`."""
        self._algorithm.resume(replica, adopted=adopted)

    def arrived(self) -> list[Arrival]:
        """See `Algorithm.arrived`."""
        return self._algorithm.arrived()

    def accounts(self) -> dict[str, tuple[int, int]]:
        """See `Algorithm.accounts`."""
        return self._algorithm.accounts()

    def state_dict(self) -> dict[str, Any]:
        """See `Algorithm.state_dict`."""
        return self._algorithm.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Algorithm.load_state_dict`."""
        self._algorithm.load_state_dict(state)


class Listener(_Voice):
    """No algorithm of its own, so no state either: it hears."""

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """Nothing."""

    def renew(self, old: Replica, new: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """Nothing."""

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Where the speaker's optimizer gets no gradients, this rank's gets none either."""
        yield from ()  # never waits
        if self._algorithm.takes_gradients:
            for parameter, _ in replica.places:
                parameter.grad = None
        return []

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Be where the speaker is."""
        yield from self._follow(replica)
        return []

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """The consensus, as the speaker came by it."""
        yield from self._follow(replica)
        consensus = yield from self._siblings.spread()
        return consensus.to(replica.device)

    def _follow(self, replica: Replica) -> Wait[None]:
        replica.check()
        if (yield from self._siblings.word("whether weights moved")):
            yield from self._siblings.spread(take=partial(_be, replica))

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """Nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: the speaker has it."""


def _be(replica: Replica, weights: Tensor) -> Tensor:
    replica.go_to(weights)
    return weights
