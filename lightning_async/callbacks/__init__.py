"""Callbacks: glue to Lightning. They read arrivals and make faults, and import no strategy."""

from lightning_async.callbacks.adaptive_shrink import AdaptiveShrink
from lightning_async.callbacks.delay_stats import DelayStats
from lightning_async.callbacks.sign_gradients import SignGradients
from lightning_async.callbacks.speed_faults import SpeedFaults
from lightning_async.callbacks.spread_stats import SpreadStats
from lightning_async.callbacks.traffic_stats import TrafficStats

__all__ = ["AdaptiveShrink", "DelayStats", "SignGradients", "SpeedFaults", "SpreadStats", "TrafficStats"]
