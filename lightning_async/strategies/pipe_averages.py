"""Averages over time, of weights of which each rank has a part: they go by element, so a stage averages its own.

    setup            the callback copies the whole module; all copies become rank 0's; what lives elsewhere is sent away
    behind a batch   each stage averages its weights as they are then
    validation       each stage swaps its own, and swaps them back: what is on its way meets the weights of before
    save             rank 0 collects the averages like the weights: the file is an ordinary one. In the midst of a
                     validation they are swapped back for it: what is on its way is applied before
    end              the averages are the weights, and all take both home

The callbacks work on a whole module. Here they are given the part of it that lives on this rank.

`StochasticWeightAveraging` averages as an epoch starts. Where there is BatchNorm its last epoch trains nothing: before
it the pipe is drained, and the batches go forward through all stages, with no way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
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
        self._swapped: list[WeightAveraging] = []

    def equalise(self) -> Wait[None]:
        """Rank 0's, everywhere: they were copied from weights of which each rank had its own."""
        for copy in self._copies():
            state = copy.state_dict()
            mine = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            copy.load_state_dict(state | (yield from whole.broadcast(self._strategy.office.rounds, mine, 0)))

    def take(self, leash: compat.Leash) -> None:
        """Free what lives elsewhere, and give the callbacks the own part for the time of a run."""
        root = self._strategy.root_device
        devices = {id(_copy_of(swa)): compat.averages_on(swa) or root for swa in self._stochastic()}
        for copy in self._copies():
            for mine, parameter in zip(self._here(), copy.parameters(), strict=True):
                if not mine:  # where the copy goes later it is by now: on its way there one number would become many
                    parameter.data = away(parameter, devices.get(id(copy)))
        self._swapped = []
        averages, trainer = self._weight_averages(), self._strategy.trainer
        if averages:
            leash.wrap(trainer, "save_checkpoint", partial(self._save_weights, trainer.save_checkpoint))
        for callback, average in averages:
            has_swapped = partial(self._has_swapped, callback)
            compat.swap_parts(callback, leash, partial(self._in_part, average), self._own, has_swapped)
            self._update_part(leash, average)
            self._save_whole(leash, callback, average)
        for swa in self._stochastic():
            self._take_stochastic(leash, swa)

    def _update_part(self, leash: compat.Leash, average: AveragedModel) -> None:
        def update(model: nn.Module) -> None:
            with self._in_part(average):
                original(self._own(model))

        original = leash.wrap(average, "update_parameters", update)

    def _has_swapped(self, callback: WeightAveraging) -> None:
        if callback in self._swapped:
            self._swapped.remove(callback)
        else:
            self._swapped.append(callback)

    def _save_weights(self, save: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Who saves in the midst of a validation finds averages in the place of weights: a step would go to them."""
        module, swapped = self._strategy.trainer.lightning_module, self._swapped[::-1]
        for callback in swapped:
            compat.swap(callback, module)
        try:
            save(*arguments, **options)
        finally:
            for callback in swapped[::-1]:
                compat.swap(callback, module)

    def _save_whole(self, leash: compat.Leash, callback: WeightAveraging, average: AveragedModel) -> None:
        def on_save_checkpoint(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            state = average.state_dict()
            state |= {PREFIX + name: value for name, value in self._collected(average.module).items()}
            with _saying(average, state):
                original(trainer, module, checkpoint)

        original = leash.wrap(callback, "on_save_checkpoint", on_save_checkpoint)

    def take_home(self) -> Wait[None]:
        """Whole averages on all ranks."""
        for copy in self._copies():
            state = copy.state_dict()
            for part in (yield from whole.gather(self._strategy.office.rounds, self._strategy.answered_for(state))):
                state |= part
            for parameter in copy.parameters():
                parameter.data = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
            copy.load_state_dict(state)

    def _collected(self, copy: nn.Module) -> dict[str, Any]:
        """The whole state of an average, on rank 0. Called by all, where all save; else there is nothing to add."""
        strategy, found = self._strategy, dict[str, Any]()
        if strategy.meeting and not strategy.at_home:
            mine = strategy.answered_for(copy.state_dict())
            for part in strategy.together(whole.collect(strategy.office.rounds, mine, 0)):
                found |= part
        return found

    # -- an average over epochs ----------------------------------------------------------------------------------------

    def takes_statistics(self) -> bool:
        """Whether this epoch trains nothing: the average is there, and BatchNorm's statistics are taken anew."""
        epoch = self._strategy.trainer.current_epoch
        return any(epoch == swa.swa_end + 1 for swa in self._stochastic())

    def _take_stochastic(self, leash: compat.Leash, swa: StochasticWeightAveraging) -> None:
        """SWA averages as an epoch starts; the steps that come after that of the last one are in no average."""

        def update(average: nn.Module, model: nn.Module, *others: Any) -> None:
            updated(self._own(average), self._own(model), *others)

        def transfer(average: nn.Module, model: nn.Module) -> None:
            transferred(self._own(average), self._own(model))

        def reset(module: nn.Module) -> None:
            before = {layer: (layer.running_mean, layer.running_var) for layer in _norms(module)}
            forgotten(module)
            for layer, kept in before.items():  # which buffer is whose goes by the tensors
                for name, buffer in zip(("running_mean", "running_var"), kept, strict=True):
                    setattr(layer, name, buffer.copy_(getattr(layer, name)))

        def on_train_epoch_end(*arguments: Any) -> None:
            ended(*arguments)
            compat.go_on_skipping_backward(self._strategy.trainer, not self._strategy.last)

        def state_dict() -> dict[str, Any]:
            state: dict[str, Any] = said()
            return {**state, "average_model_state": state["average_model_state"] | self._collected(_copy_of(swa))}

        updated = leash.wrap(swa, "update_parameters", update)
        transferred = leash.wrap(swa, "transfer_weights", transfer)
        forgotten = leash.wrap(swa, "reset_batch_norm_and_save_state", reset)
        ended = leash.wrap(swa, "on_train_epoch_end", on_train_epoch_end)
        said = leash.wrap(swa, "state_dict", state_dict)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _weight_averages(self) -> list[tuple[WeightAveraging, AveragedModel]]:
        """Those whose fit has begun."""
        found = [c for c in compat.callbacks(self._strategy.trainer) if isinstance(c, WeightAveraging)]
        return [(c, average) for c in found if (average := compat.average_of(c)) is not None]

    def _stochastic(self) -> list[StochasticWeightAveraging]:
        return [c for c in compat.callbacks(self._strategy.trainer) if isinstance(c, StochasticWeightAveraging)]

    def _copies(self) -> list[nn.Module]:
        """The averages, as modules like the one that is trained."""
        return [average.module for _, average in self._weight_averages()] + list(map(_copy_of, self._stochastic()))

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


def _copy_of(swa: StochasticWeightAveraging) -> nn.Module:
    found = compat.average_of_epochs(swa)
    assert found is not None  # since `setup`
    return found


def _norms(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


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
