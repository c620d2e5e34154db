"""A convolution in tiles of batch and area: each tile is a task; the filter is shared, nothing is computed twice.

    output   +-------+-------+        a band of output rows needs the input rows below it and a margin of the filter's
    of a     | tile  | tile  |        height; the padding is made where a tile touches the border
    sample   +-------+-------+
             batch 0..3  4..7         backward: the batch is split again; the filter's gradients are summed in order

The result is the plain convolution's, up to the order in which sums are rounded. Where tiles do not apply (autocast,
another device, padding by reflection, "same") the convolution is computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_async.inner.threads import Threads

Pair = tuple[int, int]


class Shape(NamedTuple):
    """What a convolution is, besides its weights."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class TiledConv2d(nn.Conv2d):
    """A `Conv2d` that got threads: `tile` makes one of a plain one, in place."""

    threads: Threads

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, in tiles where that is possible."""
        if not self._can(x):
            return super().forward(x)
        found: Tensor = _Tiled.apply(x, self.weight, self.bias, self._shape(), self.threads)  # type: ignore[no-untyped-call]
        return found

    def _can(self, x: Tensor) -> bool:
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return plain and x.dim() == 4 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def _shape(self) -> Shape:
        return Shape(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


def tile(module: nn.Module, threads: Threads) -> Callable[[], None]:
    """Let all plain convolutions of a module compute in tiles; returns what takes that back."""
    changed = [part for part in module.modules() if type(part) is nn.Conv2d]
    for part in changed:
        part.__class__ = TiledConv2d
        part.threads = threads  # type: ignore[assignment]

    def put_back() -> None:
        for part in changed:
            part.__class__ = nn.Conv2d
            part.__dict__.pop("threads", None)

    return put_back


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, threads: Threads) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.threads, ctx.has_bias = shape, threads, bias is not None
        output = x.new_empty(_output(x, weight, shape))
        cuts = [(n, rows) for n in _cut(len(x), threads.count) for rows in _bands(output, threads.count)]
        threads.run([partial(_forward, output, x, weight, bias, shape, n, rows) for n, rows in cuts])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        cuts = _cut(len(x), ctx.threads.count)
        found: list[Any] = [None] * len(cuts)
        works = [partial(_backward, found, k, grad[n], x[n], weight, ctx.shape, mask) for k, n in enumerate(cuts)]
        ctx.threads.run(works)
        inputs, weights, biases = zip(*found, strict=True)
        return (
            torch.cat(inputs) if mask[0] else None,
            _sum(weights) if mask[1] else None,
            _sum(biases) if mask[2] else None,
            None,
            None,
        )


def _forward(
    output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, n: slice, rows: slice
) -> None:
    """One tile of the output."""
    (stride, _), (pad, pad_width), (dilation, _) = shape.stride, shape.padding, shape.dilation
    begin = rows.start * stride - pad
    end = (rows.stop - 1) * stride - pad + dilation * (weight.shape[2] - 1) + 1
    height = x.shape[2]
    part = x[n, :, max(0, begin) : min(height, end)]
    above, below = max(0, -begin), max(0, end - max(height, begin))
    if above or below:
        part = functional.pad(part, (0, 0, above, below))
    padding = (0, pad_width)
    output[n, :, rows] = functional.conv2d(part, weight, bias, shape.stride, padding, shape.dilation, shape.groups)


def _backward(
    found: list[Any], k: int, grad: Tensor, x: Tensor, weight: Tensor, shape: Shape, mask: list[bool]
) -> None:
    """One part of the batch: its inputs' gradients, and what it adds to the filter's."""
    found[k] = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]],
        shape.stride,
        shape.padding,
        shape.dilation,
        False,
        [0, 0],
        shape.groups,
        mask,
    )


def _output(x: Tensor, weight: Tensor, shape: Shape) -> tuple[int, ...]:
    def size(of: int, k: int) -> int:
        reach = shape.dilation[k] * (weight.shape[2 + k] - 1) + 1
        return (of + 2 * shape.padding[k] - reach) // shape.stride[k] + 1

    return len(x), weight.shape[0], size(x.shape[2], 0), size(x.shape[3], 1)


def _cut(length: int, parts: int) -> list[slice]:
    """`length` in at most so many parts, none of them empty."""
    parts = max(1, min(parts, length))
    ends = [length * k // parts for k in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _bands(output: Tensor, threads: int) -> list[slice]:
    """Bands of rows, where the batch alone does not occupy the threads."""
    return _cut(output.shape[2], -(-threads // max(1, len(output))))


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
