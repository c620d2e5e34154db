"""Callbacks: glue to Lightning. They read arrivals and make faults, and import no strategy."""

from lightning_async.callbacks.sign_gradients import SignGradients
from lightning_async.callbacks.speed_faults import SpeedFaults

__all__ = ["SignGradients", "SpeedFaults"]
