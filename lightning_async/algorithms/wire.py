"""What of a correction travels: a sender keeps what was cut off, since it subtracts only what the receiver will see.

    body = encode(correction)  -->  decode(body) = seen        the next correction begins with (correction - seen)

So every codec has error feedback for nothing: a correction is (own weights - base), and the base moves by `seen`. Over
any number of pushes, all that was seen + (own weights - base) is all that was to be pushed. That holds for one bit a
number (`sign_wire`), too.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Wire = Literal["fp32", "bf16", "sign"]


class Codec(Protocol):
    """Both ends of a wire."""

    def encode(self, values: Tensor) -> Tensor:
        """A flat body for these values."""

    def decode(self, body: Tensor, dtype: torch.dtype) -> Tensor:
        """What the receiver makes of a body."""

    def answer(self, weights: Tensor) -> Tensor:
        """A body for weights: the newest replace those before, so what is cut off of them is nobody's loss."""


class Wires(Protocol):
    """The codecs of all shards."""

    def of(self, shard: int) -> Codec:
        """That of the shard of this number."""


class Plain:
    """Numbers as they are, or rounded."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def of(self, shard: int) -> Codec:
        """See `Wires`."""
        return self

    def encode(self, values: Tensor) -> Tensor:
        """See `Codec`."""
        return values if self._dtype is None else values.to(self._dtype)

    def decode(self, body: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        return body.to(dtype)

    def answer(self, weights: Tensor) -> Tensor:
        """See `Codec`."""
        return self.encode(weights)


EXACT = Plain()
ROUNDED = Plain(torch.bfloat16)


def check_wire(wire: object) -> None:
    """Raise `ValueError` for what is no wire."""
    if wire not in get_args(Wire):
        raise ValueError(f"`wire` must be 'fp32', 'bf16' or 'sign', got {wire!r}")
