"""The norm of all stages' gradients, as far as one knows it without waiting: its own now, the others' as last told.

    stage 0  -- 0's ------------> stage 1  -- 0's + 1's ----> stage 2        with each batch
    stage 0  <- 1's + 2's ------- stage 1  <- 2's ----------- stage 2        with each gradient

What is told is the sum of squares of a stage's last update. It travels in headers, so it costs no message and no time;
and since it comes with the batches, in their order, a run clips alike at any speed of its stages. The price is age: a
stage's word is an update old when it leaves, and older by a batch for each hop. Who has not told yet counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

TINY = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


class Norms:
    """Sums of squares, seen from one stage.

    Attributes:
        own: Of this stage's last update.
        before: Of all stages before it, as last told.
        behind: Of all stages behind it, as last told.
    """

    def __init__(self) -> None:
        self.own = self.before = self.behind = 0.0

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """Scale the gradients as a norm of the whole of at most `limit` demands; the norm before that."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        widest = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
        norms = [torch.linalg.vector_norm(g, dtype=widest).cpu() for g in gradients]
        self.own = float(torch.stack(norms).square().sum()) if norms else 0.0
        whole = (self.own + self.before + self.behind) ** 0.5
        if (factor := limit / (whole + TINY)) < 1.0:
            for gradient in gradients:
                gradient.mul_(factor)
        return float(whole)
