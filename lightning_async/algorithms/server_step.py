"""A merge rule of the server: an arrival is a gradient, and the user's optimizer steps the shard with it.

    arrive (a, gamma, its share of a round)  -->  grad = gamma * a  -->  optimizer.step()  -->  W

Each shard has its own optimizer and steps without the others: `server_groups` refuses what needs the whole. How far one
of many steps goes is in `server_rates`; what Adam's second moment sees of noise is corrected as in `adam`, here over
the pushes of a round. It is the rule beside `outer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.algorithms.adam import further
from lightning_async.algorithms.server_groups import Groups, Piece
from lightning_async.algorithms.server_rates import spread

FINE = 2**20
"""`count` is in so many parts of a synchronous step."""


class ServerStep:
    """The optimizer of one shard (see `outer.Outer`).

    Args:
        weights: The shard, which is stepped in place.
        groups: The user's optimizer.
        begin: Where the shard begins in the flat vector.

    Attributes:
        tensors: What the optimizer remembers; for Adam also a slow mean of its first moment's squares.
        count: How many synchronous steps it has taken the place of, in `FINE` parts.
    """

    def __init__(self, weights: Tensor, groups: Groups, begin: int = 0) -> None:
        self.count = 0
        self._groups, self._names = groups, groups.remembered
        found = groups.within(begin, begin + weights.numel())
        self._pieces: list[tuple[Piece, nn.Parameter]] = [(one, nn.Parameter(weights[one.part])) for one in found]
        by_group = ([p for one, p in self._pieces if one.group == g] for g in range(len(groups.now)))
        self._optimizer: Optimizer = groups.build(list(by_group))
        self._is_adam = "exp_avg_sq" in self._names
        self.tensors = [torch.zeros_like(weights) for _ in range(len(self._names) + self._is_adam)]

    @torch.no_grad()
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
        """Step by a gradient that counts `gamma`.

        Args:
            weights: The shard.
            correction: The gradient, or a sum of some.
            gamma: What it counts.
            n: How many members push in a round.
            share: What part of a synchronous step it is; None: one n-th.
            among: How many such pushes make one, on average; None: n.
            pace: By what the learning rate is multiplied.
        """
        share = 1 / n if share is None else share
        for group, now in zip(self._optimizer.param_groups, self._groups.now, strict=True):
            group.update(spread(now, share))
            group["lr"] *= pace
        self._remind(share)
        gradient = correction * (gamma / share if self._is_adam else gamma)
        for piece, parameter in self._pieces:
            parameter.grad = gradient[piece.part]
        self._optimizer.step()
        self.count += round(share * FINE)
        self._keep()
        if self._is_adam:
            self._stretch(n if among is None else among)

    def _remind(self, share: float) -> None:
        """The state is what `tensors` and `count` say, which a mirror may have changed; at first there is none."""
        self._optimizer.state.clear()
        for piece, parameter in self._pieces if self.count else ():
            pairs = zip(self._names, self.tensors, strict=False)
            kept: dict[str, Any] = {name: tensor[piece.part] for name, tensor in pairs}
            steps = torch.tensor(self.count / FINE / share, dtype=torch.float32)  # of those as long as this one
            self._optimizer.state[parameter] = {"step": steps, **kept}

    def _keep(self) -> None:
        for piece, parameter in self._pieces:
            parameter.grad = None
            state = self._optimizer.state[parameter]
            for name, tensor in zip(self._names, self.tensors, strict=False):
                if (now := state.get(name)) is not None and now.data_ptr() != tensor[piece.part].data_ptr():
                    tensor[piece.part].copy_(now)

    def _stretch(self, among: float) -> None:
        """Move on by what the steps are too short where v sees the noise of few, and not of a mean over all."""
        m_all, v_all, q_all = (self.tensors[self._names.index("exp_avg")], *self._squares())
        for piece, parameter in self._pieces:
            group = self._optimizer.param_groups[piece.group]
            beta1, beta2 = group["betas"]
            steps = float(self._optimizer.state[parameter]["step"])
            m = m_all[piece.part] / (1 - beta1**steps)
            q_all[piece.part].mul_(beta2).addcmul_(m, m, value=1 - beta2)
            if among > 1 and not group.get("amsgrad"):
                v, q = (one[piece.part] / (1 - beta2**steps) for one in (v_all, q_all))
                parameter.sub_(further(m, v, q, among, beta1, float(group["eps"])), alpha=float(group["lr"]))

    def _squares(self) -> tuple[Tensor, Tensor]:
        return self.tensors[self._names.index("exp_avg_sq")], self.tensors[-1]
