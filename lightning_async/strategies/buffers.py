"""Buffers at a meeting: the float ones (BatchNorm's statistics) are averaged, the integer ones take the maximum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import How, Rounds


@torch.no_grad()
def average_buffers(module: nn.Module, rounds: Rounds, weight: int = 1) -> Wait[None]:
    """Make the buffers of all members equal. `weight` 0 leaves a member's float buffers out."""
    buffers = {name: b for name, b in module.named_buffers() if b.numel()}
    floats = [b for b in buffers.values() if b.is_floating_point()]
    others = [b for b in buffers.values() if not b.is_floating_point() and not b.is_complex()]
    yield from _combine(floats, rounds, "mean", torch.float64, weight)
    yield from _combine(others, rounds, "max", torch.int64, weight)


def _combine(buffers: list[Tensor], rounds: Rounds, how: How, dtype: torch.dtype, weight: int) -> Wait[None]:
    if not buffers:
        return
    flat = torch.cat([b.detach().reshape(-1).to("cpu", dtype) for b in buffers])
    result, _ = yield from rounds.exchange(flat, how, weight)
    parts = torch.split(result[0], [b.numel() for b in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view(buffer.shape))
