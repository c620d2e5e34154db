"""The whole from its parts: what each rank brings (names, numbers, tensors) is there on every rank afterwards.

    rank 0   {"head.weight": ..}  --+
    rank 1   {"net.1.weight": ..} --+--> [ {...}, {...}, {...} ]  on all, in the order of ranks

At the end of a fit all take the whole; a checkpoint is collected by rank 0 alone, so no other rank has to hold it.

No pickles: JSON for the structure, raw bytes for the tensors, in one flat tensor for each rank.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from lightning_async.strategies import words
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

_TENSOR = "tensor"
_HEAD = 8
_ALIGNED = 16


def gather(rounds: Rounds, tree: Any) -> Wait[list[Any]]:
    """What each rank brought, in the order of ranks."""
    parts, _ = yield from rounds.exchange(pack(tree), "gather")
    return [unpack(part) for part in parts]


def collect(rounds: Rounds, tree: Any, at: int) -> Wait[list[Any]]:
    """What each rank brought, in the order of ranks, on one of them; on the others nothing."""
    parts, _ = yield from rounds.collect(pack(tree), at)
    return [unpack(part) for part in parts]


def broadcast(rounds: Rounds, tree: Any, source: int) -> Wait[Any]:
    """What the source brought; the others bring nothing."""
    mine = rounds.carrier.me == source
    size = yield from words.broadcast(rounds, len(pack(tree)) if mine else 0, source)
    body = pack(tree) if mine else torch.zeros(size, dtype=torch.uint8)
    body = yield from rounds.broadcast(body, source)
    return unpack(body)


def pack(tree: Any) -> Tensor:
    """Lists, dictionaries by text, numbers, text, None and tensors, as one flat tensor of bytes."""
    tensors: list[Tensor] = []
    head = json.dumps(_strip(tree, tensors)).encode()
    head += b" " * (-(len(head) + _HEAD) % _ALIGNED)
    length = torch.tensor([len(head)], dtype=torch.int64).view(torch.uint8)
    pieces = [length, torch.frombuffer(bytearray(head), dtype=torch.uint8)]
    for tensor in tensors:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        pieces += [raw, torch.zeros(-len(raw) % _ALIGNED, dtype=torch.uint8)]
    return torch.cat(pieces)


def unpack(body: Tensor) -> Any:
    """The tree again; its tensors are copies."""
    end = _HEAD + int(body[:_HEAD].clone().view(torch.int64))
    return _fill(json.loads(body[_HEAD:end].numpy().tobytes()), body[end:])


def _strip(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        at = sum(_padded(t) for t in tensors)
        tensors.append(tree)
        return {_TENSOR: [at, list(tree.shape), str(tree.dtype).removeprefix("torch.")]}
    if isinstance(tree, dict):
        return {key: _strip(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_strip(value, tensors) for value in tree]
    return tree


def _fill(tree: Any, body: Tensor) -> Any:
    if isinstance(tree, dict) and tree.keys() == {_TENSOR}:
        at, shape, name = tree[_TENSOR]
        dtype = getattr(torch, name)
        size = math.prod(shape) * dtype.itemsize
        return body[at : at + size].clone().view(dtype).view(shape)
    if isinstance(tree, dict):
        return {key: _fill(value, body) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_fill(value, body) for value in tree]
    return tree


def _padded(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return size + -size % _ALIGNED
