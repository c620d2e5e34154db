"""What a rank records of itself for a cut, and the files that come of it: copied at once, made and written later.

    record       between two steps, in the training thread: weights, the method's state, what Lightning saves; copied
    own_file     one a rank, as at a meeting; with its own weights, and the messages that were under way to it
    main_file    the first rank's record with the consensus in the place of its weights; loads in plain Lightning

Where a cut is resumed by its own ranks, each goes on from its own weights, and what was under way to it is the first
mail that it gets: so nothing counts twice, and nothing is lost. Any others go on from the consensus, which has it all.
Float buffers travel with the weights, and as precisely: of a float64 one beside float32 weights the main file has a
mean in float32. (A rank's own file has its own buffers as they are, and a meeting averages them as they are.)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_async.algorithms.cut import Part, Sum, packed
from lightning_async.data.resume import unite
from lightning_async.strategies import compat, saved_loops
from lightning_async.strategies.cut_places import Places, averaged_places, places_of, shown
from lightning_async.strategies.own_state import Part as Saved
from lightning_async.strategies.own_state import all_parts, exact, own_buffers, own_keys, primitive
from lightning_async.strategies.own_state import places_of as own_places
from lightning_async.strategies.resuming import KEY, VERSION

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One rank between two steps.

    Attributes:
        weights: Its own, as one flat vector.
        buffers: The float buffers that are averaged, end to end, in the precision of the weights.
        algorithm: The method's state, with what it has asked and not heard of.
        counts: What it has trained on.
        scheduled: To which step of the run its schedules have come.
        waits: Whether its epoch was over, and not the others'.
        data: What of the epoch it has completed.
        own: What else its own file holds.
        main: What Lightning saves of the first rank, without what is trained; empty on the others.
        places: Where in the vector what is trained lies, by its names in the state dict; empty on the others.
        averaged: The same of the buffers that are averaged; empty on the others.
        named: Where the weights lie by the module's own names; empty on the others.
    """

    weights: Tensor
    buffers: Tensor
    algorithm: dict[str, Any]
    counts: bytes
    scheduled: int
    waits: bool
    data: dict[str, Any]
    own: dict[str, Any]
    main: dict[str, Any]
    places: Places
    averaged: Places
    named: Places


@dataclass(frozen=True)
class Save:
    """One file that a callback asked for.

    Attributes:
        path: Where.
        name: The save's name; "" for mere weights, beside which nothing lies.
        keys: What of a checkpoint it is to have.
        callbacks: What the callbacks that save say of themselves by now: the names of their files.
        options: For the CheckpointIO.
    """

    path: str
    name: str
    keys: tuple[str, ...]
    callbacks: dict[str, Any]
    options: Any

    def __fspath__(self) -> str:
        return self.path


@torch.no_grad()
def record(strategy: AsyncStrategy, parts: Mapping[str, Saved], *, first: bool) -> Record:
    """This rank as it is now."""
    module, replica = strategy.trainer.lightning_module, strategy.replica
    feeding, clock = strategy.feeding, strategy.clock
    replica.check()  # where its memory is, is looked at below
    dumped = compat.dump(strategy.trainer)
    assert clock.progress is not None  # only who trains records
    waits = clock.progress.ended
    (saved_loops.wait_again if waits else saved_loops.go_on)(dumped["loops"]["fit_loop"])
    places = places_of(module, replica, dumped["state_dict"], strategy.name)
    buffers = own_buffers(module)
    averaged = {name: b for name, b in buffers.items() if b.is_floating_point() and strategy.buffers != "local"}
    state = {name: part.state_dict() for name, part in all_parts(strategy, dict(parts)).items() if name != "algorithm"}
    algorithm: dict[str, Any] = strategy.algorithm.midway()  # type: ignore[attr-defined]  # no other is ever cut
    own = {key: dumped[key] for key in own_keys(strategy) if key in dumped and not first}
    own |= {"buffers": buffers, "loaders": feeding.loader_states(), "waits": waits, "parts": state}
    weights = _copied(replica.flat)
    flat = [b.reshape(-1).to(weights.dtype) for b in averaged.values()]
    return Record(
        weights=weights,
        buffers=torch.cat([weights.new_empty(0), *flat]),
        algorithm=algorithm,
        counts=clock.progress.says(),
        scheduled=clock.scheduled,
        waits=waits,
        data=_copied(feeding.state_dict()),
        own=_copied({"steps": strategy.steps, **own}),
        main=_main(dumped, places) if first else {},
        places=places if first else {},  # on the others, too, it was looked whether there are such
        averaged=averaged_places(averaged, module, dumped["state_dict"]) if first else {},
        named=own_places(strategy) if first else {},
    )


