"""What a rank alone has, as tensors and primitives: saved beside the consensus, and put back after a restart.

Lightning dumps and restores its share of it on each rank (`own_keys`: optimizers, schedulers, loops, a scaler). The
parts are what Lightning does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_async.transport import chance

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

BEGUN_ANEW = ("algorithm", "random", "stepping")
"""Parts that only the same rank of the same world can use: a part of a sum, numbers that nobody else draws, counts of
its own."""


class Part(Protocol):
    """Something of a rank's own that is saved and put back."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


class Moments:
    """What `SecondMoment` remembers of each optimizer, by the optimizer's number."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        moments = {str(i): strategy.stepping.moment(optimizer) for i, optimizer in enumerate(strategy.optimizers)}
        self._moments = {number: moment for number, moment in moments.items() if moment is not None}

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        return {number: moment.state_dict() for number, moment in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Those that were saved."""
        for number in self._moments.keys() & state.keys():
            self._moments[number].load_state_dict(state[number])


class RandomStates:
    """What training draws from, on this rank and its device: a resumed rank draws what it would have drawn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """All states as they are now."""
        return chance.taken(self._device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw on from `state`."""
        chance.put_back(state, self._device)


def own_keys(strategy: AsyncStrategy) -> tuple[str, ...]:
    """Lightning's keys of a checkpoint under which each rank has its own."""
    return ("optimizer_states", "lr_schedulers", "loops", type(strategy.precision_plugin).__qualname__)


def own_tensors(strategy: AsyncStrategy) -> dict[str, Any]:
    """Of the module, what the main file has not to the bit: this rank's buffers, and its weights if it keeps them."""
    state: dict[str, Any] = {"buffers": own_buffers(strategy.trainer.lightning_module)}
    if strategy.at_meeting == "keep":
        state["weights"] = strategy.replica.own.cpu()
    return state


def places_of(strategy: AsyncStrategy) -> dict[str, tuple[int, Tensor]]:
    """Where what is trained begins in the flat vector, by name, and what it is like."""
    at = {id(p): offset for p, offset in strategy.replica.places}
    named = strategy.trainer.lightning_module.named_parameters(remove_duplicate=False)
    return {name: (at[id(p)], torch.empty_like(p, device="meta")) for name, p in named if id(p) in at}


def exact(consensus: Tensor, places: Mapping[str, tuple[int, Tensor]]) -> dict[str, Tensor]:
    """The consensus as it is, by name, where the main file does not show that: {} where all is float32.

    A half-precision module shows its rounding; and Lightning loads the main file before it converts the module to
    another precision. It goes by names for those who cut the vector otherwise, or train in another precision.
    """
    if all(dtype == torch.float32 for dtype in (consensus.dtype, *(like.dtype for _, like in places.values()))):
        return {}
    first = {at: name for name, (at, _) in reversed(list(places.items()))}  # tied weights have two names, and one place
    parts = ((name, at, places[name][1]) for at, name in sorted(first.items()))
    return {name: consensus[at : at + like.numel()].view(like.shape).to("cpu", copy=True) for name, at, like in parts}


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict has, by name."""
    return {name: buffer.cpu() for name, buffer in _buffers(module)}


@torch.no_grad()
def put_back_tensors(strategy: AsyncStrategy, state: dict[str, Any]) -> None:
    """As at the meeting: the consensus is shown, the own weights come back with the next batch."""
    replica, buffers = strategy.replica, state.get("buffers", {})
    for name, buffer in _buffers(strategy.trainer.lightning_module):
        if name in buffers:
            buffer.copy_(buffers[name])
    for name in ("consensus", "weights"):
        if name in state and state[name].numel() != replica.numel:
            raise ValueError(
                f"the ranks trained other parameters when they were saved (a vector of {state[name].numel()} elements; "
                f"this module's has {replica.numel}): freeze and thaw it as it was then, or begin a new run with the "
                "weights alone (`load_from_checkpoint`)"
            )
    if "consensus" in state:  # in files of older versions
        replica.stand_in(state["consensus"])
        replica.stay()
    if "exact" in state:
        _show(strategy, state["exact"])
    if "weights" in state and keeps_own(strategy, state):
        replica.keep_aside(state["weights"])


def _show(strategy: AsyncStrategy, found: Mapping[str, Tensor]) -> None:
    """Be this consensus, as far as it is of what is trained."""
    vector = strategy.replica.weights()
    for name, (at, like) in places_of(strategy).items():
        if name in found and found[name].shape == like.shape:
            vector[at : at + like.numel()] = found[name].flatten()
    strategy.replica.stand_in(vector)
    strategy.replica.stay()


def keeps_own(strategy: AsyncStrategy, state: dict[str, Any]) -> bool:
    """Whether a rank goes on from its own weights: where it keeps them at meetings, and from a cut."""
    return strategy.at_meeting == "keep" or "cut" in state


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has."""
    saved = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def primitive(state: Any) -> Any:
    """The same with Python's numbers in the place of NumPy's, which others hand in (a schedule that was computed with
    NumPy) and `weights_only=True` does not read."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {primitive(key): primitive(value) for key, value in state.items()}
    return type(state)(map(primitive, state)) if type(state) in (list, tuple) else state


def all_parts(strategy: AsyncStrategy, more: dict[str, Part]) -> dict[str, Part]:
    """The parts by name. The random states stand last: whatever is put back before them may draw."""
    random = RandomStates(strategy.root_device)
    return {"algorithm": strategy.voice, "moments": Moments(strategy), **more, "random": random}
