"""What may be posted, said once for every carrier: a mistake gets the same sentence on the bench and on the wire.

The numbers of a message are signed 64-bit integers and its body is one flat tensor of a dtype in `DTYPES`.
"""

from __future__ import annotations

import torch

from lightning_async.transport.mail import MARKER, Message

KINDS = 64
NOTE_BYTES = 2048
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
)
_ALLOWED = frozenset(DTYPES)
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


def check_message(me: int, world: int, peer: int, message: Message, *, serves: bool = False) -> None:
    """Raise `ValueError` if `message` cannot be posted by `me` to `peer`, whatever the state of the link.

    Only a member that `serves` may write to itself.
    """
    check_peer(me, world, peer, serves=serves)
    check_kind(message.kind)
    m = message
    numbers = (m.step, m.version, m.echo, m.samples, m.weight, m.reference)
    if min(numbers) < _LOWEST or max(numbers) > _HIGHEST:
        raise ValueError(f"a header holds signed 64-bit integers, got {numbers} in a message of kind {m.kind}")
    if m.body is not None:
        _check_body(m)


def check_peer(me: int, world: int, peer: int, *, serves: bool = False) -> None:
    """Raise `ValueError` unless `peer` is another member, or this one where it `serves`."""
    if not 0 <= peer < world:
        raise ValueError(f"`peer` must be a rank from 0 to {world - 1}, got {peer}")
    if peer == me and not serves:
        raise ValueError(f"member {me} posted to itself: there is no link from a member to itself, unless it serves")


def check_kind(kind: int) -> None:
    """Raise `ValueError` unless `kind` has a slot."""
    if not 0 < kind < KINDS:
        raise ValueError(f"`kind` must be from 1 to {KINDS - 1}, got {kind}")


def check_amount(amount: int) -> None:
    """Raise `ValueError` unless so many tickets can be drawn."""
    if amount < 1:
        raise ValueError(f"`amount` must be at least 1, got {amount}")


def check_note(note: bytes) -> None:
    """Raise `ValueError` if a note is too long to travel with a heartbeat."""
    if len(note) > NOTE_BYTES:
        raise ValueError(f"a note has at most {NOTE_BYTES} bytes, got {len(note)}")


def _check_body(message: Message) -> None:
    body = message.body
    if body is None:
        return
    if message.kind == MARKER:
        raise ValueError("a marker has no body: post the body as a message of another kind before it")
    if body.dim() != 1 or not body.is_contiguous():
        shape, strides = tuple(body.shape), body.stride()
        raise ValueError(f"a body must be one flat, contiguous tensor, got shape {shape}, strides {strides}")
    if body.dtype not in _ALLOWED:
        raise ValueError(f"a body of {body.dtype} cannot travel; the dtypes that can are {', '.join(map(str, DTYPES))}")
