"""A checkpoint is the consensus, which loads in plain Lightning, and beside it what each rank has of its own.

    all say where and under which name     the first that lives decides, and its path counts
    every rank's own file                  all agree that theirs is written, or all raise
    the main file names the save           until then the checkpoint before is the one that is there
    the files of the save before go

At meetings; how the same files come of a cut, between them, is `cuts.py`'s.

A save that loses its first rank on the way is begun anew by those who live. What the main file has of the first rank
(its optimizers, schedulers and loops) is not in that rank's own file a second time.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_async.data.resume import unite
from lightning_async.strategies import compat, saved_loops, words
from lightning_async.strategies.late_files import LateFiles
from lightning_async.strategies.own_state import Part, all_parts, exact, own_keys, own_tensors, places_of, primitive
from lightning_async.strategies.rank_files import RankFiles, rank_file
from lightning_async.strategies.resuming import KEY, VERSION, Resuming
from lightning_async.strategies.trainable import trained_set
from lightning_async.strategies.waiting import PeerFailedError
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


@dataclass(frozen=True)
class Plan:
    """What all agreed on before a save: where, under which name, who is there, and whose step is still to come."""

    path: str
    save: str
    ranks: tuple[int, ...]
    adding_up: tuple[int, ...]

    @property
    def first(self) -> int:
        """The rank that writes the main file."""
        return self.ranks[0]


class Checkpoints:
    """Saves and restores the run of one strategy, seen from one rank.

    Attributes:
        parts: What else each rank saves and gets back, by name.
        late: What this rank has still to write.
        files: The files of all ranks, as this one knows them.
    """

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.parts: dict[str, Part] = {}
        self._strategy = strategy
        self.late = LateFiles(strategy, partial(getattr, self, "io"))
        self.files = RankFiles(self.late.behind)
        self._resuming = Resuming(strategy, self.files, self.parts)
        self._agreed: dict[str, str] = {}
        self._begun = self._waits = False

    @property
    def io(self) -> Any:
        """What writes: where cuts are saved, what a meeting writes takes its turn behind their files."""
        cuts = self._strategy.cuts
        return self._strategy.checkpoint_io if cuts.io is None else cuts.io

    def holds_all(self, checkpoint: dict[str, Any]) -> bool:
        """Whether what each rank has of its own belongs into this checkpoint: not beside mere weights."""
        return self._begun and "optimizer_states" in checkpoint

    def before_save(self) -> None:
        """What is trained may have changed at this meeting: what is saved is of what is trained from here on."""
        if any(p.requires_grad for p in self._strategy.trainer.lightning_module.parameters()):
            self._strategy.renew()

    def save(self, checkpoint: dict[str, Any], filepath: Any, options: Any) -> Wait[None]:
        """Write the main file and every rank's own. Called by all that live, at a meeting."""
        cut = self._strategy.cuts.io is not None
        yield from self.late.room()
        if cut:
            yield from self.late.finish()
        self._waits = self._loops_of_all(checkpoint["loops"]["fit_loop"])
        written = False
        while not written:
            written = yield from self._attempt(checkpoint, os.fspath(filepath), options)
        self.late.queued()
        if cut:  # nobody asked for files that come later
            trouble = yield from self.late.finish()
            yield from self._all_well(trouble, f"its part of the checkpoint {os.fspath(filepath)}")

    def agreed(self, filepath: Any) -> str:
        """The first rank's path for what this rank calls `filepath`: a name with `{step}` differs by rank."""
        mine: str = os.fspath(filepath)
        return self._agreed.get(mine, mine)

    def lie_at(self, filepath: Any) -> bool:
        """Whether all ranks have saved there, in this run or an earlier one."""
        return self.files.lie_at(self._strategy.checkpoint_io, self.agreed(filepath))

    def behind(self, remove: Callable[[], object]) -> None:
        """Remove something when all that was to be written before is there."""
        self.late.behind(remove)

    def remove(self, path: str) -> None:
        """Remove the files of all ranks beside `path`."""
        self.files.remove(self._strategy.checkpoint_io, path)

    def load(self, path: Any, checkpoint: dict[str, Any], *, weights_only: bool | None = None) -> Wait[dict[str, Any]]:
        """The checkpoint as this rank goes on from it; what is restored later waits for `put_back`. Called by all."""
        return self._resuming.load(os.fspath(path), checkpoint, weights_only=weights_only)

    def before_loader(self) -> None:
        """The training loader is about to be made: restore what has to be there before its iterator."""
        self._resuming.before_loader()

    @property
    def cut(self) -> dict[str, Any] | None:
        """What was under way to this rank in the cut that the run goes on from, if it goes on from one."""
        return self._resuming.cut

    def before_algorithm(self) -> None:
        """The algorithm is about to begin: it does on the weights of the checkpoint, to the bit."""
        self._resuming.before_algorithm()

    def put_back(self) -> None:
        """The algorithm has begun: restore what is left, right before the first batch."""
        self._begun = True
        self.late.begin()
        self._resuming.put_back()

    def settle(self) -> Wait[None]:
        """The run ends: where files are written later, wait for them. Raises on all if one could not be written."""
        if self._begun and compat.writes_later(self.io):
            trouble = yield from self.late.finish()
            yield from self._all_well(trouble, "its checkpoints")

    def leave(self) -> None:
        """This rank is about to leave, however the run ended; see `LateFiles.leave`."""
        self.late.leave()

    def forget(self) -> None:
        """The run is over."""
        self._begun = False
        self._resuming.forget()

    # -- one save ------------------------------------------------------------------------------------------------------

    def _loops_of_all(self, fit: saved_loops.Loop) -> bool:
        """Let the loops say what holds for all; whether this rank waits for the others."""
        trainer, clock = self._strategy.trainer, self._strategy.clock
        if clock.progress is None:
            return False
        if saved_loops.is_between_epochs(fit):
            if not clock.broke_off:
                return False
            saved_loops.reopen(fit)
        elif clock.ended:
            saved_loops.end_epoch(fit, counted=trainer.max_epochs != -1)
        elif clock.progress.ended:
            saved_loops.wait_again(fit)
        else:
            saved_loops.go_on(fit)
        return clock.progress.ended and not clock.ended

    def _attempt(self, checkpoint: dict[str, Any], filepath: str, options: Any) -> Wait[bool]:
        """False if the rank that writes the main file was lost on the way."""
        io, me = self.io, self._strategy.global_rank
        plan = yield from self._plan(filepath)
        trouble = self.late.trouble()
        if trouble is None and me == plan.first:
            trouble = _tried(lambda: self.files.begin(io, plan.path, plan.save, plan.ranks, options))
        data = yield from self._union()  # and so nobody writes before the save is in the index
        if trouble is None:
            file = rank_file(plan.path, plan.save, me)
            trouble = _tried(lambda: io.save_checkpoint(self._own(checkpoint, plan), file, storage_options=options))
            self.late.tell(plan.save)
        here = yield from self._no_trouble(plan, trouble)
        if plan.first not in here:
            return False
        if me == plan.first:
            checkpoint[KEY] = {
                **self.shared(plan.save, here, data, self._strategy.clock.state_dict(), plan.adding_up),
                "consensus": exact(self._strategy.replica.flat, places_of(self._strategy)),
            }
            write = partial(io.save_checkpoint, checkpoint, plan.path, storage_options=options)
            trouble = _tried(lambda: self.late.write_main(plan.save, here, write))
        here = yield from self._no_trouble(plan, trouble)
        if me == plan.first:
            self.files.finish(io, plan.path, plan.save)
        return plan.first in here

    def _plan(self, filepath: str) -> Wait[Plan]:
        """The first rank's path and name for this save."""
        mine = json.dumps([filepath, secrets.token_hex(4), self._strategy.stepping.adds_up])
        words = yield from self._strategy.office.rounds.agree(mine.encode(), what="where to save")
        said = {rank: json.loads(words[rank]) for rank in sorted(words)}
        path, save, _ = said[min(said)]
        self._agreed[filepath] = path
        return Plan(path, save, tuple(said), tuple(rank for rank, (*_, adds_up) in said.items() if adds_up))

    def _no_trouble(self, plan: Plan, trouble: BaseException | None) -> Wait[tuple[int, ...]]:
        """Who is there, and wrote. Raises on all if one could not; what was written of the save is cleared away."""

        def give_up() -> None:
            self.files.give_up(self.io, plan.path, plan.save)

        return (yield from self._all_well(trouble, f"its part of the checkpoint {plan.path}", give_up))

    def _all_well(
        self, trouble: BaseException | None, what: str, give_up: Callable[[], None] = lambda: None
    ) -> Wait[tuple[int, ...]]:
        """Who is there, if all of them could write; else the first one gives up, and all raise."""
        word = "" if trouble is None else f"{type(trouble).__name__}: {trouble}"
        said = yield from self._strategy.office.rounds.agree(word.encode()[:2000], what="whether all could save")
        failed = {rank: sentence.decode(errors="replace") for rank, sentence in said.items() if sentence}
        if not failed:
            return tuple(sorted(said))
        if self._strategy.global_rank == min(said):
            give_up()
        if trouble is not None:
            raise trouble
        rank, sentence = min(failed.items())
        raise PeerFailedError(f"rank {rank} could not write {what}: {sentence}")

    def _union(self) -> Wait[dict[str, Any]]:
        """Where the data stand: the newest epoch, and all ranges of its order that somebody completed."""
        mine = self._strategy.feeding.state_dict()
        rows = torch.cat([torch.tensor([[mine["epoch"], 0]]), mine["done"]])
        parts = yield from words.gather_uneven(self._strategy.office.rounds, rows)
        others = [{"epoch": int(part[0, 0]), "done": part[1:]} for part in parts]
        return unite([mine, *others])

    def shared(
        self,
        save: str,
        ranks: tuple[int, ...],
        data: dict[str, Any],
        progress: dict[str, Any],
        adding_up: tuple[int, ...],
    ) -> dict[str, Any]:
        """What the main file says of them all."""
        strategy = self._strategy
        return {
            "version": VERSION,
            "save": save,
            "world": strategy.world_size,
            "members": strategy.members,
            "ranks_of_members": [list(ranks) for ranks in strategy.office.ranks_of_members],
            "ranks": list(ranks),
            "added_up": [rank for rank in adding_up if rank in ranks],
            "divided": strategy.stepping.divided,
            "strategy": strategy.name,
            "algorithm": type(strategy.algorithm).__name__,
            "data": data,
            "progress": progress,
            "trained": trained_set(strategy.trainer.lightning_module, strategy.replica),
        }

    def _own(self, checkpoint: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """What this rank's own file holds."""
        strategy = self._strategy
        me = strategy.global_rank
        keys = () if me == plan.first else own_keys(strategy)
        state = {key: checkpoint[key] for key in keys if key in checkpoint}
        state |= own_tensors(strategy)
        state["data"], state["loaders"] = strategy.feeding.state_dict(), strategy.feeding.loader_states()
        state["waits"] = self._waits
        state["parts"] = {name: part.state_dict() for name, part in all_parts(strategy, self.parts).items()}
        own = {"version": VERSION, "save": plan.save, "rank": me, "steps": strategy.steps, **state}
        return primitive(own)  # type: ignore[no-any-return]


def _tried(write: Callable[[], object]) -> BaseException | None:
    """The exception that `write` ended with: the others must hear of it before it is raised."""
    try:
        write()
    except Exception as error:  # `_no_trouble` raises it, on every rank
        return error
    return None
