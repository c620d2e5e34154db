"""Asynchronous and communication-saving training for PyTorch Lightning: nobody waits for the slowest.

Importing this package registers the strategies' names: `Trainer(strategy="gossip_ring")`.
"""

from lightning_async.arrival import Arrival, Fate
from lightning_async.callbacks import SpeedFaults
from lightning_async.strategies import AsyncStrategy, DelayedPipelineStrategy, GossipRingStrategy, register
from lightning_async.version import __version__

register()

__all__ = [
    "Arrival",
    "AsyncStrategy",
    "DelayedPipelineStrategy",
    "Fate",
    "GossipRingStrategy",
    "SpeedFaults",
    "__version__",
]
