"""Several shards' images as one vector of bytes; and other shards made of them, where a run goes on with other members.

    | length, number | image | length, number | image |            recut:  |  0  |  1  |  2  |   -->   |   0   |   1   |

What the outer rule remembers is cut anew, element for element. The books (who pushed what, and how fast) are those of
members that are no more: they begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lightning_async.algorithms.shard_server import ShardServer, version_of
from lightning_async.algorithms.shards import Shard, cut


def bundle(images: Mapping[int, Tensor]) -> Tensor:
    """One vector of bytes, by the shards' numbers."""
    parts = []
    for number, image in sorted(images.items()):
        parts += [torch.tensor([image.numel(), number]).view(torch.uint8), image]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def unbundle(body: Tensor) -> dict[int, Tensor]:
    """The images in it."""
    images, begin = {}, 0
    while begin < body.numel():
        length, number = body[begin : begin + 16].clone().view(torch.int64).tolist()
        images[number] = body[begin + 16 : begin + 16 + length]
        begin += 16 + length
    return images


def gathered(bundles: Iterable[Tensor]) -> dict[int, Tensor]:
    """The images of all members of a world, of each shard the newest one.

    One is missing where its owner died at the meeting of the save, or its file cannot be read.
    """
    images: dict[int, Tensor] = {}
    for number, image in (pair for body in bundles for pair in unbundle(body).items()):
        if number not in images or version_of(image) > version_of(images[number]):
            images[number] = image
    return images


def recut(
    old: Mapping[int, Tensor],
    among: int,
    weights: Tensor,
    shards: Iterable[Shard],
    new: Callable[[Tensor], ShardServer],
    *,
    count: Callable[[Iterable[int]], int] = lambda counts: 0,
) -> dict[int, Tensor]:
    """Images of these shards, made of those of all members of another world.

    Args:
        old: What those members served; of a shard that is missing nothing is remembered.
        among: How many shards they had.
        weights: The consensus.
        shards: The shards that are wanted.
        new: Makes a shard's server of its weights.
        count: What becomes of what else the outer rules of those remember that a shard is made of, given their counts:
            they begin anew.
    """
    before, servers = cut(weights.numel(), among), []
    for shard in before:
        server = new(torch.zeros_like(weights[shard.part]))
        if shard.number in old:
            server.become(old[shard.number])
        servers.append(server)
    whole = [torch.cat(parts) for parts in zip(*(server.outer.tensors for server in servers), strict=True)]
    images = {}
    for shard in shards:
        server = new(weights[shard.part].clone())
        server.version = max(one.version for one in servers)
        server.bases = dict.fromkeys(server.members, server.version)
        parts = [k for k, one in enumerate(before) if one.begin < shard.end and shard.begin < one.end]
        server.outer.count = count([servers[k].outer.count for k in parts])
        for mine, all_of_it in zip(server.outer.tensors, whole, strict=True):
            mine.copy_(all_of_it[shard.part])
        images[shard.number] = server.image()
    return images
