"""What the first rank does for a cut: it begins it, gathers it, asks its callbacks where to, and tells all.

    begin_if_due    a multiple of a callback's steps is passed: the markers leave
    gather          all is here, or it is given up, in a sentence
    ask             each callback whose save it is says where to, and what goes for it
    order           what is under way is written down, before any file of it is there
    tell            all write their own files; the main file comes behind these, then what it replaces goes

One cut at a time. In all of this nobody waits; what waits for files is the writer's thread.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.algorithms.cut import Part
from lightning_async.algorithms.cutting_mail import CuttingMail
from lightning_async.strategies import compat, cut_names
from lightning_async.strategies.cut_consensus import Gathering, key
from lightning_async.strategies.cut_files import (
    Record,
    Save,
    data_of_all,
    main_file,
    own_file,
    write,
    write_down,
)
from lightning_async.strategies.cut_names import Names, Told
from lightning_async.strategies.rank_files import rank_file
from lightning_async.strategies.saved import names_of

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

log = logging.getLogger(__name__)
AGAIN = 1.0
"""Seconds behind a death after which the next cut may begin: by then all have heard of it."""


class First:
    """The cuts of one rank, as long as it is the first that lives.

    Args:
        strategy: Whose.
        callbacks: Those whose saves are cuts.
        names: What these call their files; None where there are none.

    Attributes:
        gathering: The cut that this rank has begun and not ended.
        due: The callbacks that are to be asked where to.
        asking: Whether one of them is being asked.
        ordered: Done when what is to be written is written down; None where nothing is.
    """

    def __init__(
        self, strategy: AsyncStrategy, callbacks: Sequence[ModelCheckpoint] = (), names: Names | None = None
    ) -> None:
        self._strategy, self._callbacks, self._names = strategy, callbacks, names
        self.asking = False
        self.gathering: Gathering | None = None
        self.due: list[Callback] = []
        self.ordered: Future[None] | None = None
        self._tried_at = 0
        self._not_before = 0.0
        self._where: tuple[dict[str, Any], int] = {}, 0  # how far the run was then, and at which of its steps
        self._saves: list[Save] = []
        self._removals: list[Callable[[], object]] = []

    def save(self, checkpoint: Mapping[str, Any], filepath: Any, options: Any) -> None:
        """A callback says where to."""
        keys = {c.state_key for c in self._callbacks}
        named = {name: state for name, state in checkpoint.get("callbacks", {}).items() if name in keys}
        name = secrets.token_hex(4) if "optimizer_states" in checkpoint else ""
        self._saves.append(Save(os.fspath(filepath), name, tuple(checkpoint), dict(named), options))

    def remove_behind(self, remove: Callable[[], object]) -> None:
        """And what that replaces."""
        self._removals.append(remove)

    def drop(self) -> None:
        """All have met: what is open ends."""
        self.gathering, self.due = None, []

    def begin_if_due(self, mail: CuttingMail[Record | None], saved_at: int) -> None:
        """One cut at a time, and none before the files of the last one are written: each is in memory."""
        strategy, progress = self._strategy, self._strategy.clock.progress
        if progress is None or self.gathering is not None or self.ordered is not None:
            return
        steps, late = progress.steps(), strategy.checkpoints.late
        if self._due_at(steps, saved_at) and late.idle and strategy.office.carrier.now() >= self._not_before:
            if (
                mail.newest > 0
            ):  # of a first rank that has died some may hold a part yet: where nobody spoke of it, it ends
                strategy.office.carrier.propose(key(mail.newest), b"{}")
            number = mail.newest + 1
            self.gathering = Gathering(number, steps, strategy.office.carrier)
            mail.begin_cut(number)

    def _due_at(self, steps: int, saved_at: int) -> list[Callback]:
        """The callbacks of whose steps a multiple was passed by then."""
        last = max(self._strategy.clock.met_at, saved_at, self._tried_at)
        every = {callback: compat.saves_every(callback) for callback in self._callbacks}
        return [callback for callback, each in every.items() if steps // each > last // each]

    def gather(self, saved_at: int) -> bool:
        """Is all here? Then the callbacks are to be asked that it is for. False: it is given up."""
        gathering, office = self.gathering, self._strategy.office
        assert gathering is not None  # or nobody asks
        gathering.hear()
        if why := gathering.why_not(office.limit):
            if gathering.by_death:
                self._not_before = office.carrier.now() + AGAIN
            else:
                self._tried_at = gathering.steps
            self.gathering = None
            office.carrier.propose(key(gathering.number), b"{}")
            log.warning("a checkpoint is given up, and the one before it stays: cut %d: %s", gathering.number, why)
            return False
        if gathering.whole:
            self._where = self._strategy.clock.state_at(gathering.counts)  # a meeting may come before it is told
            self.due = self._due_at(gathering.steps, saved_at)
        return True

    def ask(self, callback: Callback, ask: Callable[[], object]) -> None:
        """Where to: the callback sees the step of the cut, and finds that it is its own."""
        assert isinstance(callback, ModelCheckpoint)
        assert self._names is not None  # or none would be due
        trainer, (_, steps) = self._strategy.trainer, self._where
        now, before = trainer.global_step, names_of(callback)
        compat.set_global_step(trainer, steps)
        self.asking = True
        try:
            with compat.saves_at_once(callback):
                ask()
        finally:
            self.asking = False
            compat.set_global_step(trainer, now)
            self._names.asked(callback, before)

    def order(self) -> None:
        """All are asked. What is under way is written down before any of its files is there."""
        self.due = []
        strategy, gathering = self._strategy, self.gathering
        assert gathering is not None  # as for `ask`
        begin = partial(strategy.checkpoints.files.begin, strategy.checkpoint_io)
        self.ordered = self._later(partial(write_down, begin, gathering.members, *self._saves))

    def tell(self, part: Part[Any], saved: Callable[[Mapping[str, Any], Told], object]) -> None:
        """Say it to all, and have the first rank's own files written.

        Args:
            part: This rank's.
            saved: What this rank is to do about it, as all others do.
        """
        strategy, gathering = self._strategy, self.gathering
        assert gathering is not None  # since `order`, and so is this
        assert self.ordered is not None
        self.ordered.result()  # or the error that it ended with
        late, files, io = strategy.checkpoints.late, strategy.checkpoints.files, strategy.checkpoint_io
        progress, steps = self._where
        assert self._names is not None
        number, names, carrier = gathering.number, self._names.now(), strategy.office.carrier
        named = [(save.path, save.name) for save in self._saves if save.name]
        last = {"number": number, "at": gathering.steps, "saves": named, "names": names}
        last |= {"progress": progress, "steps": steps}
        saved(last, Told(number, part.member, names))
        carrier.propose(key(number), json.dumps(last).encode())
        for old in (key(number - 1), cut_names.key(number - 2)):  # all have heard these
            carrier.forget(old, gone=True)
        data, scheduled = data_of_all(part.state, gathering.data), {"scheduled": part.state.scheduled}
        for save in self._saves:
            who = gathering.members  # any of them may have added up gradients: their files say
            shared = strategy.checkpoints.shared(save.name, who, data, {**progress, **scheduled}, who)
            main = partial(main_file, part.state, gathering.total, save, shared, steps)
            write_main = partial(self._later, partial(write, io, main, save.path, save.options))
            if not save.name:
                write_main()
                continue
            own = partial(own_file, part, save.name, progress, steps)
            self._later(partial(write, io, own, rank_file(save.path, save.name, part.member), save.options))
            late.tell(save.name)
            late.write_main(save.name, gathering.members, write_main)
            late.behind(partial(files.finish, io, save.path, save.name))
        late.say(cut_names.key(number))
        for remove in self._removals:
            late.behind(remove)
        late.queued()
        self.gathering = self.ordered = None
        self._saves, self._removals = [], []

    def _later(self, job: Callable[[], Any]) -> Future[Any]:
        return compat.in_its_thread(self._strategy.cuts.io, job)
