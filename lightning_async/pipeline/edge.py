"""An edge carries one tensor a batch from a stage to its neighbour: in order, in a queue of fixed depth.

    send 1, 2, 3, ...  -->  slot 1 | slot 2 | slot 3 | slot 0  -->  receive 1, 2, 3, ...

Each place in the queue is a kind of message of its own, so a slot is free again when its tensor was received. Whoever
sends into a full queue waits, and so does whoever receives from an empty one. Nobody waits for a common tick.

The header says the shape (at most six numbers), the number of the batch, the stamp of the data that it came from, and
a number that stages tell each other (`norms`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Mail, Message, Wait

DEPTH = 4
"""Neighbours are at most three batches apart (the gradients see to that); a depth of one more never fills."""
ACTIVATIONS = range(FIRST_FREE_KIND, FIRST_FREE_KIND + DEPTH)
GRADIENTS = range(FIRST_FREE_KIND + DEPTH, FIRST_FREE_KIND + 2 * DEPTH)
DIMENSIONS = 6
Wire = Literal["as_is", "bf16"]
_HALF = 32
_MOST = 3e38  # what float32 can hold


class LostStageError(RuntimeError):
    """A neighbour died, or ended before this stage did; the sentence says which and what to do."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What came: the tensor, the stamp of its data, an upper bound on its age, and a number that was told with it."""

    tensor: Tensor
    stamp: int
    seconds: float
    told: float = 0.0


class Sender:
    """The near end of an edge."""

    def __init__(self, mail: Mail, peer: int, kinds: Sequence[int], *, wire: Wire = "as_is") -> None:
        self._mail, self._peer, self._kinds, self._wire = mail, peer, kinds, wire
        self._count = 0

    def send(self, batch: int, tensor: Tensor, stamp: int = 0, told: float = 0.0) -> Wait[None]:
        """Put it into the queue; it may be changed afterwards. `stamp`: 32 bits. `told`: not negative."""
        self._count += 1
        body = outgoing(tensor, self._wire).detach().cpu().contiguous()
        first, second, third = _pack(body.shape)
        message = Message(
            self._kinds[self._count % len(self._kinds)],
            body.view(-1),
            step=batch,
            version=first,
            samples=second,
            weight=third,
            reference=stamp | _bits(told) << _HALF,
        )
        while not self._mail.post(self._peer, message):
            yield from present(self._mail, self._peer)
            yield f"rank {self._peer} to take batch {batch}"


class Receiver:
    """The far end of an edge.

    Args:
        mail: This member's mail.
        peer: Who sends.
        kinds: The places of the queue.
        ended: The last batch of the peer if it said that there are no more for now, else None.
        wire: As at the near end.
        device: Where the tensors are wanted.
    """

    def __init__(
        self,
        mail: Mail,
        peer: int,
        kinds: Sequence[int],
        *,
        ended: Callable[[], int | None],
        wire: Wire = "as_is",
        device: torch.device | None = None,
    ) -> None:
        self._mail, self._peer, self._kinds, self._ended, self._wire = mail, peer, kinds, ended, wire
        self._device = device or torch.device("cpu")
        self._count = 0

    def receive(self, batch: int) -> Wait[Parcel]:
        """The next tensor, which must be that of this batch."""
        self._count += 1
        kind = self._kinds[self._count % len(self._kinds)]
        while not (letters := self._mail.take(kind)):
            if (last := self._ended()) is not None:
                if letters := self._mail.take(kind):  # both came since the first look: it was sent before the end
                    break
                raise LostStageError(
                    f"rank {self._mail.me} waits for batch {batch}, but rank {self._peer} has ended after batch {last}"
                    ": all stages must be given the same batches, and stop, save and validate after the same ones"
                )
            yield from present(self._mail, self._peer)
            yield f"batch {batch} from rank {self._peer}"
        return self._open(letters[0], batch)

    def _open(self, letter: Letter, batch: int) -> Parcel:
        message = letter.message
        if message.step != batch or message.body is None:
            raise LostStageError(f"rank {self._peer} sent batch {message.step} where batch {batch} was due")
        shape = _unpack((message.version, message.samples, message.weight))
        tensor = incoming(message.body.clone(), self._wire).view(shape).to(self._device)
        self._mail.folded(letter)
        stamp, told = message.reference & (1 << _HALF) - 1, _number(message.reference >> _HALF)
        return Parcel(tensor, stamp, letter.seconds, told)


def outgoing(tensor: Tensor, wire: Wire) -> Tensor:
    """The tensor as it travels."""
    return tensor.to(torch.bfloat16) if wire == "bf16" and tensor.dtype == torch.float32 else tensor


def incoming(tensor: Tensor, wire: Wire) -> Tensor:
    """The tensor as the receiver works with it."""
    return tensor.to(torch.float32) if wire == "bf16" and tensor.dtype == torch.bfloat16 else tensor


def present(mail: Mail, peer: int) -> Wait[None]:
    """Raise if the peer is gone, after one more look at the run's flags: who stopped may have said why."""
    if peer not in mail.members():
        yield f"word from rank {peer}"
        raise LostStageError(
            f"rank {peer} died, and its stage with it: the run cannot go on without its layers. Start it again from "
            "the last checkpoint"
        )


def _pack(shape: Sequence[int]) -> tuple[int, int, int]:
    """Two lengths in each number, one more than they are, so that 0 is none."""
    if len(shape) > DIMENSIONS:
        raise ValueError(f"what goes from stage to stage has at most {DIMENSIONS} dimensions, got {tuple(shape)}")
    lengths = [length + 1 for length in shape] + [0] * (DIMENSIONS - len(shape))
    pairs = zip(lengths[::2], lengths[1::2], strict=True)
    first, second, third = (one | other << _HALF for one, other in pairs)
    return first, second, third


def _bits(number: float) -> int:
    """As float32; without its sign bit, so that it fits above a stamp."""
    bits: int = struct.unpack("<i", struct.pack("<f", min(number, _MOST)))[0]
    return bits


def _number(bits: int) -> float:
    number: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return number


def _unpack(numbers: Sequence[int]) -> list[int]:
    halves = [half for number in numbers for half in (number & (1 << _HALF) - 1, number >> _HALF)]
    return [half - 1 for half in halves if half]
