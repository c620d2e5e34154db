"""One round is n pushes, so n steps of the server's optimizer: together they move as one step on the mean does.

    synchronous, one step on g             server, n steps on g / n each
    SGD      lr * g                        lr                               n * lr * g / n
    momentum lr * g / (1 - mu)             mu^(1/n),  lr * (1 - mu^(1/n)) / (1 - mu)
    Adam     lr * m / sqrt(v)              beta^(1/n), lr / n, eps / n      (1/n of the gradient is invisible to it)

What a step remembers fades as fast per round as before. Weight decay that is added to the gradient gets its n-th too;
decoupled decay follows the learning rate. What Adam's second moment sees is a gradient of one member, noisier than the
mean of n: where the noise is larger than the signal, it still moves less than the synchronous one, up to sqrt(n) times.
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


def spread(group: Mapping[str, Any], n: int) -> dict[str, Any]:
    """What of an optimizer's group changes when one step becomes `n`."""
    return _spread_adam(group, n) if "betas" in group else _spread_sgd(group, n)


def _spread_sgd(group: Mapping[str, Any], n: int) -> dict[str, Any]:
    momentum = float(group["momentum"])
    faded = momentum ** (1 / n)
    return {
        "lr": float(group["lr"]) * ((1 - faded) / (1 - momentum)),
        "momentum": faded,
        "weight_decay": group["weight_decay"] / n,
    }


def _spread_adam(group: Mapping[str, Any], n: int) -> dict[str, Any]:
    decay = group["weight_decay"]
    return {
        "lr": float(group["lr"]) / n,
        "betas": tuple(float(beta) ** (1 / n) for beta in group["betas"]),
        "eps": group["eps"] / n,
        "weight_decay": decay if group.get("decoupled_weight_decay") else decay / n,
    }
