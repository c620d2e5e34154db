"""SGWU, the synchronous baseline: after so many local steps all wait for each other, and W = sum Q_j W_j / sum Q_j.

    W  --local steps-->  W_0 W_1 W_2  --round-->  mean, weighted by samples and accuracy  --outer rule-->  W, on all


With one step of plain SGD and equal weights it is synchronous SGD. It waits by definition. A member whose weights are
not finite counts nothing in a round, and goes on from W like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT, Algorithm
from lightning_async.algorithms.async_global import AsyncGlobal, perfect
from lightning_async.algorithms.outer import Rule, outer_rule
from lightning_async.algorithms.shard_server import is_finite
from lightning_async.algorithms.wire import EXACT, ROUNDED, Wire, check_wire
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds


class SyncGlobal(Algorithm):
    """Weights merged in rounds (BPT-CNN; Chen et al. 2019). With rounds at meetings only, members are free in between:
    each takes as many steps as it has samples (IDPA).

    Args:
        local_steps: Steps between two rounds; None: rounds at meetings only.
        outer: See `outer`; a round is one arrival of the mean.
        outer_lr: Its learning rate.
        outer_momentum: Its momentum.
        wire: What travels.
    """

    in_step: bool

    def __init__(
        self,
        *,
        local_steps: int | None = 8,
        outer: Rule | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        wire: Wire = "fp32",
    ) -> None:
        self.local_steps, self.in_step = local_steps, local_steps is not None
        self.outer, self.outer_lr, self.outer_momentum, self.wire = outer, outer_lr, outer_momentum, wire
        self.make_outer = outer_rule(outer, lr=outer_lr, momentum=outer_momentum)
        check_wire(wire)
        if wire == "sign":
            raise ValueError(
                "wire='sign' has no meaning with mode='sync', where all wait for the mean: use 'bf16' or 'fp32'"
            )
        self._codec = ROUNDED if wire == "bf16" else EXACT
        self.heritage: Sequence[Mapping[str, Any]] = ()
        self.accuracy: Callable[[], float] = perfect

    @classmethod
    def like(cls, other: AsyncGlobal) -> SyncGlobal:
        """With the knobs of an asynchronous one that mean something here."""
        steps = {"speed": other.pace, "epoch": None}
        local_steps = other.local_steps if isinstance(other.local_steps, int) else steps[other.local_steps]
        outer, lr, momentum = other.outer, other.outer_lr, other.outer_momentum
        return cls(local_steps=local_steps, outer=outer, outer_lr=lr, outer_momentum=momentum, wire=other.wire)

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All have the same weights: the first W."""
        self._mass, self._rounds, self._step, self._batches = mass, rounds, 0, 0
        self._arrivals: list[Arrival] = []
        self._weights = replica.weights()
        self._rule = self.make_outer(self._weights)
        heritage, self.heritage = self.heritage[:1], ()
        for state in heritage:  # those of all members are the same
            if state.get("method") == type(self).__name__:
                self.load_state_dict(state)

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Wait for the others where a round is due."""
        self._step, self._batches = step, self._batches + 1
        if self.local_steps is not None and step % self.local_steps == 0:
            yield from self._round(replica, mail)
        return self.arrived()

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """A round, whatever the number of steps; nothing is rounded."""
        yield from self._round(replica, mail, exact=True)
        return self._weights.clone()

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """All have W."""

    def averaged_over(self, n: int) -> int:
        """A round is the mean of n."""
        return n

    def arrived(self) -> list[Arrival]:
        """Own corrections that were refused since the last call."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def state_dict(self) -> dict[str, Any]:
        """What the outer rule remembers; W is the consensus."""
        return {
            "method": type(self).__name__,
            "outer": type(self._rule).__name__,
            "tensors": [t.cpu() for t in self._rule.tensors],
            "count": self._rule.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same method, on the weights of that meeting."""
        if state.get("method") != (mine := type(self).__name__):
            raise ValueError(
                f"the state of {state.get('method', 'another method')} does not fit {mine}: go on with the method that "
                "the run was started with, or start anew from the weights alone"
            )
        if (was := state.get("outer", now := type(self._rule).__name__)) != now:
            raise ValueError(
                f"the run was saved with outer={was!r} and goes on with {now!r}: give it the same outer rule, or start "
                "anew from the weights alone"
            )
        for mine_, saved in zip(self._rule.tensors, state["tensors"], strict=True):
            mine_.copy_(saved)
        self._rule.count = state["count"]

    def _round(self, replica: Replica, mail: Mail, *, exact: bool = False) -> Wait[None]:
        """The mean of all corrections is what W moves by, as the outer rule has it."""
        wire, dtype = (EXACT if exact else self._codec), self._weights.dtype
        correction = replica.weights().sub_(self._weights)
        weight = max(1, round(self._mass / UNIT * self.accuracy() * 2**20))
        if not is_finite(correction):
            weight, me, step, samples = 0, mail.me, self._step, self._batches * self._mass // UNIT
            self._arrivals.append(Arrival(me, step, step, step, 0.0, samples, 0.0, Fate.REFUSED))
        (mean,), _ = yield from self._rounds.exchange(wire.encode(correction), "mean", weight)
        self._rule.arrive(self._weights, wire.decode(mean, dtype), 1.0, 1)
        replica.go_to(self._weights)
        self._batches = 0
