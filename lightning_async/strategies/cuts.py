"""Checkpoints by steps without a meeting: markers cut a consistent state of the run while everybody trains on.

    rank 0, a save is due    begins cut 7: records itself, then posts a marker to each
    every rank               at its first marker: records itself behind the batch under way, posts markers
                             all markers are here: says so on the board, posts what it brings into the consensus
    rank 0, all is here      asks the callbacks whose save it is where to; says it on the board
    every rank               writes its own file, in a thread of its own, and says so
    rank 0's thread          all are written: the main file takes its name; says so; what it replaces goes
    every rank               its callbacks call the files so

No rank waits for another one in any of this. A cut is given up, in a sentence of the log, when a member dies before its
part is here, or does not take part for as long as a meeting may last; also where rank 0 dies. A meeting ends what is
open, and saves itself what is due. Whatever is given up, the checkpoint before stays as it is.

"Rank 0" is the first that lives; what it does for all: `cut_first.py`. What cuts are: `algorithms/cut.py`,
`algorithms/cutting_mail.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_async.algorithms.cut import Part, from_before, unpacked
from lightning_async.algorithms.cutting_mail import CuttingMail
from lightning_async.strategies import compat
from lightning_async.strategies.cut_consensus import key, piece_of, said_of
from lightning_async.strategies.cut_files import Record, own_file, record, write
from lightning_async.strategies.cut_first import First
from lightning_async.strategies.cut_names import Names, Told
from lightning_async.strategies.cut_places import places_of
from lightning_async.strategies.rank_files import rank_file
from lightning_async.strategies.saved import agree_on_saved
from lightning_async.strategies.writer import Writer
from lightning_async.transport.mail import SUM, Letter, Message, Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

T = TypeVar("T")


class Cuts:
    """The cuts of a run, seen from one rank.

    Attributes:
        io: What writes, in a thread of its own; None where no cut is ever saved.
        first: What this rank does for all, where it is the first.
        saved_at: The run's step at which the last cut was due that was saved; at meetings all know the same.
    """

    def __init__(self, strategy: AsyncStrategy) -> None:
        self._strategy = strategy
        self.io: AsyncCheckpointIO | None = None
        self._names: Names | None = None
        self._forget()

    def _forget(self) -> None:
        if self._names is not None:
            self._names.forget()
        self._names = None
        self.first = First(self._strategy)
        self._meets = False
        self.saved_at = 0
        self._callbacks: list[ModelCheckpoint] = []
        self._mail: CuttingMail[Record | None] | None = None
        self._part: Part[Any] | None = None  # complete, and nobody has said yet where to
        self._sum: Future[tuple[Tensor, int]] | None = None  # what it brings; None: it is posted
        self._sent = 0  # as many elements of it are
        self._adding: list[tuple[Letter, Future[None]]] = []
        self._last: dict[str, Any] = {}  # what was said of the last cut that was saved
        self._saved_before = 0  # `saved_at` before that one

    def saves(self, callback: ModelCheckpoint) -> bool:
        """Whether this callback's saves by steps are cuts: one that goes by a metric, or makes a link at once, needs a
        meeting."""
        by_steps = self._strategy.saves == "cut" and compat.saves_every(callback) > 0
        return by_steps and callback.monitor is None and callback.save_last != "link"

    @property
    def are_due(self) -> bool:
        """Whether any callback saves so in this fit."""
        return bool(self._found())

    def _found(self) -> list[ModelCheckpoint]:
        trainer = self._strategy.trainer
        found = [c for c in compat.callbacks(trainer) if isinstance(c, ModelCheckpoint) and self.saves(c)]
        return [] if compat.fast_dev_run(trainer) else found

    def begin(self, cut: Mapping[str, Any] | None) -> None:
        """A fit begins; where it goes on from a cut, with this rank's part of it."""
        strategy = self._strategy
        self._forget()
        self._callbacks = self._found()
        if self._callbacks:
            module = strategy.trainer.lightning_module
            places_of(module, strategy.replica, strategy.lightning_module_state_dict(), strategy.name)  # or it refuses
            self._names = Names(self._callbacks, strategy.office.carrier)
            self.first = First(strategy, self._callbacks, self._names)
            self.io = AsyncCheckpointIO(strategy.checkpoint_io)
            compat.let_write(self.io, Writer(strategy.checkpoints.late.patience))
        if self._callbacks or cut is not None:
            part: Part[None] = Part(0, 0, (), None) if cut is None else unpacked(cut)
            carrier, restored = strategy.office.carrier, (from_before(part.letters), part.losses)
            self._mail = CuttingMail(carrier, self._record, letters=restored[0], losses=restored[1])
            strategy.office.mail = strategy.office.recording.through(self._mail, *restored)

    def between(self, callback: Callback, ask: Callable[[], object]) -> None:
        """Behind a batch with no meeting, in the place of a callback that may save."""
        if self._mail is None or callback not in self._callbacks:
            return
        if callback is self._callbacks[0]:
            self._look(self._mail)
        if callback in self.first.due:
            self.first.ask(callback, ask)
        if self.first.due and callback is self._callbacks[-1]:
            self.first.order()

    def attend(self) -> None:
        """This rank's epoch is over, and it waits for the others, between two steps: it takes part as ever."""
        trainer, progress = self._strategy.trainer, self._strategy.clock.progress
        if self._mail is None or progress is None:
            return
        progress.look()
        for callback in self._callbacks:  # as the loop does behind a batch; they ask `between`
            callback.on_train_batch_end(trainer, trainer.lightning_module, None, {}, 0)

    def meet(self) -> Wait[None]:
        """All have come to a meeting: what is open ends; what rank 0 had decided to save by now is saved."""
        if self._mail is None:
            return
        while (ordered := self.first.ordered) is not None and not ordered.done():
            yield "the index of a checkpoint to be written"
        if ordered is not None:
            self._tell()
        self.first.drop()
        self._sum = None
        self._meets = True
        rounds = self._strategy.office.rounds
        yield from self._mail.finish(rounds)
        while self._mail.taken() is not None:
            pass  # nobody has trained since: the meeting saves what is due
        self._meets = False
        word = [self._last, None if self._names is None else self._names.says()]
        said = yield from rounds.agree(json.dumps(word).encode(), what="the last cut")
        theirs, names = json.loads(said[min(said)])
        if self._part is not None and self._part.number == theirs.get("number"):
            self._follow(theirs)
        self._part = None
        if self._names is not None:
            self._names.meet(names)
        if len(set(said.values())) > 1 or (names is not None and names["whole"] is None):  # not all know the same
            yield from agree_on_saved(self._strategy.trainer, rounds)
        self._last, self.saved_at = theirs, theirs.get("at", 0)

    def settle(self) -> Wait[None]:
        """The run ends, and all is written (`Checkpoints.settle`): the names of all are those of whole files."""
        if self._names is None:
            return
        while self._names.open and self._names.look() is None:
            yield "the board to say whether the last checkpoint is whole"
        yield from agree_on_saved(self._strategy.trainer, self._strategy.office.rounds)

    def close(self) -> None:
        """The fit is over. What could be written is written by now (`LateFiles.leave`): a disk that hangs is named in
        the log, and not waited for. Idempotent."""
        if self.io is not None:
            with suppress(Exception):  # the run has ended with it, or said so
                self.io.teardown()  # what is still to be written here may fail, and those behind it look at this
            self.io = None
        self._forget()

    # -- every rank ---------------------------------------------------------------------------------------------------

    def _look(self, mail: CuttingMail[Record | None]) -> None:
        """Between two steps."""
        strategy = self._strategy
        if (trouble := strategy.checkpoints.late.trouble()) is not None:
            raise trouble
        if self._names is not None and self._names.look() is False:
            self.saved_at = self._saved_before
            self._last = {**self._last, "at": self.saved_at}
        if strategy.is_global_zero:
            self.first.begin_if_due(mail, self.saved_at)
        self._hear()
        mail.between_steps()
        while self._part is None and (part := mail.taken()) is not None:  # of one at a time it is heard what becomes
            self._ended(part)
        self._take_sums()
        self._send()
        if self.first.ordered is not None:
            if self.first.ordered.done():
                self._tell()
        elif self.first.gathering is not None and not self.first.gather(self.saved_at):
            self._part = self._sum = None

    def _record(self) -> Record | None:
        strategy = self._strategy
        return None if self._meets else record(strategy, strategy.checkpoints.parts, first=strategy.is_global_zero)

    def _ended(self, part: Part[Any]) -> None:
        """This rank's part is complete, or cannot be any more."""
        self._part = self._sum = None
        mine, open_ = part.members[0] == part.member, self.first.gathering
        if not part.deaths and not (mine and (open_ is None or open_.number != part.number)):  # else it was given up
            self._part, self._sum, self._sent = part, self._later(partial(self._brings, part)), 0
        self._strategy.office.carrier.propose(key(part.number, part.member), said_of(part))

    def _brings(self, part: Part[Record]) -> tuple[Tensor, int]:
        mine = part.state
        worth = self._strategy.algorithm.brings(mine.weights, mine.algorithm, part.letters)  # type: ignore[attr-defined]
        return torch.cat([worth.vector.to(mine.weights.dtype), mine.buffers]), worth.mass

    def _send(self) -> None:
        """Post what the part brings to who is to have it, as soon as it is known and there is room."""
        if self._part is None or self._sum is None or not self._sum.done() or self._sum.exception() is not None:
            return
        (body, mass), first = self._sum.result(), self._part.members[0]
        if first == self._part.member:
            assert self.first.gathering is not None  # or the part would not be held
            self._later(partial(self.first.gathering.add, first, body, mass))
            self._sum = None
            return
        numel, itemsize, post = body.numel(), body.element_size(), self._strategy.office.carrier.post
        each = max(1, piece_of(numel * itemsize, len(self._part.members)) // itemsize)
        about: dict[str, int] = {"weight": mass, "samples": numel, "reference": self._part.number}
        while (at := self._sent) < numel and post(first, Message(SUM, body[at : at + each], version=at, **about)):
            self._sent += each
        if self._sent >= numel:
            self._sum = None

    def _take_sums(self) -> None:
        """Add up what came; what belongs to no cut of this rank goes."""
        carrier, gathering = self._strategy.office.carrier, self.first.gathering
        for letter in carrier.take(SUM):
            message = letter.message
            if gathering is None or message.reference != gathering.number or message.body is None:
                carrier.folded(letter)
            else:
                add = partial(gathering.add, at=message.version, numel=message.samples)
                added = self._later(partial(add, letter.peer, message.body, message.weight))
                self._adding.append((letter, added))
        for letter, added in [one for one in self._adding if one[1].done()]:
            carrier.folded(letter)
            self._adding.remove((letter, added))

    def _hear(self) -> None:
        """What becomes of this rank's part."""
        part, carrier = self._part, self._strategy.office.carrier
        if part is None or part.members[0] == part.member:
            return
        if (word := carrier.decided(key(part.number))) is not None:
            carrier.forget(key(part.number))
            self._follow(json.loads(word))
        elif part.members[0] not in carrier.members():
            self._part = None

    def _follow(self, told: Mapping[str, Any]) -> None:
        """Write this rank's own files, wherever rank 0 said; its names for them count when all are whole."""
        part, self._part = self._part, None
        assert part is not None  # it is this one's
        io, late = self._strategy.checkpoint_io, self._strategy.checkpoints.late
        for path, name in told.get("saves", ()):
            file, make = rank_file(path, name, part.member), partial(own_file, part, name)
            self._later(partial(write, io, partial(make, told["progress"], told["steps"]), file))
            late.tell(name)
        late.queued()
        if "number" in told:
            self._saved(told, Told(told["number"], part.members[0], told["names"]))

    def _tell(self) -> None:
        """This rank is the first, and what it has ordered is written down."""
        assert self._part is not None  # since then
        self.first.tell(self._part, self._saved)
        self._part = None

    def _saved(self, last: Mapping[str, Any], told: Told) -> None:
        """A cut is on its way into files."""
        assert self._names is not None  # who saves cuts has callbacks
        self._names.told(told)
        self._saved_before = self.saved_at
        self._last, self.saved_at = dict(last), last["at"]

    def _later(self, job: Callable[[], T]) -> Future[T]:
        return compat.in_its_thread(self.io, job)
