"""The ranks of one member take one step: each with the mean of all their gradients, the same bits on all.

    backward on each rank -> [ gradients | which are there ] -> average among siblings -> clipping, optimizer

A parameter counts as used if it is on any of them: then the others bring zeros. On none of them it has no gradient
afterwards either, and the optimizer leaves it alone. Gradients that were averaged before stay as they are, since a mean
of means is that mean: so it does not matter how often a gradient that is not used up comes by here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_async.replica import Replica
from lightning_async.transport.mail import Wait

Average = Callable[[Tensor], Wait[Tensor]]
"""Of a vector on each rank of the member makes the mean, the same bits on all."""


@torch.no_grad()
def average_gradients(replica: Replica, average: Average) -> Wait[None]:
    """Give every parameter the mean of its gradients on all ranks of the member."""
    mean = yield from average(_gathered(replica))
    mean = mean.to(replica.device)
    used = mean[replica.numel :].tolist()
    for (parameter, at), share in zip(replica.places, used, strict=True):
        if not share:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(mean[at : at + parameter.numel()].view_as(parameter))


def _gathered(replica: Replica) -> Tensor:
    """All gradients as one vector like the replica's, and behind them a number for each: whether it is there."""
    vector = torch.zeros(replica.numel + len(replica.places), dtype=replica.flat.dtype, device=replica.device)
    for number, (parameter, at) in enumerate(replica.places):
        if (gradient := parameter.grad) is None:
            continue
        if gradient.is_sparse:
            raise TypeError(
                "a gradient is sparse, and the ranks of one member average dense ones: make the layer with "
                "`sparse=False`, or leave `inner` out"
            )
        vector[at : at + parameter.numel()] = gradient.reshape(-1)
        vector[replica.numel + number] = 1
    return vector
