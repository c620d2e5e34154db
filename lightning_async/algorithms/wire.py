"""What of a correction travels: a sender keeps what was cut off, since it subtracts only what the receiver will see.

    body = encode(correction)  -->  decode(body) = seen        the next correction begins with (correction - seen)

So every codec has error feedback for nothing: a correction is (own weights - base), and the base moves by `seen`. A
codec of signs fits in here, given a `decode` that is a function of the body alone.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Wire = Literal["fp32", "bf16"]


class Codec(Protocol):
    """Both ends of a wire."""

    def encode(self, values: Tensor) -> Tensor:
        """A flat body for these values."""

    def decode(self, body: Tensor, dtype: torch.dtype) -> Tensor:
        """What the receiver makes of a body."""


class Plain:
    """Numbers as they are, or rounded."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def encode(self, values: Tensor) -> Tensor:
        """See `Codec`."""
        return values if self._dtype is None else values.to(self._dtype)

    def decode(self, body: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        return body.to(dtype)


EXACT = Plain()


def codec(wire: Wire) -> Codec:
    """The codec of this name."""
    if wire not in get_args(Wire):
        raise ValueError(f"`wire` must be 'fp32' or 'bf16', got {wire!r}")
    return Plain(torch.bfloat16) if wire == "bf16" else EXACT
