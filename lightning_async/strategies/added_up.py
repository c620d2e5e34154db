"""Gradients that were added up to a step still to come go on into it, also where other ranks go on than had saved.

saved by 3      rank 0: g0    rank 1: g1    rank 2: 0     each file is read by one rank alone; a rank that had just
                         \\      |       /                 stepped counts too, with nothing
                           mean, by mass
                          /            \\
go on with 2        rank 0: + mean   rank 1: + mean       in the first step of the optimizer that has the parameter

A step moves the consensus by the mean over the ranks of what they step with. So it moves by what it would have moved
by, and each sample counts as it would have. Where the same ranks go on each has its own gradients back; with another
`accumulate_grad_batches` they wait for the step as others' would, divided as the batches to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.strategies.scaling import has_stepped, scale_of, steps_of
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import combined

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

Read = Callable[[int], dict[str, Any]]
"""A saved rank's own file; {}: it cannot be read."""


class Carried:
    """What other ranks had added up, until the step comes. Gradients as they are without fp16's scale, in float32.

    It waits here, and not in `.grad`: the batches of a window are counted as on the rank that wrote the main file, so
    one may begin here, and clear all gradients, where it was under way there. In the step this rank's own gradients
    wait in host memory: on the device there are the sums alone.
    """

    def __init__(self) -> None:
        self._gradients: dict[Tensor, Tensor] = {}
        self._own: dict[Tensor, Tensor | None] = {}

    def __bool__(self) -> bool:
        return bool(self._gradients)

    def behind(self, closure: Callable[[], Any], optimizer: Optimizer, plugin: Precision) -> Callable[[], Any]:
        """The closure, behind whose backward the gradients of this optimizer's parameters are added."""

        def closure_then_add() -> Any:
            result = closure()
            self._add(optimizer, scale_of(plugin))
            return result

        return closure_then_add

    @torch.no_grad()
    def _add(self, optimizer: Optimizer, scale: float) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if (carried := self._gradients.get(parameter)) is not None:
                gradient = (carried * scale).to(parameter)
                self._own[parameter] = None if parameter.grad is None else parameter.grad.to("cpu", copy=True)
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad

    @contextmanager
    def until_stepped(self, optimizer: Optimizer) -> Iterator[None]:
        """In here the optimizer is to step. If it does not (an exception comes first, or fp16's scaler skips it), what
        was added waits for the next step, and the gradients are this rank's own again."""
        with steps_of(optimizer) as steps:
            try:
                yield
            finally:
                stepped = has_stepped(steps)
                for parameter, own in self._own.items():
                    if stepped:
                        del self._gradients[parameter]
                    else:
                        parameter.grad = None if own is None else own.to(parameter.device)
                self._own = {}

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """What still waits, by name."""
        return {name: self._gradients[p] for name, p in module.named_parameters() if p in self._gradients}

    def load_state_dict(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Wait with `state`."""
        self._gradients = {p: state[name] for name, p in module.named_parameters() if name in state}


def mass_of(strategy: AsyncStrategy) -> int:
    """What a gradient of this rank weighs among all: its member steps with the mean over its ranks."""
    return strategy.feeding.mass // strategy.office.size


def divided_anew(strategy: AsyncStrategy, state: dict[str, Any], factor: float) -> dict[str, Tensor]:
    """All that one rank has added up, by name, where a step is of other batches than it was: Lightning divides each
    batch's gradients by their number, and each sample counts as those to come."""
    return {name: gradient * factor for name, gradient in _gradients(state, _layout(strategy)[1]).items()}


def mean_of_all(
    strategy: AsyncStrategy, shared: dict[str, Any], own: dict[str, Any], read: Read, here: Sequence[int]
) -> Wait[tuple[dict[str, Tensor], list[int]]]:
    """The mean of what the ranks that saved had added up, by name, and those of whom it is lost. Called by all.

    Args:
        strategy: Of the run that goes on.
        shared: What the main file says of all who saved.
        own: The file of the saved rank in whose place this one is.
        read: Reads another one's.
        here: The ranks that are here: each reads its share, and the first ones those of who is not. A replay of one
            rank reads all, and adds up in the same order.
    """
    ranks = shared["ranks"]
    if not (had := shared.get("added_up", ranks)):  # older versions did not say
        return {}, []
    me, world = strategy.global_rank, strategy.world_size
    shares = [ranks[at::world] for at in range(world) if me == (at if at in here else here[at % len(here)])]
    states = {
        rank: _stepping(own if rank == ranks[me % len(ranks)] else read(rank)) for share in shares for rank in share
    }
    words = yield from strategy.office.rounds.agree(
        ",".join(str(rank) for rank, state in states.items() if state is None).encode(), what="whose gradients"
    )
    unread = {int(rank) for word in words.values() for rank in word.decode().split(",") if rank}
    lost = sorted(unread & set(had))
    if unread >= set(ranks):
        return {}, lost
    layout, dtype = _layout(strategy)
    parts = [_of(share, states, layout, dtype) for share in shares]
    mine, mass = parts[0] if len(parts) == 1 else (combined(parts, "mean"), sum(mass for _, mass in parts))
    (mean,), _ = yield from strategy.office.rounds.exchange(mine, "mean", weight=mass)
    *values, there = torch.split(mean, [p.numel() for p in layout.values()] + [len(layout)])
    found = zip(layout.items(), values, there.tolist(), strict=True)
    return {name: value.view(p.shape).clone() for (name, p), value, part in found if part}, lost


def _stepping(file: dict[str, Any]) -> dict[str, Any] | None:
    """Of a rank's own file, which may be long, what is needed here; None: it could not be read."""
    found: dict[str, Any] | None = file.get("parts", {}).get("stepping", {}) if file else None
    return found


def _of(
    share: Sequence[int],
    states: Mapping[int, dict[str, Any] | None],
    layout: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    """The mean of those who saved, of a share of them, and what it weighs."""
    found = [state for rank in share if (state := states[rank]) is not None]
    vectors = [(_vector(layout, _gradients(state, dtype), dtype), state.get("mass", 1)) for state in found]
    return (combined(vectors, "mean") if vectors else _vector(layout, {}, dtype)), sum(mass for _, mass in vectors)


def _gradients(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """One rank's own, and on top of them what it had been given of others' before; none of it if some is not finite,
    since its step would not have been taken."""
    scale, carried = state.get("scale", 1.0), state.get("carried", {})
    own = {name: gradient.to_dense().to(dtype) / scale for name, gradient in state.get("gradients", {}).items()}
    both = {name: own[name] + gradient for name, gradient in carried.items() if name in own}
    all_of_it = {**own, **carried, **both}
    return all_of_it if all(bool(gradient.isfinite().all()) for gradient in all_of_it.values()) else {}


def _layout(strategy: AsyncStrategy) -> tuple[dict[str, nn.Parameter], torch.dtype]:
    """What is trained, which is not of the run's precision yet, and in which one its gradients are added up."""
    module = strategy.trainer.lightning_module
    layout = {name: p for name, p in module.named_parameters() if p.requires_grad}
    least = torch.float64 if strategy.precision_plugin.precision == "64-true" else torch.float32
    return layout, reduce(torch.promote_types, (p.dtype for p in layout.values()), least)


def _vector(layout: Mapping[str, nn.Parameter], gradients: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """All gradients, and behind them which there are."""
    parts = [gradients[name].flatten() if name in gradients else torch.zeros(p.numel()) for name, p in layout.items()]
    return torch.cat([*parts, torch.tensor([float(name in gradients) for name in layout])]).to(dtype)
