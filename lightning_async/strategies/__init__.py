"""The strategies of this package, and their names in Lightning's registry: importing `lightning_async` enters them."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_async.strategies.async_global import AsyncGlobalStrategy
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.cyclic_delay import CyclicDelayStrategy
from lightning_async.strategies.delayed_pipeline import DelayedPipelineStrategy
from lightning_async.strategies.environments import UnevenNodesEnvironment, UnevenSLURMEnvironment
from lightning_async.strategies.gossip_ring import GossipRingStrategy
from lightning_async.strategies.lazy_sign import LazySignStrategy

STRATEGIES: tuple[type[AsyncStrategy], ...] = (
    GossipRingStrategy,
    AsyncGlobalStrategy,
    LazySignStrategy,
    CyclicDelayStrategy,
)
"""Those whose ranks have replicas."""
START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register() -> None:
    """Enter each name in Lightning's registry, with the endings that `ddp` has there. Idempotent."""
    all_of_them: tuple[type[AsyncStrategy | DelayedPipelineStrategy], ...] = (*STRATEGIES, DelayedPipelineStrategy)
    for strategy in all_of_them:
        for suffix, method in START_METHODS.items():
            name = strategy.name + suffix
            if name not in StrategyRegistry:
                summary = (strategy.__doc__ or "").splitlines()[0]
                StrategyRegistry.register(name, strategy, f"{summary} ({method})", start_method=method)


__all__ = [
    "AsyncGlobalStrategy",
    "AsyncStrategy",
    "CyclicDelayStrategy",
    "DelayedPipelineStrategy",
    "GossipRingStrategy",
    "LazySignStrategy",
    "UnevenNodesEnvironment",
    "UnevenSLURMEnvironment",
    "register",
]
