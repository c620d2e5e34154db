"""Where a state dict holds what is trained, whatever a hook calls it: there the consensus of a cut will stand.

    state["net.weight"]        is a parameter, or a part of one (by its memory)         that part of the consensus
    state["model.qkv"]         a hook renamed it, or took rows of it                    the same
    state["net.weight"]        a copy: `.cpu()`, `.half()`; equal in its own dtype,     the consensus in its dtype
                               under its own name
    state["average.weight"]    other numbers, in the place of what is trained, or of    refused
                               a part of it; a container of numbers in its place

At a meeting the module is the consensus, and hooks read it there. A cut's is known only when all have trained on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
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
    found = _by_memory([(p, offset) for p, offset in replica.places], state)
    others = [*(p for p in named.values() if id(p) not in at), *module.buffers()]
    known = {*_by_memory([(tensor, 0) for tensor in others], state), *(n for n, _ in module.named_buffers())}
    strange = []
    for entry, value in state.items():
        if entry in found or entry in known or not _has_numbers(value):
            continue
        p = named.get(entry)
        if p is None or not isinstance(value, Tensor):
            strange.append(entry)
        elif id(p) in at:
            if value.shape != p.shape or not _is_copy(value.detach(), p.detach()):
                raise _other(entry, name)
            found[entry] = at[id(p)], _like(value)
    if strange and not _are_whole(replica, found):  # else these are beside the weights
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
    return found | _by_memory(pairs, state)


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


def _has_numbers(value: object) -> bool:
    """Whether these are numbers that a weight may have become, or a container of some."""
    found: list[bool] = []
    apply_to_collection(value, Tensor, lambda tensor: found.append(tensor.is_floating_point()), allow_frozen=True)
    return any(found)


def _is_copy(value: Tensor, p: Tensor) -> bool:
    """Whether it is the parameter in another dtype, or elsewhere: what that rounds off tells of nothing else."""
    mine = p.to(value)
    same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(value, mine) or same(value.double(), mine.double())


def _are_whole(replica: Replica, found: Places) -> bool:
    """Whether each element of what is trained stands somewhere."""
    starts = [offset for _, offset in replica.places]
    entries: list[list[tuple[int, Tensor]]] = [[] for _ in starts]
    for at, like in found.values():
        i = bisect_right(starts, at) - 1
        entries[i].append((at - starts[i], like))
    for (p, _), mine in zip(replica.places, entries, strict=True):
        if any(like.is_contiguous() and like.numel() == p.numel() for _, like in mine):
            continue
        stands, elements = torch.zeros(p.numel(), dtype=torch.bool), torch.arange(p.numel())
        for at, like in mine:
            stands[elements.as_strided(like.shape, like.stride(), at).reshape(-1)] = True
        if not stands.all():
            return False
    return True


def _by_memory(tensors: Iterable[tuple[Tensor, int]], state: Mapping[str, Any]) -> Places:
    """The entries that lie in the memory of these tensors."""
    starts = sorted((t.data_ptr(), t.dtype, t.numel(), at) for t, at in tensors if t.numel() and t.is_contiguous())
    addresses = [start for start, *_ in starts]
    found: Places = {}
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
    return found


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
