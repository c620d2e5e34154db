"""A push takes the place of a part of a synchronous step; all parts together move as the whole step does.

    synchronous, one step on g       server, steps on parts of it that add up to 1
    SGD      lr * g                  lr                                      on  share * g
    momentum lr * g / (1 - mu)       mu^share,  lr * (1 - mu^share) / (1 - mu)
    Adam     lr * m / sqrt(v)        beta^share,  lr * share                 on  g        (a factor of g is invisible)

The share of c batches among n members is c / n: what a step remembers fades as fast by the sample as before, and the
sum of many batches goes further than one. Weight decay that is added to the gradient gets its share too; decoupled
decay follows the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import SGD, Adam, Optimizer


def check_known(optimizer: Optimizer) -> None:
    """Refuse an optimizer for which there is no rule."""
    if not isinstance(optimizer, (SGD, Adam)):
        raise ValueError(
            f"the server knows how to spread a step of SGD, Adam or AdamW over the members' pushes, got "
            f"{type(optimizer).__name__}: use one of these"
        )


def spread(group: Mapping[str, Any], share: float) -> dict[str, Any]:
    """What of an optimizer's group changes when a step becomes a part of one."""
    if "betas" in group:
        betas = tuple(float(beta) ** share for beta in group["betas"])
        return {**_numbers(group), "lr": float(group["lr"]) * share, "betas": betas}
    momentum = float(group["momentum"])
    faded = momentum**share
    return {
        **_numbers(group),
        "lr": float(group["lr"]) * ((1 - faded) / (1 - momentum)),
        "momentum": faded,
        "weight_decay": group["weight_decay"] * share,
    }


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in ("dampening", "weight_decay", "eps") if name in group}
