"""The default group, which Lightning makes at the start, is made anew where torchrun starts the ranks of a run anew.

Lightning leaves a group alone that is there already. Where torchrun's own store is used, ours is: its part of the store
belongs to this attempt alone (`transport/attempts.py`). Everywhere else each run has a store of its own.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not exported by name

from lightning_async.transport.attempts import fresh


def join(environment: ClusterEnvironment | None, device: torch.device, backend: str | None, timeout: timedelta) -> None:
    """Make the group of this attempt. All ranks call it."""
    if environment is None or dist.is_initialized() or not _of_torchrun() or environment.world_size() == 1:
        return
    backend = backend or dist.Backend.default_device_backend_map.get(device.type, "gloo")
    me, world = environment.global_rank(), environment.world_size()
    store = TCPStore(environment.main_address, environment.main_port, is_master=False, timeout=timeout)
    dist.init_process_group(
        backend,
        store=fresh(store, me, world, timeout),
        rank=me,
        world_size=world,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    if backend == "nccl":
        atexit.register(_end)


def _of_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