def own_file(part: Part[Record], save: str, progress: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a rank's own file holds; how far the run was then is known of all by now."""
    mine = part.state
    mail: Part[Any] = replace(part, state=None)  # type: ignore[arg-type]  # that is all beside it
    own = {**mine.own, "data": mine.data, "weights": mine.weights, "cut": packed(mail)}
    counted = {**progress, "scheduled": mine.scheduled, "ended": mine.waits}
    parts = {**own["parts"], "algorithm": mine.algorithm, "progress": counted}
    if "loops" in own:
        saved_loops.at_step(own["loops"]["fit_loop"], steps)
    return primitive({"version": VERSION, "save": save, "rank": part.member, **own, "parts": parts})  # type: ignore[no-any-return]


def main_file(mine: Record, total: Sum, save: Save, shared: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What the main file holds: of all that Lightning saves what this save is to have."""
    main = {**mine.main, "global_step": steps}
    saved_loops.at_step(main["loops"]["fit_loop"], steps)
    main["state_dict"] = _with_consensus(mine, total)
    if "callbacks" in main:
        main["callbacks"] = {**main["callbacks"], **save.callbacks}
    of_all = {KEY: {**shared, "consensus": _exact(mine, total)}} if save.name else {}
    return {**{key: main[key] for key in main if key in save.keys}, **of_all}


def write_down(begin: Callable[..., object], members: tuple[int, ...], *saves: Save) -> None:
    """Which files are to come. In the writer's thread."""
    for save in saves:
        if save.name:
            with _said(save.path):
                begin(save.path, save.name, members, save.options)


def write(io: Any, make: Callable[[], dict[str, Any]], path: str, options: Any = None) -> None:
    """One of them. In the writer's thread."""
    with _said(path):
        io.save_checkpoint(make(), path, storage_options=options)


@contextmanager
def _said(path: str) -> Iterator[None]:
    """What goes wrong may be the last that this run does: so it is told here, too."""
    try:
        yield
    except Exception as error:
        log.warning("%s is not written, and the checkpoint before stays: %s: %s", path, type(error).__name__, error)
        raise


def data_of_all(mine: Record, said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the data stood, by what all have said."""
    others = [{"epoch": one["epoch"], "done": torch.tensor(one["done"]).reshape(-1, 2).long()} for one in said]
    return unite([mine.data, *others])


def said_of_data(mine: Record) -> dict[str, Any]:
    """What this rank says there."""
    return {"epoch": int(mine.data["epoch"]), "done": mine.data["done"].tolist()}


def _exact(mine: Record, total: Sum) -> dict[str, Tensor]:
    weights, _ = total.means(mine.weights.numel())
    return exact(weights.to(mine.weights.dtype), mine.named)


def _with_consensus(mine: Record, total: Sum) -> dict[str, Any]:
    weights, buffers = total.means(mine.weights.numel())
    state = copy.copy(mine.main["state_dict"])  # torch keeps more in it than its items
    state.update(shown(weights, mine.places) | shown(buffers, mine.averaged))
    return state  # type: ignore[no-any-return]


def _main(dumped: dict[str, Any], places: Mapping[str, object]) -> dict[str, Any]:
    """A copy of what Lightning saves; the consensus will stand in the place of what is trained."""
    state = copy.copy(dumped["state_dict"])
    for name, value in state.items():
        state[name] = None if name in places else _copied(value)
    rest = {key: value for key, value in dumped.items() if key != "state_dict"}
    order = dict.fromkeys(dumped)
    return {**order, **_copied(rest), "state_dict": state}


def _copied(found: Any) -> Any:
    """A copy of its own, of whatever it is made, with tensors in host memory: what is here goes on changing."""
    memo: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        memo[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return tensor

    apply_to_collection(found, Tensor, keep, allow_frozen=True)
    return copy.deepcopy(found, memo)
