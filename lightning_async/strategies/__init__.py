"""Lightning strategies: one thin file each. Importing `lightning_async` registers their names."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.gossip_ring import GossipRingStrategy
from lightning_async.strategies.lazy_sign import LazySignStrategy

STRATEGIES: tuple[type[AsyncStrategy], ...] = (GossipRingStrategy, LazySignStrategy)


def register() -> None:
    """Enter `name`, `name_spawn` and `name_fork` in Lightning's registry. Idempotent."""
    for strategy in STRATEGIES:
        for suffix, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
            name = strategy.name + suffix
            if name not in StrategyRegistry:
                summary = (strategy.__doc__ or "").splitlines()[0]
                StrategyRegistry.register(name, strategy, f"{summary} ({method})", start_method=method)


__all__ = ["AsyncStrategy", "GossipRingStrategy", "LazySignStrategy", "register"]
