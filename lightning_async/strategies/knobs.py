"""What the knobs that strategies share may be, said once: a wrong value is refused where it is given, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
AtMeeting = Literal["adopt", "keep"]
Saves = Literal["meeting", "cut"]


def check_word(knob: str, value: object, words: Sequence[str]) -> None:
    """Raise for what is none of these words."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"`{knob}` must be one of {', '.join(map(repr, words))}, got {value!r}")


def check_saves(saves: object, why_no_cut: str) -> None:
    """Raise for what is no way to save by steps; for a cut too, where the method has none, for this reason."""
    check_word("saves", saves, get_args(Saves))
    if saves == "cut":
        raise ValueError(
            f"`saves='cut'` is for strategy='gossip_ring': {why_no_cut}. Leave it out, and all meet for a checkpoint "
            "by steps; or take strategy='gossip_ring'"
        )


def check_seconds(knob: str, value: object, *, also_0: bool = False) -> None:
    """Raise for what is no time; one that is not a number would bound no wait."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (value > 0 or (also_0 and value == 0)):
        return
    least = "of at least 0" if also_0 else "above 0"
    raise ValueError(f"`{knob}` must be a number of seconds {least}, got {value!r}")


def check_text(knob: str, value: object, what: str) -> None:
    """Raise for what is neither None nor a text that names something."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"`{knob}` must be {what}, or None, got {value!r}")


def check_count(knob: str, value: object) -> None:
    """Raise for what is no integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{knob}` must be an integer of at least 1, got {value!r}")


def check_part(knob: str, value: object) -> None:
    """Raise for what is no number above 0 and at most 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"`{knob}` must be above 0 and at most 1, got {value!r}")


KINDS: dict[str, tuple[type, str]] = {
    "accelerator": (Accelerator, "lightning.pytorch.accelerators.Accelerator"),
    "cluster_environment": (ClusterEnvironment, "lightning.fabric.plugins.ClusterEnvironment"),
    "checkpoint_io": (CheckpointIO, "lightning.pytorch.plugins.CheckpointIO"),
    "precision_plugin": (Precision, "lightning.pytorch.plugins.Precision"),
}


def check_lightnings(*, timeout: object, parallel_devices: object, **plugins: Any) -> None:
    """Raise for what Lightning would take, and stumble over when the run has begun or is over."""
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ValueError(f"`timeout` must be a datetime.timedelta above 0, got {timeout!r}")
    devices = parallel_devices if isinstance(parallel_devices, (list, tuple)) else ()
    if parallel_devices is not None and not (devices and all(isinstance(d, torch.device) for d in devices)):
        raise ValueError(f"`parallel_devices` must be a list of torch.device, or None, got {parallel_devices!r}")
    for knob, value in plugins.items():
        kind, name = KINDS[knob]
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{knob}` must be a {name}, or None, got {value!r}")
