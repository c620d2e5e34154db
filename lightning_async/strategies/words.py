"""Small things that ranks tell each other at meetings: numbers, decisions, names. No pickles: JSON and raw tensors.

Every member reads the same words and combines them in the order of ranks, so all get the same bits.
"""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

CHUNK = 65536  # elements; a large temporary costs its page faults
SMALL = 16384  # bytes; up to here a tensor is a word, beyond it travels by mail


def broadcast(rounds: Rounds, obj: Any, source: int) -> Wait[Any]:
    """The source's object."""
    mine = rounds.carrier.me == source
    words = yield from rounds.agree(_encode(obj) if mine else b"", what=f"broadcast from {source}")
    if source not in words:
        raise RuntimeError(f"rank {source} is gone: what it would have broadcast is lost")
    return obj if mine else _decode(words[source])


def decide(rounds: Rounds, decision: bool, all_of_them: bool) -> Wait[bool]:
    """Whether all (or any) say yes."""
    words = yield from rounds.agree(b"1" if decision else b"0", what=f"decide by {'all' if all_of_them else 'any'}")
    said = [word == b"1" for word in words.values()]
    return all(said) if all_of_them else any(said)


def reduce(rounds: Rounds, tensor: Tensor, how: Any) -> Wait[Tensor]:
    """The tensors of all members combined; a new tensor of the same dtype and device."""
    name = str(how if how is not None else "sum").lower().rsplit(".", 1)[-1]
    stacked = yield from gather(rounds, tensor, what=f"reduce {name}")
    wide = stacked.double() if stacked.is_floating_point() else stacked
    if name == "sum":
        combined = wide.sum(0)
    elif name in ("mean", "avg"):
        combined = wide.double().mean(0)
    elif name in ("max", "min"):
        combined = wide.amax(0) if name == "max" else wide.amin(0)
    else:
        raise MisconfigurationException(f"`reduce_op` must be 'sum', 'mean', 'max' or 'min', got {how!r}")
    return combined.to(tensor.dtype)


def gather(rounds: Rounds, tensor: Tensor, *, what: str = "gather") -> Wait[Tensor]:
    """One tensor of each member, stacked; all must have the same shape."""
    parts = yield from gather_uneven(rounds, tensor, what=what)
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"the ranks brought tensors of different shapes: {[tuple(part.shape) for part in parts]}")
    return torch.stack(parts)


def gather_uneven(rounds: Rounds, tensor: Tensor, *, what: str = "gather") -> Wait[list[Tensor]]:
    """One tensor of each member, in the order of ranks; shapes may differ."""
    flat = tensor.detach().cpu().contiguous()
    head = {"shape": list(flat.shape), "dtype": str(flat.dtype).removeprefix("torch.")}
    small = flat.numel() * flat.element_size() <= SMALL
    if small:
        head["data"] = base64.b64encode(flat.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
    words = yield from rounds.agree(json.dumps(head).encode(), what=what)
    heads = {rank: json.loads(word) for rank, word in words.items()}
    if all("data" in h for h in heads.values()):
        parts = [_tensor(base64.b64decode(h["data"]), h) for h in heads.values()]
    else:
        raw, members = yield from rounds.exchange(flat.reshape(-1).view(torch.uint8), "gather")
        parts = [_tensor(part.numpy().tobytes(), heads[rank]) for rank, part in zip(members, raw, strict=True)]
    return [part.to(tensor.device) for part in parts]


def mean_square(one: Tensor, other: Tensor) -> float:
    """The mean over coordinates of the squared difference, in parts: a large temporary costs its page faults."""
    pairs = zip(torch.split(one, CHUNK), torch.split(other, CHUNK), strict=True)
    return sum(float((a - b).double().square().sum()) for a, b in pairs) / one.numel()


def _tensor(data: bytes, head: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, head["dtype"])
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(head["shape"])


def _encode(obj: Any) -> bytes:
    try:
        return json.dumps(os.fspath(obj) if isinstance(obj, os.PathLike) else obj).encode()
    except TypeError:
        raise MisconfigurationException(
            f"`broadcast` carries text, numbers, None, lists and dictionaries of these, got {type(obj).__name__}; "
            "send tensors with `reduce` or `all_gather`"
        ) from None


def _decode(word: bytes) -> Any:
    return json.loads(word)
