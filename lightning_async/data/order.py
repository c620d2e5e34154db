"""The order of an epoch: position -> what the data set is asked for; the same on every rank, and checked to be.

    shuffle=True    a permutation from (seed, epoch), as DistributedSampler makes it
    no shuffle      0, 1, 2, ...
    own sampler     its list, made once an epoch on every rank; what it takes from torch's global random state is seeded
                    from (seed, epoch) first, so that it is equal everywhere without the user's doing
    DistributedSampler (the user's, or injected by Lightning): the whole of what it would have split

The `digest` is compared between the members when an epoch opens. An order of many samples is one tensor or one range:
what a batch asks for is taken out of it (`pick`), and no list of all is made.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

Items = Sequence[Any] | torch.Tensor
"""What the positions stand for, in their order."""
CHUNK = 1 << 20


class Order:
    """The order of one epoch at a time. Lightning calls `set_epoch` on it, as on any sampler.

    Args:
        source: The user's sampler, or batch sampler; its items are what the positions stand for.
        seed: The seed of the shuffling, the same on every rank.
        epoch: The first epoch.
    """

    def __init__(self, source: Iterable[Any], *, seed: int = 0, epoch: int = 0) -> None:
        self._source = source
        self._seed = seed
        self._kept: tuple[Items, int] | None = None
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Turn to `epoch`; its list is made when it is first asked for."""
        if epoch != self.epoch:
            self.epoch, self._kept = epoch, None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def items(self) -> Items:
        """What the positions of this epoch stand for."""
        return self._made()[0]

    @property
    def digest(self) -> int:
        """A fingerprint of the order."""
        return self._made()[1]

    def _made(self) -> tuple[Items, int]:
        if self._kept is None:
            items = self._listed()
            self._kept = items, fingerprint(items)
        return self._kept

    def _listed(self) -> Items:
        source, seed = self._source, self._seed + self.epoch
        if type(source) is SequentialSampler:
            return range(len(source))
        if type(source) is RandomSampler and not source.replacement and source.num_samples == len(source.data_source):
            return shuffled(len(source), seed)
        if isinstance(source, DistributedSampler):
            source = unsplit(source)
            if type(source) is DistributedSampler:
                n = source.total_size
                return shuffled(n, source.seed + self.epoch) if source.shuffle else range(n)
        if callable(set_epoch := getattr(source, "set_epoch", None)):
            set_epoch(self.epoch)
        with seeded(seed):
            return list(source)


def unsplit(sampler: DistributedSampler[Any]) -> DistributedSampler[Any]:
    """The sampler as it would be with one replica."""
    if not isinstance(sampler.dataset, Sized):
        raise ValueError("The data set of the DistributedSampler has no length; give the loader a sampler of its own")
    whole = copy.copy(sampler)
    whole.num_replicas, whole.rank = 1, 0
    whole.num_samples = whole.total_size = len(sampler.dataset)
    return whole


def shuffled(n: int, seed: int) -> torch.Tensor:
    """The permutation that a DistributedSampler makes of n samples from this seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def pick(items: Items, positions: list[int]) -> list[Any]:
    """What these positions stand for."""
    if isinstance(items, torch.Tensor):
        picked: list[Any] = items[positions].tolist()
        return picked
    return [items[p] for p in positions]


def fingerprint(items: Items) -> int:
    """A number that differs, almost surely, between two orders."""
    if not isinstance(items, (torch.Tensor, range)) and not all(isinstance(item, int) for item in items):
        return zlib.crc32(repr(list(items)).encode())
    digest = 0
    for begin in range(0, len(items), CHUNK):
        digest = zlib.crc32(_numbers(items[begin : begin + CHUNK]).numpy().tobytes(), digest)
    return digest


def _numbers(items: Items) -> torch.Tensor:
    if isinstance(items, range):
        return torch.arange(items.start, items.stop, items.step)
    return torch.as_tensor(items, dtype=torch.int64)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global CPU random state is seeded inside, and as before outside. (`manual_seed` would seed GPUs too.)"""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
