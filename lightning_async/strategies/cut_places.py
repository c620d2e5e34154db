"""Where a state dict holds what is trained, whatever a hook calls it: there the consensus of a cut will stand.

    state["net.weight"]        is a parameter, or a part of one (by its memory)         that part of the consensus
    state["model.qkv"]         a hook renamed it, or took rows of it                    the same
    state["net.weight"]        a copy: `.cpu()`, `.half()`; equal, under its own name   the consensus in its dtype
    state["average.weight"]    other numbers, in the place of what is trained           refused

At a meeting the module is the consensus, and hooks read it there. A cut's is known only when all have trained on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_async.replica import Replica

Places = dict[str, tuple[int, Tensor]]
"""By its name in a state dict: from which element of a flat vector on it lies there, and what it is like."""


def places_of(module: nn.Module, replica: Replica, state: Mapping[str, Any], name: str) -> Places:
    """Of the trained parameters; a MisconfigurationException where the consensus of some cannot be put in their place.

    Args:
        module: What is trained.
        replica: Its weights as one vector.
        state: A state dict of the module, with whatever hooks did to it.
        name: The strategy's.
    """
    at = {id(p): offset for p, offset in replica.places}
    named = dict(module.named_parameters(remove_duplicate=False))
    found, seen = _by_memory([(p, offset) for p, offset in replica.places], state)
    others = [*(p for p in named.values() if id(p) not in at), *module.buffers()]
    known = {*_by_memory([(tensor, 0) for tensor in others], state)[0], *(n for n, _ in module.named_buffers())}
    strange = []
    for entry, value in state.items():
        if entry in found or entry in known or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        p = named.get(entry)
        if p is None:
            strange.append(entry)
        elif id(p) in at:
            if value.shape != p.shape or not torch.equal(value.detach().to(p), p.detach()):
                raise _other(entry, name)
            found[entry], seen = (at[id(p)], _like(value)), seen | {at[id(p)]}
    if strange and seen < set(at.values()):  # else these are beside the weights
        raise _other(strange[0], name)
    return found


def averaged_places(buffers: Mapping[str, Tensor], module: nn.Module, state: Mapping[str, Any]) -> Places:
    """Of the buffers with these names, which lie end to end."""
    named, pairs, found, at = dict(module.named_buffers()), [], {}, 0
    for name, like in buffers.items():
        pairs.append((named[name], at))
        if isinstance(state.get(name), Tensor) and state[name].shape == like.shape:
            found[name] = at, _like(state[name])
        at += like.numel()
    return found | _by_memory(pairs, state)[0]


def shown(vector: Tensor, places: Places) -> dict[str, Tensor]:
    """What lies in this vector; what is one there, is one."""
    made: dict[Any, Tensor] = {}
    found = {}
    for name, (at, like) in places.items():
        what = at, like.shape, like.stride(), like.dtype
        if what not in made:
            part = vector[at:]  # it begins there, and `as_strided` counts from the beginning of the memory
            part = part.as_strided(like.shape, like.stride(), part.storage_offset())
            made[what] = part.to(like.dtype, copy=True)
        found[name] = made[what]
    return found


def _by_memory(tensors: Iterable[tuple[Tensor, int]], state: Mapping[str, Any]) -> tuple[Places, set[int]]:
    """The entries that lie in the memory of these tensors; and the places of those in which one lies."""
    starts = sorted((t.data_ptr(), t.dtype, t.numel(), at) for t, at in tensors if t.numel() and t.is_contiguous())
    addresses = [start for start, *_ in starts]
    found: Places = {}
    seen = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
            continue
        if (i := bisect_right(addresses, value.data_ptr()) - 1) < 0:
            continue
        start, dtype, numel, at = starts[i]
        first = (value.data_ptr() - start) // dtype.itemsize
        last = first + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if value.dtype == dtype and last < numel:
            found[name] = at + first, _like(value, strides=True)
            seen.add(at)
    return found, seen


def _like(value: Tensor, *, strides: bool = False) -> Tensor:
    """It without its numbers; contiguous, but for `strides`."""
    stride = value.stride() if strides else [math.prod(value.shape[i + 1 :]) for i in range(value.dim())]
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device="meta")


def _other(entry: str, name: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"strategy={name!r}: `saves='cut'`: a hook (`on_save_checkpoint`, or one of `state_dict`) makes `{entry}` of "
        "what is trained, and a cut cannot put the consensus in its place: it is known only later. Rename without a "
        "copy (`state[new] = state.pop(old)`), or save at meetings"
    )
