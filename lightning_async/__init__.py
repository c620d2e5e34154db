"""Asynchronous and communication-saving training for PyTorch Lightning: nobody waits for the slowest.

Importing this package registers the strategies' names: `Trainer(strategy="gossip_ring")`.
"""

from lightning_async.arrival import Arrival, Fate
from lightning_async.callbacks import AdaptiveShrink, DelayStats, SpeedFaults, SpreadStats, TrafficStats
from lightning_async.data.balance import Incremental
from lightning_async.strategies import (
    AsyncGlobalStrategy,
    AsyncStrategy,
    CyclicDelayStrategy,
    DelayedPipelineStrategy,
    GossipRingStrategy,
    LazySignStrategy,
    UnevenNodesEnvironment,
    UnevenSLURMEnvironment,
    register,
)
from lightning_async.version import __version__

register()

__all__ = [
    "AdaptiveShrink",
    "Arrival",
    "AsyncGlobalStrategy",
    "AsyncStrategy",
    "CyclicDelayStrategy",
    "DelayStats",
    "DelayedPipelineStrategy",
    "Fate",
    "GossipRingStrategy",
    "Incremental",
    "LazySignStrategy",
    "SpeedFaults",
    "SpreadStats",
    "TrafficStats",
    "UnevenNodesEnvironment",
    "UnevenSLURMEnvironment",
    "__version__",
]
