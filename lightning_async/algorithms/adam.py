"""Adam on one rank of n takes the steps it would take on the mean of n gradients, so that ddp's learning rate holds.

Adam divides by the root of its second moment v. What v sees on one rank is signal^2 + noise; ddp's v sees the mean of
n gradients: signal^2 + noise / n. A rank that trains alone therefore takes steps that are too short, by up to sqrt(n).
The first moment m tells the two apart: it averages over 1 / rho gradients. With q, a mean of m^2 as slow as v is,

    E q = signal^2 + rho * noise,  rho = (1 - beta1) / (1 + beta1)         E v = signal^2 + noise

so       v' = signal^2 + noise / n,  kept between v / n and v              x -= lr * m * (1 / sqrt(v') - 1 / sqrt(v))

with all moments corrected for their start and eps added to the roots. It is applied after the optimizer's own step, to
Adam and AdamW (not to `amsgrad`); steps that are linear in the gradient need nothing of the kind. It costs one buffer
of the size of v. (m^2 in the place of q costs none, and is noisier: `python -m benchmarks adam` compares them.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


class SecondMoment:
    """Stretches the steps of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: dict[Tensor, float] = {}
        self._square: dict[Tensor, Tensor] = {}
        self._count: dict[Tensor, int] = {}

    @staticmethod
    def concerns(optimizer: Optimizer) -> bool:
        """Whether this optimizer divides by a second moment that we know how to correct."""
        return isinstance(optimizer, Adam)

    @torch.no_grad()
    def stretch(self, n: int) -> None:
        """After a step of the optimizer on one rank: add what it would have moved further on the mean of `n` ranks.

        A step that the optimizer skipped (an overflow under fp16) is not stretched a second time.
        """
        for group in self._optimizer.param_groups:
            if n < 2 or group.get("amsgrad"):
                continue
            beta1, beta2 = (float(beta) for beta in group["betas"])
            lr = float(group["lr"])  # with `maximize` torch turns the gradient round, and so m
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter)
                if state and self._seen.get(parameter) != (step := float(state["step"])):
                    self._seen[parameter] = step
                    m = _wide(state["exp_avg"]) / (1 - beta1**step)
                    v = _wide(state["exp_avg_sq"]) / (1 - beta2**step)
                    q = self._mean_square(parameter, m, beta2)
                    parameter.sub_(further(m, v, q, n, beta1, float(group["eps"])), alpha=lr)

    def state_dict(self) -> dict[str, Any]:
        """What was seen of each parameter, by its place in the optimizer's groups."""
        places = self._places()
        return {
            "seen": {i: self._seen[p] for i, p in enumerate(places) if p in self._seen},
            "square": {i: self._square[p] for i, p in enumerate(places) if p in self._square},
            "count": {i: self._count[p] for i, p in enumerate(places) if p in self._count},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        places = self._places()
        self._seen = {places[i]: float(seen) for i, seen in state["seen"].items()}
        self._square = {places[i]: q.to(places[i].device, copy=True) for i, q in state["square"].items()}
        self._count = {places[i]: int(count) for i, count in state["count"].items()}

    def _places(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _mean_square(self, parameter: Tensor, m: Tensor, beta2: float) -> Tensor:
        """The slow mean of m^2, corrected for its start."""
        q = self._square.setdefault(parameter, torch.zeros_like(m))
        count = self._count[parameter] = self._count.get(parameter, 0) + 1
        q.mul_(beta2).addcmul_(m, m, value=1 - beta2)
        return q / (1 - beta2**count)


def _wide(moment: Tensor) -> Tensor:
    """In half precision a mean over a thousand steps stands still: each new part of it is below the last place."""
    return moment.to(torch.promote_types(moment.dtype, torch.float32))


def further(m: Tensor, v: Tensor, q: Tensor, n: float, beta1: float, eps: float) -> Tensor:
    """How much longer than m / (sqrt(v) + eps) the step is on the mean of `n` gradients.

    With beta1 = 0 the first moment is one gradient: nothing tells its signal from its noise, and nothing is added.
    """
    if beta1 == 0:
        return torch.zeros_like(m)
    rho = (1 - beta1) / (1 + beta1)
    # signal^2 + noise / n = a * q + b * v, with a and b from the two expectations above
    a, b = (1 - 1 / n) / (1 - rho), (1 / n - rho) / (1 - rho)
    mean = (q * a).add_(v, alpha=b)
    mean = torch.minimum(torch.maximum(mean, v / n), v)
    return mean.sqrt_().add_(eps).reciprocal_().sub_(v.sqrt().add_(eps).reciprocal_()).mul_(m)
