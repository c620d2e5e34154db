"""Replicas of a pipeline keep equal weights: before each step the ranks of one stage average their gradients.

replica 0   first -> ... -> last        each stage's ranks   g_r -> all others,  mean in the order of ranks
replica 1   first -> ... -> last        and wait for all: replicas go in step, stages do not

Whether somebody wishes to stop goes along: so the last stages of all replicas know it after the same batch.

Each replica's BatchNorm sees its own batches. Where all rest, what it has gathered becomes the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_async.pipeline.edge import present
from lightning_async.transport.mail import FIRST_FREE_KIND, Mail, Message, Wait

AVERAGES = range(FIRST_FREE_KIND + 8, FIRST_FREE_KIND + 10)


class Replicas:
    """The ranks that hold the same stage, seen from one of them.

    Attributes:
        wish: Whether somebody wished for something when they averaged last.
    """

    def __init__(self, mail: Mail, ranks: Sequence[int]) -> None:
        self._mail, self._ranks = mail, tuple(ranks)
        self._count = 0
        self.wish = False

    @property
    def alone(self) -> bool:
        """Whether there is one only."""
        return len(self._ranks) < 2

    def average(self, parameters: Sequence[Tensor], *, wish: bool = False) -> Wait[None]:
        """Make the gradients the mean over all replicas, in the widest of their precisions and at least float32; one
        that a replica does not have counts as zeros there."""
        if self.alone:
            return
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        there = torch.tensor([*(float(p.grad is not None) for p in parameters), float(wish)], dtype=dtype)
        parts = yield from self._swap(torch.cat([*(_flat(p, dtype) for p in parameters), there]))
        total = torch.stack([parts[rank] for rank in self._ranks]).sum(0)
        sizes = [p.numel() for p in parameters]
        means = torch.split(total / len(self._ranks), [*sizes, len(there)])
        *have, wishes = total[-len(there) :].tolist()
        self.wish = wishes > 0
        for parameter, mean, there in zip(parameters, means, have, strict=False):
            if there:
                parameter.grad = mean.view(parameter.shape).to(parameter)

    def average_buffers(self, buffers: Sequence[Tensor]) -> Wait[None]:
        """Make float ones the mean over all replicas, whole numbers the largest."""
        floats = [b for b in buffers if b.is_floating_point()]
        others = [b for b in buffers if not (b.is_floating_point() or b.is_complex())]
        for found, dtype in ((floats, torch.float64), (others, torch.int64)):
            if found and not self.alone:
                parts = yield from self._swap(torch.cat([b.detach().reshape(-1).to("cpu", dtype) for b in found]))
                all_of_it = torch.stack([parts[rank] for rank in self._ranks])
                one = all_of_it.mean(0) if dtype.is_floating_point else all_of_it.amax(0)
                for buffer, values in zip(found, torch.split(one, [b.numel() for b in found]), strict=True):
                    buffer.data = values.view(buffer.shape).to(buffer)  # the old one is left to graphs that hold it

    def _swap(self, flat: Tensor) -> Wait[dict[int, Tensor]]:
        self._count += 1
        mail = self._mail
        kind = AVERAGES[self._count % len(AVERAGES)]
        parts = {mail.me: flat}
        unsent = [rank for rank in self._ranks if rank != mail.me]
        while unsent or len(parts) < len(self._ranks):
            unsent = [r for r in unsent if not mail.post(r, Message(kind, flat, step=self._count))]
            for letter in mail.take(kind):
                if letter.message.body is not None:
                    parts[letter.peer] = letter.message.body.clone()
                mail.folded(letter)
            missing = [r for r in self._ranks if r in unsent or r not in parts]
            if missing:
                yield from present(mail, missing[0])
                yield f"rank {missing[0]}'s part of average {self._count} over the replicas"
        return parts


def _flat(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return found.detach().reshape(-1).to("cpu", dtype)
