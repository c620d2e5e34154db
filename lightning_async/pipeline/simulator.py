"""All stages in one process, driven by the tick table: what a run on many ranks must equal, to the bit.

It knows no mail, no turns and no waiting: on each tick the table says who works, and two dictionaries are the links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_async.pipeline.edge import Wire, incoming, outgoing
from lightning_async.pipeline.schedule import Order, Work, schedule
from lightning_async.pipeline.stage import Compute, Stage, gradient_of


def simulate(
    stages: Sequence[Stage],
    computes: Sequence[Compute],
    inputs: Sequence[Tensor],
    loss: Callable[[int, Tensor], Tensor],
    update: Callable[[int], object],
    *,
    shrink: float = 1.0,
    every: int = 1,
    ends: Callable[[int], bool] | None = None,
    order: Order = "update_first",
    wire: Wire = "as_is",
    watch: Callable[[Work], object] = lambda work: None,
) -> list[float]:
    """Train on `inputs` once, and drain. Returns the losses.

    Args:
        stages: The stages, first to last.
        computes: The blocks of each.
        inputs: The batches; batch 1 is the first.
        loss: The loss of a batch, given its number and the output of the last stage.
        update: Steps the optimizer of a stage; the gradients are there, and are cleared afterwards.
        shrink: The factor on each gradient that comes from behind.
        every: Batches in an update; losses are divided by it.
        ends: Whether an update is due with a batch; None: with every `every`-th, and with the last one.
        order: Update first, or forward first.
        wire: How tensors travel.
        watch: Called with each piece of work after it is done.
    """
    down: dict[tuple[int, int], Tensor] = {}
    up: dict[tuple[int, int], Tensor] = {}
    losses: list[float] = []

    def step(stage: Stage, batch: int) -> None:
        if ends(batch) if ends is not None else batch % every == 0 or batch == len(inputs):
            if not stage.last:
                stage.before_step()
            update(stage.index)
            stage.after_step()

    def run_last(stage: Stage, batch: int) -> None:
        x = inputs[batch - 1] if stage.index == 0 else down.pop((stage.index, batch))
        entered, out = stage.enter(batch, x, computes[stage.index])
        value = loss(batch, out)
        torch.autograd.backward(value / every)
        losses.append(float(value.detach()))
        if stage.index:
            up[stage.index - 1, batch] = incoming(outgoing(gradient_of(entered), wire), wire)
        step(stage, batch)

    for work in schedule(len(stages), len(inputs), order=order):
        stage, batch = stages[work.stage], work.batch
        if stage.last:
            if work.direction == "F":
                run_last(stage, batch)
        elif work.direction == "F":
            x = inputs[batch - 1] if stage.index == 0 else down.pop((stage.index, batch))
            out = stage.forward(batch, x, computes[stage.index])
            down[stage.index + 1, batch] = incoming(outgoing(out, wire), wire)
        else:
            gradient = stage.backward(batch, up.pop((stage.index, batch)), shrink)
            if gradient is not None:
                up[stage.index - 1, batch] = incoming(outgoing(gradient, wire), wire)
            step(stage, batch)
        watch(work)
    return losses
