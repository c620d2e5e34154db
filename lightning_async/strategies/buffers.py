"""What is not trained: frozen parameters are made equal at the start, buffers at every meeting.

Float buffers (BatchNorm's statistics) are averaged, integer ones take the maximum.

    buffers=      at meetings                          at the end of a run
    average       averaged                             equal
    reestimate    averaged                             BatchNorm's taken anew (`batchnorm.py`), equal
    local         each rank's own                      each rank's own; a checkpoint holds those of the rank that saves
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import How, Rounds

Buffers = Literal["average", "reestimate", "local"]
PORTION = 1 << 24  # elements


@torch.no_grad()
def average_buffers(module: nn.Module, rounds: Rounds, weight: int = 1, *, floats: bool = True) -> Wait[None]:
    """Make the buffers of all members equal. `weight` 0 leaves a member's float buffers out; without `floats` only
    the integer ones are made equal."""
    buffers = {name: b for name, b in module.named_buffers() if b.numel()}
    means = [b for b in buffers.values() if b.is_floating_point() and floats]
    others = [b for b in buffers.values() if not b.is_floating_point() and not b.is_complex()]
    yield from _combine(means, rounds, "mean", torch.float64, weight)
    yield from _combine(others, rounds, "max", torch.int64, weight)


@torch.no_grad()
def average_weights(parameters: Iterable[nn.Parameter], rounds: Rounds, weight: int = 1) -> Wait[None]:
    """Make parameters of a model that is not trained equal on all members. `weight` 0 leaves a member's out."""
    weights = [p for p in parameters if p.numel()]
    for dtype in dict.fromkeys(p.dtype for p in weights):
        for part in _portions([p for p in weights if p.dtype == dtype]):
            yield from _combine(part, rounds, "mean", torch.promote_types(dtype, torch.float32), weight)


@torch.no_grad()
def broadcast_frozen(module: nn.Module, rounds: Rounds, source: int) -> Wait[None]:
    """Give every member the source's frozen parameters. They never travel again."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.numel()]
    for dtype in dict.fromkeys(p.dtype for p in frozen):
        for part in _portions([p for p in frozen if p.dtype == dtype]):
            result = yield from rounds.broadcast(torch.cat([p.detach().reshape(-1).cpu() for p in part]), source)
            for p, values in zip(part, torch.split(result, [p.numel() for p in part]), strict=True):
                p.copy_(values.view(p.shape))


def _portions(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Lists of about `PORTION` elements: a large frozen model is not copied in one piece."""
    portion: list[nn.Parameter] = []
    for p in parameters:
        portion.append(p)
        if sum(q.numel() for q in portion) >= PORTION:
            yield portion
            portion = []
    if portion:
        yield portion


def _combine(buffers: Sequence[Tensor], rounds: Rounds, how: How, dtype: torch.dtype, weight: int) -> Wait[None]:
    if not buffers:
        return
    flat = torch.cat([b.detach().reshape(-1).to("cpu", dtype) for b in buffers])
    result, _ = yield from rounds.exchange(flat, how, weight)
    parts = torch.split(result[0], [b.numel() for b in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view(buffer.shape))
