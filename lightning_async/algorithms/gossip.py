"""Gossip: every member trains on its own and averages with neighbours; no server, and between meetings nobody waits.

    mode        what travels                      who moves                              keeps
    pairwise    weights out, difference back      both ends, by opposite corrections     the mean, for any speeds
    push_sum    half of (weights, mass)           the receiver                           the mass-weighted mean
    sync        weights, both ways, every step    everybody, in lock-step (D-PSGD)       the mean
    none        nothing                           nobody: the control                    the mean

This file holds what the modes share: checked knobs, the wire's precision, the ledger, what a late message is.
Sources: GR-SGD (Zhou, Tu, Ren 2022), AD-PSGD (Lian et al. 2018), GoSGD (Blot et al. 2016), D-PSGD (Lian et al. 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT, Algorithm
from lightning_async.algorithms.ledger import Ledger
from lightning_async.algorithms.settle import settle
from lightning_async.algorithms.topology import RING_LIMIT, TOPOLOGIES, Topology
from lightning_async.algorithms.worth import Worth
from lightning_async.arrival import Arrival, Fate
from lightning_async.fresh import OwnSteps
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Loss, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

Mode = Literal["pairwise", "push_sum", "sync", "none"]
Wire = Literal["fp32", "bf16"]
HEALTHY = 3
"""Delay in steps, between equal members that exchange at each step, on a network that is quicker than that."""


class Gossip(Algorithm):
    """Knobs, ledger and drain, the same for every mode."""

    ring_limit: ClassVar[int | None] = RING_LIMIT
    """So many members agree soon enough on a ring; None: it does not matter."""
    usual_period: ClassVar[int] = 1
    """Exchange after every this many steps, if `period` says nothing else."""

    def __init__(
        self,
        *,
        period: int | None = None,
        max_delay: int | None = 1000,
        wire: Wire = "fp32",
        topology: Topology = "ring",
        mixing: float | None = None,
    ) -> None:
        _check(period, max_delay, wire, topology, mixing)
        self.period = self.usual_period if period is None else period
        self.max_delay, self.wire, self.topology, self.mixing = max_delay, wire, topology, mixing
        self.ledger = Ledger()
        self.mass = UNIT
        self.wrote_to: set[int] = set()
        self.settling = False
        self._arrivals: list[Arrival] = []

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """Start with this mass, nothing in flight, an empty ledger."""
        self.ledger, self.mass, self._born_with, self._rounds = Ledger(), mass, mass, rounds
        self.wrote_to, self.settling, self._arrivals, self.skipped = set(), False, [], 0
        self.own_steps = OwnSteps()
        self._step = self._met = self._opened = 0  # the last step; at the last meeting; when the accounts were opened

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """For who asks where the own steps go."""
        yield from ()  # never waits
        if self.own_steps.asked:  # else not even a look at the weights
            self.own_steps.set_off(replica.flat, step)
        return []

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """Training goes on after a meeting.

        If the replicas adopted the consensus, it is the whole again: all that live have the mass they were born with,
        and nothing is missing. So the accounts are opened anew, and what was posted before is in none of them.
        """
        if adopted:
            self.mass, self._opened = self._born_with, self._met
            self.ledger.open_anew()

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """Drain all links that were used since the last meeting, then take the mass-weighted mean of all replicas."""
        self.settling = True
        yield from settle(mail, self._rounds, self.wrote_to, lambda: self.pump(replica, mail), self.pending)
        self.settling = False
        self.wrote_to.clear()
        self._met = self._step
        result, _ = yield from self._rounds.exchange(replica.flat, "mean", weight=self.mass)
        return result[0]

    def pump(self, replica: Replica, mail: Mail) -> None:
        """While the mail is drained: fold and serve whatever is there, send nothing new."""
        for loss in mail.lost():
            self.lose(replica, loss)
            if loss.message.kind >= FIRST_FREE_KIND:
                self.record(Arrival(loss.peer, loss.message.step, self._step, self._step, 0.0, fate=Fate.LOST))

    def lose(self, replica: Replica, loss: Loss) -> None:
        """A peer died with this message unfolded; it may be one of the rounds', which account for theirs."""

    def pending(self) -> Iterable[int]:
        """The peers that still owe this member an answer, or are owed one."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Mass, ledger and the number of the last step. Rounding leaves no residual: what it cuts off has moved on.

        `lately`: where the own steps went, if a law asks for that.
        `born`: a mass means something beside those of the same run only, so another batch size makes all begin anew.
        """
        mass = {"mass": self.mass, "born": self._born_with}
        known = {"ledger": self.ledger.state_dict(), "lately": self.own_steps.mean}
        return {"method": type(self).__name__, "step": self._met, **mass, **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same mode."""
        if state.get("method") != (mine := type(self).__name__):
            raise ValueError(
                f"the state of {state.get('method', 'another method')} does not fit {mine}: go on with the mode that "
                "the run was started with, or start anew from the weights alone"
            )
        self._step = self._met = state["step"]
        self.mass = state["mass"]
        self.ledger.load_state_dict(state["ledger"])
        self.own_steps.go_on(state.get("lately"))  # older states have none

    def averaged_over(self, n: int) -> int:
        """Over how many members a step is averaged, of `n`."""
        return n

    def healthy_delay(self, n: int) -> int:
        """A letter is folded behind the step in which it came, and dated by a header that may be two exchanges old:
        neighbours take turns."""
        return HEALTHY + 2 * (self.period - 1)

    def accounts(self) -> dict[str, tuple[int, int]]:
        """The mass that is held or in the ledger, and the mass that the members were born with."""
        return {"mass": (self.mass + self.ledger.total_mass(), self._born_with)}

    # -- in the middle of a run (see cut) -----------------------------------------------------------------------------

    def midway(self) -> dict[str, Any]:
        """The state between any two steps, copied: questions may be open.

        No letter is in it: what was taken and is not folded yet counts as under way, and is delivered again.
        """
        since = {"now": self._step, "opened": self._opened, "wrote_to": sorted(self.wrote_to)}
        return {**deepcopy(self.state_dict()), **since}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state: called after `begin`, on a replica with the weights of that moment."""
        self.load_state_dict(state)
        self._step, self._opened, self.wrote_to = state["now"], state["opened"], set(state["wrote_to"])

    def held(self, weights: Tensor) -> Worth:
        """What this member counts in the sum that is kept: what it holds, and what its ledger says is missing."""
        exact = weights.detach().to("cpu", torch.float64)
        return Worth(exact * (self.mass / UNIT) + self.ledger.total(exact), self.mass + self.ledger.total_mass())

    def worth(self, message: Message, *, lost: bool = False) -> Worth | None:
        """What a message to this member counts while it is under way; None: it moves nobody.

        Args:
            message: The message.
            lost: This member has sent it, and the receiver is dead: what its entry in the ledger will count.
        """
        return None

    def counted(self, held: Worth, letters: Iterable[Letter], losses: Iterable[Loss]) -> Worth:
        """What a member's part of a cut counts: what it held, what was under way to it, what was lost unheard of."""
        under_way = [self.worth(letter.message) for letter in letters]
        unheard_of = [self.worth(loss.message, lost=True) for loss in losses]
        return sum((worth for worth in under_way + unheard_of if worth is not None), start=held)

    def brings(self, weights: Tensor, state: Mapping[str, Any], letters: Iterable[Letter]) -> Worth:
        """What a member's part of a cut brings into the consensus: what it held then, and what was under way to it.

        What is missing is in no consensus. It goes by the state `midway` and may be asked beside the training.
        """
        mass: int = state["mass"]
        held = Worth(weights.detach().to("cpu", torch.float64) * (mass / UNIT), mass)
        under_way = [self.worth(letter.message) for letter in letters]
        return sum((worth for worth in under_way if worth is not None), start=held)

    # -- for the modes ------------------------------------------------------------------------------------------------

    def rate(self, n: int) -> float:
        """How far a pair moves towards its average: 1 is all the way.

        A member with two edges in use at once must not answer both in full: two whole averages from one snapshot
        overshoot. 2/3 is D-PSGD's weight 1/3 an edge; a single pair goes all the way.
        """
        return 2 * (self.mixing if self.mixing is not None else (1 / 2 if n == 2 else 1 / 3))

    def warning(self, n: int) -> str | None:
        """What to say before so many members train."""
        if self.topology != "ring" or self.ring_limit is None or n <= self.ring_limit:
            return None
        return (
            f"{n} members on a ring agree slowly; topology='exponential' mixes them in about "
            f"{(n - 1).bit_length()} messages"
        )

    def stepped(self, replica: Replica, step: int) -> None:
        """The optimizer has stepped, and nothing is folded yet."""
        self._step = step
        if self.own_steps.asked:
            self.own_steps.arrive(replica.flat, step)

    def on_wire(self, weights: Tensor) -> Tensor:
        """What of `weights` travels."""
        return weights.to(torch.bfloat16) if self.wire == "bf16" else weights

    def arrival(self, letter: Letter, step: int, fate: Fate = Fate.FOLDED) -> Arrival:
        """The record of a letter that this member handles at its own `step`.

        Nothing was in flight at the last meeting, so it was launched after that, whatever the sender had heard by then.
        """
        m = letter.message
        launched = max(m.echo, self._met)
        return Arrival(letter.peer, m.step, launched, step, letter.seconds, samples=m.samples, fate=fate)

    def late(self, arrival: Arrival) -> bool:
        """Whether an arrival is over the bound on delays."""
        return self.max_delay is not None and arrival.delay > self.max_delay

    def in_these_accounts(self, message: Message) -> bool:
        """Whether a message that this member posted left its hands after the accounts were opened."""
        return message.step > self._opened

    def record(self, arrival: Arrival) -> None:
        """Keep an arrival until the end of this step."""
        self._arrivals.append(arrival)

    def arrived(self) -> list[Arrival]:
        """The arrivals since the last call."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals


class Alone(Gossip):
    """The control: members train alone and are averaged at meetings only."""

    ring_limit = None
    shrinks = "nothing"

    def averaged_over(self, n: int) -> int:
        """Nobody shares a step."""
        return 1

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Nothing to do."""
        yield from ()  # never waits
        self._step = step
        return []


def gossip(mode: Mode = "pairwise", **knobs: object) -> Gossip:
    """The gossip algorithm of this mode."""
    from lightning_async.algorithms.pairwise import Pairwise
    from lightning_async.algorithms.push_sum import PushSum
    from lightning_async.algorithms.sync_ring import SyncRing

    modes: dict[str, type[Gossip]] = {"pairwise": Pairwise, "push_sum": PushSum, "sync": SyncRing, "none": Alone}
    if not isinstance(mode, str) or mode not in modes:
        raise ValueError(f"`mode` must be one of {', '.join(map(repr, modes))}, got {mode!r}")
    if (mixing := knobs.get("mixing")) is not None and mode != "pairwise":
        raise ValueError(f"`mixing` is for mode='pairwise', got {mixing!r} with mode={mode!r}: leave it out there")
    return modes[mode](**knobs)  # type: ignore[arg-type]  # the constructors check each knob's value and type


def _check(period: object, max_delay: object, wire: object, topology: object, mixing: object) -> None:
    if period is not None and (not isinstance(period, int) or isinstance(period, bool) or period < 1):
        raise ValueError(f"`period` must be an integer of at least 1, got {period!r}; without one it is the mode's own")
    if max_delay is not None and (not isinstance(max_delay, int) or isinstance(max_delay, bool) or max_delay < 1):
        raise ValueError(f"`max_delay` must be an integer of at least 1, or None for no bound, got {max_delay!r}")
    if wire not in get_args(Wire):
        raise ValueError(f"`wire` must be 'fp32' or 'bf16', got {wire!r}")
    if topology not in TOPOLOGIES:
        raise ValueError(f"`topology` must be 'ring' or 'exponential', got {topology!r}")
    if mixing is not None and (not isinstance(mixing, (int, float)) or not 0 < mixing <= 0.5):
        raise ValueError(f"`mixing` must be above 0 and at most 0.5 (0.5: a pair meets in the middle), got {mixing!r}")
