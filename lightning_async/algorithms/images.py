"""Several shards' images as one vector of bytes; and other shards made of them, where a run goes on with other members.

    | length, number | image | length, number | image |            recut:  |  0  |  1  |  2  |   -->   |   0   |   1   |

What the outer rule remembers is cut anew, element for element. The books (who pushed what, and how fast) are those of
members that are no more: they begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lightning_async.algorithms.shard_server import ShardServer
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
    """The images of all members of a world; none where one of them is missing."""
    images = {number: image for body in bundles for number, image in unbundle(body).items()}
    return images if sorted(images) == list(range(len(images))) else {}


def recut(
    old: Mapping[int, Tensor],
    weights: Tensor,
    shards: Iterable[Shard],
    new: Callable[[Tensor], ShardServer],
    *,
    count: Callable[[Iterable[int]], int] = lambda counts: 0,
) -> dict[int, Tensor]:
    """Images of these shards, made of those of all members of another world.

    Args:
        old: All that those members served.
        weights: The consensus.
        shards: The shards that are wanted.
        new: Makes a shard's server of its weights.
        count: What becomes of what else the outer rules remember, given all their counts: they begin anew.
    """
    servers = []
    for shard in cut(weights.numel(), len(old)):
        server = new(torch.zeros_like(weights[shard.part]))
        server.become(old[shard.number])
        servers.append(server)
    whole = [torch.cat(parts) for parts in zip(*(server.outer.tensors for server in servers), strict=True)]
    images = {}
    for shard in shards:
        server = new(weights[shard.part].clone())
        server.version = max(one.version for one in servers)
        server.bases = dict.fromkeys(server.members, server.version)
        server.outer.count = count([one.outer.count for one in servers])
        for mine, all_of_it in zip(server.outer.tensors, whole, strict=True):
            mine.copy_(all_of_it[shard.part])
        images[shard.number] = server.image()
    return images
