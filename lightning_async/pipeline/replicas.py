"""Replicas of a pipeline keep equal weights: before each step the ranks of one stage average their gradients.

replica 0   first -> ... -> last        each stage's ranks   g_r -> all others,  mean in the order of ranks
replica 1   first -> ... -> last        and wait for all: replicas go in step, stages do not

Whether somebody wishes to stop goes along: so the last stages of all replicas know it after the same batch.

Each replica's BatchNorm sees its own batches. Where all rest, what it has gathered becomes the mean. First all say
which buffers they have: one that comes with a batch, or grows with it, may be unlike, and then each keeps its own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_async.pipeline.edge import present
from lightning_async.transport.mail import FIRST_FREE_KIND, Mail, Message, Wait

AVERAGES = range(FIRST_FREE_KIND + 8, FIRST_FREE_KIND + 10)
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What gradients of replicas may be."""
WHAT = ("gradients", "names of buffers", "buffers")


class Replicas:
    """The ranks that hold the same stage, seen from one of them.

    Attributes:
        wish: Whether somebody wished for something when they averaged last.
    """

    def __init__(self, mail: Mail, ranks: Sequence[int]) -> None:
        self._mail, self._ranks = mail, tuple(ranks)
        self._count = 0
        self._unlike: set[str] = set()
        self.wish = False

    @property
    def alone(self) -> bool:
        """Whether there is one only."""
        return len(self._ranks) < 2

    def average(self, parameters: Sequence[Tensor], *, wish: bool = False) -> Wait[None]:
        """Make the gradients the mean over all replicas, in the widest of their precisions and at least float32; one
        that a replica does not have counts as zeros there. What is no real number of a usual precision is frozen, and
        left out."""
        if self.alone:
            return
        parameters = [p for p in parameters if p.dtype in REAL]
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters if p.requires_grad), torch.float32)
        there = torch.tensor([*(float(p.grad is not None) for p in parameters), float(wish)], dtype=dtype)
        parts = yield from self._swap("gradients", torch.cat([*(_flat(p, dtype) for p in parameters), there]))
        total = torch.stack([parts[rank] for rank in self._ranks]).sum(0)
        sizes = [p.numel() for p in parameters]
        means = torch.split(total / len(self._ranks), [*sizes, len(there)])
        *have, wishes = total[-len(there) :].tolist()
        self.wish = wishes > 0
        for parameter, mean, there in zip(parameters, means, have, strict=False):
            if there:
                parameter.grad = mean.view(parameter.shape).to(parameter)

    def average_buffers(self, named: Mapping[str, Tensor]) -> Wait[None]:
        """Make float ones the mean over all replicas, whole numbers the largest; each keeps its own of what is unlike.

        All must call it, also who has none: nobody knows what the others have."""
        if self.alone:
            return
        found = yield from self._common({name: b for name, b in named.items() if not b.is_complex()})
        if not found:
            return
        parts = yield from self._swap("buffers", torch.cat([_bytes(b) for b in found]))
        at = 0
        for buffer in found:
            here = slice(at, at + buffer.numel() * buffer.element_size())
            raw = [parts[rank][here].clone().view(buffer.dtype) for rank in self._ranks]
            if buffer.is_floating_point():
                one = torch.stack([part.to(torch.float64) for part in raw]).mean(0)
            else:
                one = torch.stack([part.to(torch.int64) for part in raw]).amax(0)
            buffer.data = one.view(buffer.shape).to(buffer)  # the old one is left to graphs that hold it
            at = here.stop

    def _common(self, named: Mapping[str, Tensor]) -> Wait[list[Tensor]]:
        """Those that all replicas have alike, in the order in which the first of them has them."""
        mine = {name: [list(b.shape), str(b.dtype)] for name, b in named.items()}
        plan = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        said = yield from self._swap("names of buffers", plan)
        plans = [json.loads(said[rank].numpy().tobytes()) for rank in self._ranks]
        every = {name: [plan.get(name) for plan in plans] for plan in plans for name in plan}
        unlike = {name for name, kinds in every.items() if any(kind != kinds[0] for kind in kinds)}
        if new := sorted(unlike - self._unlike):
            self._unlike |= unlike
            if self._mail.me == self._ranks[0]:
                warnings.warn(
                    f"the pipelines have unlike buffers ({', '.join(f'`{name}`' for name in new)}): each keeps its "
                    "own of these, and files have the first pipeline's. Register a buffer in `__init__`, with one "
                    "shape for all batches, if it is to be averaged",
                    stacklevel=2,
                )
        return [named[name] for name in every if name not in unlike and named[name].numel()]

    def _swap(self, what: str, flat: Tensor) -> Wait[dict[int, Tensor]]:
        self._count += 1
        mail = self._mail
        kind = AVERAGES[self._count % len(AVERAGES)]
        parts = {mail.me: flat}
        unsent = [rank for rank in self._ranks if rank != mail.me]
        while unsent or len(parts) < len(self._ranks):
            unsent = [r for r in unsent if not mail.post(r, Message(kind, flat, version=WHAT.index(what)))]
            for letter in mail.take(kind):
                if letter.message.version != WHAT.index(what):
                    raise RuntimeError(
                        f"rank {mail.me} averages {what} over the replicas, where rank {letter.peer} averages "
                        f"{WHAT[letter.message.version]}: one pipeline rests where another trains on. Give all "
                        "the same number of batches"
                    )
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


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.detach().cpu().contiguous().view(-1).view(torch.uint8)
