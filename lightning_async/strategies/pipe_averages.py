"""Averages over time, of weights of which each rank has a part: they go by element, so a stage averages its own.

    setup            the callback copies the whole module; all copies become rank 0's; what lives elsewhere is sent away
    behind a batch   each stage averages its weights as they are then
    validation       each stage swaps its own, and swaps them back: what is on its way meets the weights of before
    save             rank 0 collects the averages like the weights: the file is an ordinary one
    end              the averages are the weights, and all take both home

The callbacks work on a whole module. Here they are given the part of it that lives on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_async.strategies import compat, whole
from lightning_async.strategies.parts import away
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.pipe_batches import PipeBatches

PREFIX = "module."
"""Of the names in an averaged model's state."""


class PipeAverages:
    """The averages of one rank."""

    def __init__(self, strategy: PipeBatches) -> None:
        self._strategy = strategy

    def _found(self) -> list[tuple[WeightAveraging, AveragedModel]]:
        """Those whose fit has begun."""
        found = [c for c in compat.callbacks(self._strategy.trainer) if isinstance(c, WeightAveraging)]
        return [(c, average) for c in found if (average := compat.average_of(c)) is not None]

    def equalise(self) -> Wait[None]:
        """Rank 0's, everywhere: they were copied from weights of which each rank had its own."""
        for _, average in self._found():
            state = average.state_dict()
            mine = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            average.load_state_dict(state | (yield from whole.broadcast(self._strategy.office.rounds, mine, 0)))

    def take(self, leash: compat.Leash) -> None:
        """Free what lives elsewhere, and give the callbacks the own part for the time of a run."""
        for callback, average in self._found():
            for mine, parameter in zip(self._here(), average.module.parameters(), strict=True):
                if not mine:
                    parameter.data = away(parameter)
            compat.swap_parts(callback, leash, partial(self._in_part, average), self._own)
            self._update_part(leash, average)
            self._save_whole(leash, callback, average)

    def _update_part(self, leash: compat.Leash, average: AveragedModel) -> None:
        def update(model: nn.Module) -> None:
            with self._in_part(average):
                original(self._own(model))

        original = leash.wrap(average, "update_parameters", update)

    def _save_whole(self, leash: compat.Leash, callback: WeightAveraging, average: AveragedModel) -> None:
        def on_save_checkpoint(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            strategy = self._strategy
            if not strategy.meeting or strategy.at_home:
                return original(trainer, module, checkpoint)  # type: ignore[no-any-return]
            state = average.state_dict()
            for part in strategy.together(whole.collect(strategy.office.rounds, self._answered_for(state), 0)):
                state |= part
            with _saying(average, state):
                return original(trainer, module, checkpoint)  # type: ignore[no-any-return]

        original = leash.wrap(callback, "on_save_checkpoint", on_save_checkpoint)

    def take_home(self) -> Wait[None]:
        """Whole averages on all ranks."""
        for _, average in self._found():
            state = average.state_dict()
            for part in (yield from whole.gather(self._strategy.office.rounds, self._answered_for(state))):
                state |= part
            for parameter in average.module.parameters():
                parameter.data = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
            average.load_state_dict(state)

    def _answered_for(self, state: Mapping[str, Any]) -> dict[str, Any]:
        named = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        return {PREFIX + name: value for name, value in self._strategy.answered_for(named).items()}

    def _here(self) -> list[bool]:
        return self._strategy.turns.parts.here()

    def _own(self, module: nn.Module) -> nn.Module:
        return _Part(module, self._here())

    @contextmanager
    def _in_part(self, average: AveragedModel) -> Iterator[None]:
        """An averaged model of the own part."""
        module, average.module = average.module, self._own(average.module)
        try:
            yield
        finally:
            average.module = module


class _Part(nn.Module):
    """Of a module, the parameters that live here, and the buffers. Torch cannot average nothing, so there is one."""

    def __init__(self, module: nn.Module, here: list[bool]) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1), requires_grad=False)
        for at, (mine, parameter) in enumerate(zip(here, module.parameters(), strict=True)):
            if mine:
                self.register_parameter(f"parameter{at}", parameter)
        for at, buffer in enumerate(module.buffers()):
            self.register_buffer(f"buffer{at}", buffer)


@contextmanager
def _saying(average: AveragedModel, state: dict[str, Any]) -> Iterator[None]:
    """An averaged model with another state to save."""
    average.state_dict = lambda: state  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del average.state_dict
