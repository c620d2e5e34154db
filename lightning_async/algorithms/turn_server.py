"""One shard whose pushes come by turns: each is a sum of moves, or of gradients, by which the optimizer steps.

    sum      every batch counts one n-th, as in a synchronous step        mean     every push counts as one batch
    delay    as "sum", and less by a law of how late it is

    gradients  -->  compensated for their delay  -->  optimizer.step()  -->  W          (`server_step`)
    moves      --------------------------------------------------------->  W += gamma * c

All else is `shard_server`. For DC-ASGD it keeps what it handed out to each member last, which is no part of its image:
an heir compensates for what it has seen itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_async.algorithms.compensation import Compensation
from lightning_async.algorithms.outer import Sum
from lightning_async.algorithms.shard_server import ShardServer, integers
from lightning_async.algorithms.weighting import excess_rounds
from lightning_async.transport.mail import Letter

Scale = Literal["sum", "mean", "delay"]
NOBODY = -1


class Merge(Protocol):
    """An `Outer` that knows of shares and paces (see `ServerStep.arrive`)."""

    tensors: list[Tensor]
    count: int

    def arrive(
        self,
        weights: Tensor,
        correction: Tensor,
        gamma: float,
        n: int,
        *,
        share: float | None = None,
        among: float | None = None,
        pace: float = 1.0,
    ) -> None:
        """Move `weights`."""


class Moves(Sum):
    """Adds what the members' own optimizers moved."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__(weights, lr=1.0)

    def arrive(
        self, weights: Tensor, correction: Tensor, gamma: float, n: int, *, pace: float = 1.0, **shares: Any
    ) -> None:
        """See `Outer`; a shorter step is a smaller move."""
        super().arrive(weights, correction, gamma * pace, n)


@dataclass
class TurnServer(ShardServer):
    """A shard whose pushes come by turns.

    Attributes:
        scale: What a push counts.
        usual: Samples of a batch, on average over the members, where theirs are of unlike size: then a batch counts by
            its samples. None: batches count alike.
        worths: How many batches were in each member's last push.
        late: What is done about late ones.
        handed: The weights that each member was given last, as far as they are needed.
        holder: Who has its token, as `turns` says; None: nobody, or it is not known.
    """

    scale: Scale = "sum"
    usual: float | None = None
    late: Compensation = field(default_factory=Compensation)
    handed: dict[int, Tensor] = field(default_factory=dict)
    holder: int | None = None
    outer: Merge = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hand_to_all()

    def handed_out(self, peer: int) -> None:
        """A member starts from these weights."""
        super().handed_out(peer)
        if self.late.how == "dc":
            self.handed[peer] = self.weights.clone()

    def _more(self) -> tuple[Tensor, ...]:
        """Who has the token."""
        return (torch.tensor([NOBODY if self.holder is None else self.holder]),)

    def become(self, image: Tensor) -> int:
        """Be what an image says. What was handed out before is not known."""
        at = super().become(image)
        (holder,) = integers(image, at, 1) or [NOBODY]  # older images name none
        self.holder = None if holder == NOBODY else holder
        self._hand_to_all()
        return at + 8

    def _hand_to_all(self) -> None:
        self.handed = dict.fromkeys(self.members, self.weights.clone()) if self.late.how == "dc" else {}

    def _merge(self, letter: Letter, correction: Tensor, gamma: float) -> None:
        """With "mean" each push is a step of its own."""
        n, batches = len(self.members), letter.message.weight * self._size(letter)
        self.worths[letter.peer] = float(batches)
        among = n * len(self.worths) / sum(self.worths.values())
        share, among = (1.0, 1.0) if self.scale == "mean" else (batches / n, among)
        pace = self.late.pace(max(0, self.version - letter.message.version), n)
        today = self.late.today(correction, letter.message.weight, self.weights, self.handed.get(letter.peer))
        self.outer.arrive(self.weights, today, gamma, n, share=share, among=among, pace=pace)

    def _gamma(self, letter: Letter, delay: int) -> float:
        n = len(self.members)
        if self.scale == "mean":
            return 1 / letter.message.weight
        return self._size(letter) * (self.rules.law(excess_rounds(delay, n)) if self.scale == "delay" else 1.0) / n

    def _size(self, letter: Letter) -> float:
        """A batch of this push, in usual ones. (One without batches moves nothing, whatever it counts.)"""
        m = letter.message
        return 1.0 if self.usual is None or not m.samples else m.samples / (m.weight * self.usual)
