"""What can be done about a known delay of d own updates, beyond shrinking.

    lr         a late gradient counts less at first: lr / d^p, p falls from 1 to 0 over `anneal` updates (PipeMare)
    predict    run forward with the weights that will be there at the update: w - d * lr * direction (SpecTrain, XPipe)
    nesterov   give momentum at once what a gradient will add to it until it is d updates old (spike compensation):
               w <- w - lr * (a * v + b * g), a = m^d, b = (1 - m^d) / (1 - m)

And where shrinking itself cannot be seen (`algorithms/scale_free.py`), its factor goes on the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Compensate = Literal["none", "lr", "predict", "nesterov"]


def annealed(updates: int, late: float, anneal: int) -> float:
    """The factor of "lr" after so many updates."""
    power = 1.0 - min(1.0, updates / anneal)
    return float(max(1.0, late) ** -power)


@contextmanager
def scaled(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Learning rates times `factor`, in here."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr * factor
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr


@contextmanager
def predicted(optimizer: Optimizer, late: float) -> Iterator[None]:
    """The weights as they may be `late` updates later, in here; in storage of their own, so graphs may keep them."""
    before: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                direction = _direction(group, optimizer.state.get(parameter, {}))
                if direction is not None and late > 0:
                    before.append((parameter, parameter.data))
                    ahead = parameter.data - late * float(group["lr"]) * direction
                    parameter.data = ahead.to(parameter.dtype)  # what an optimizer remembers may be wider
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@torch.no_grad()
def spike(optimizer: Optimizer, late: float) -> None:
    """After a step of SGD with momentum: make it the step that compensates for the delay."""
    for group in optimizer.param_groups:
        momentum, lr = float(group["momentum"]), float(group["lr"])
        kept = momentum**late
        for parameter in group["params"]:
            velocity = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if velocity is None or parameter.grad is None:
                continue
            gradient = -parameter.grad if group["maximize"] else parameter.grad
            if group["weight_decay"]:  # as the step saw it
                gradient = gradient + group["weight_decay"] * (parameter + lr * velocity)
            ahead = (1 - kept) / (1 - momentum)
            parameter.add_(lr * ((1 - kept) * velocity - ahead * gradient))


def check_nesterov(optimizer: Optimizer) -> None:
    """Raise for optimizers that "nesterov" cannot correct."""
    plain = isinstance(optimizer, torch.optim.SGD) and all(
        0 < group["momentum"] < 1 and not group["nesterov"] and not group["dampening"]
        for group in optimizer.param_groups
    )
    if not plain:
        raise ValueError(
            "`compensate='nesterov'` corrects plain SGD with momentum (no `nesterov`, no `dampening`), "
            f"got {type(optimizer).__name__}; with Adam use `torch.optim.NAdam`"
        )


def _direction(group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
    """What an update subtracts, by its learning rate; None before the first one, or for an optimizer without memory."""
    if "momentum_buffer" in state:
        velocity: Tensor | None = state["momentum_buffer"]
        return velocity
    if "exp_avg" not in state or "exp_avg_sq" not in state:
        return None
    (first, second), steps = group["betas"], float(state["step"])
    mean = state["exp_avg"] / (1 - first**steps)
    size = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(group["eps"])
    direction: Tensor = mean / size
    return direction
