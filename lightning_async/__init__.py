"""Asynchronous and communication-saving training for PyTorch Lightning: nobody waits for the slowest.

Importing this package registers the strategies' names: `Trainer(strategy="gossip_ring")`.
"""

from lightning_async.arrival import Arrival, Fate
from lightning_async.callbacks import AdaptiveShrink, DelayStats, SpeedFaults, SpreadStats, TrafficStats
from lightning_async.strategies import AsyncStrategy, GossipRingStrategy, register
from lightning_async.version import __version__

register()

__all__ = [
    "AdaptiveShrink",
    "Arrival",
    "AsyncStrategy",
    "DelayStats",
    "Fate",
    "GossipRingStrategy",
    "SpeedFaults",
    "SpreadStats",
    "TrafficStats",
    "__version__",
]
