"""The event log of a run: one file a rank in one folder, events only; without a folder nothing is recorded.

    runs/17/rank0.jsonl        rank1.jsonl          the first fit that was recorded into this folder
    runs/17/fit2.rank0.jsonl   fit2.rank1.jsonl     the next one: of the same Trainer, or of the job that was requeued

    header    who, of which run; seed, versions, threads; the strategy and its knobs; what the Trainer was told
    events    what the algorithm asked its carrier and was told, what a law of shrinking said, the loss of each batch
    notes     the samples of each batch, or how many a rank drew of data of its own (`drawing`); what the optimizers and
              the random generators were told; digests of the weights, to be compared with;
              for people: what an epoch deals out, when each step ended, what arrived and how late, the accounts

That is all a replay needs: weights and gradients follow from it. A replay calls the same methods (`replaying`): what is
written here is looked up there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_async.arrival import Arrival
from lightning_async.data.dealt import Dealt
from lightning_async.strategies.facts import Recorded, about, digest, knobs_of_groups, start
from lightning_async.transport import chance
from lightning_async.transport.mail import Carrier, Letter, Loss, Mail, Wait
from lightning_async.transport.record import RecordingCarrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.traffic import plain

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy
    from lightning_async.strategies.waiting import Flags

Members = Sequence[Sequence[int]]
"""The ranks of each member, the first of which speaks for it."""
EVERY = 100  # steps between two digests of the weights


class Weights(Protocol):
    """What a rank trains: a replica, or the part of one that lives on a stage."""

    @property
    def flat(self) -> Tensor:
        """All of it."""


class Scribe(Protocol):
    """A carrier that notes: the recording one writes, the replaying one looks up. Both return what is in the log."""

    def attends(self) -> Iterator[None]:
        """A look at the mail by who waits for the others."""

    def note_fetched(self, sample_ids: Iterable[Any]) -> None:
        """A batch was fetched."""

    def note_batch(self, loss: float | None = None) -> float | None:
        """A batch was trained on."""

    def note_meeting(self) -> None:
        """The members meet here."""

    def note_factor(self, peer: int, base: int, law: Callable[[], float]) -> float:
        """What a law says that a contribution counts."""

    def note(self, name: str, value: Any, *, news: bool = False) -> Any:
        """Something to compare with, or to be told."""

    def finish(self) -> None:
        """The program ended."""


class Recording:
    """Where this rank's events go, if anywhere."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        if folder is not None and (not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder)):
            raise ValueError(f"`record` must be the path of a folder, or None, got {folder!r}")
        self._folder = None if folder is None else os.fspath(folder)
        self._file: TextIO | None = None
        self._scribe: Scribe | None = None
        self._about: dict[str, Any] = {}
        self._chance: dict[str, str] = {}
        self._loss: float | None = None
        self._met, self._drawn, self._opened = False, 0, False
        self.flags: Flags | None = None

    @property
    def on(self) -> bool:
        """Whether events are written."""
        return self._folder is not None

    @property
    def hears(self) -> bool:
        """Whether there is a log: one that is written, or one that is replayed."""
        return self._scribe is not None

    def introduce(self, strategy: Recorded) -> None:
        """What the header is to say of this run."""
        if self.on:
            self._about = about(strategy)

    def number(self, rounds: Rounds) -> Wait[int]:
        """Which fit of its folder this one is: the next one behind all that any rank finds there."""
        mine = 1 + max(fits_in(Path(self._folder or "")), default=0)
        said = yield from rounds.agree(str(mine).encode(), what="which recording this is")
        return max(int(word) for word in said.values())

    def of(self, carrier: Carrier, *, fit: int | None, run: str = "", members: Members = ()) -> Carrier:
        """The carrier that the algorithm gets: one that writes down its answers, or the carrier itself.

        Only a fit is recorded, each into files of its own: nothing is overwritten. Where a member has several ranks,
        each of them has a log, and what they tell each other is in none: it follows from what is in them. Each line is
        handed to the system at once: the log of a killed rank is whole.
        """
        if self._folder is None or fit is None:
            return carrier
        path = Path(self._folder) / log_name(carrier.me, fit)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("x", encoding="utf-8", buffering=1)
        except FileExistsError:
            raise RuntimeError(
                f"{path} is there already: another run records into the same folder now; give each its own `record=`"
            ) from None
        seed = os.environ.get("PL_GLOBAL_SEED")
        known = {"run": run, **self._about}
        if any(len(ranks) > 1 for ranks in members):
            known["ranks_of_members"] = [list(ranks) for ranks in members]
        recorder = RecordingCarrier(carrier, self._file, seed=int(seed) if seed else None, about=known)
        self._scribe, self._chance, self._loss, self._drawn = recorder, {}, None, 0
        self._met = self._opened = False
        return recorder

    def through(self, mail: Mail, letters: Sequence[Letter], losses: Sequence[Loss]) -> Mail:
        """The algorithm's mail goes through another one, which has these of an earlier run; what the algorithm gets."""
        if not isinstance(self._scribe, RecordingCarrier):
            return mail
        self._scribe.through(mail)
        return self._scribe

    # -- what happens in a run, in this order -------------------------------------------------------------------------

    def opens(self, loader: DataLoader[Any]) -> None:
        """The first iterator of an epoch draws the seed of its workers next; what it is drawn from is noted."""
        if self._scribe is not None and loader.num_workers and not self._opened:
            self._opened = True
            self._scribe.note("workers", chance.packed(loader.generator))

    def epoch(self, epoch: int, size: int, *, batches: int | None = None) -> None:
        """The first batch of an epoch is about to be fetched from `size` samples; of so many, if that is known."""
        self._met = self._opened = False
        if self._scribe is not None:
            length = {} if batches is None else {"batches": batches}
            self._note("epoch", {"epoch": epoch, "data": size, **length, "chance": self._news_of_chance()})

    def dealt(self, dealt: Dealt | None) -> None:
        """What is to come in this epoch, for an audit; None: nobody knows."""
        if self._scribe is not None and dealt is not None:
            self._scribe.note("dealt", dealt.plain())

    def strayed(self) -> None:
        """The random generators may not be where the last batch left them."""
        self._met = True

    def fetching(self) -> None:
        """A batch is fetched next: what a validation drew comes before what the data set draws."""
        self._catch_up("fetching")

    def fetched(self, batch: Any) -> None:
        """These samples are fetched; they may be trained on later, or, at a sudden end, never."""
        if self._scribe is not None:
            self.fetching()
            self._scribe.note_fetched(batch if isinstance(batch, (list, tuple)) else [batch])

    def drew(self) -> None:
        """A batch of the rank's own data was fetched, whose samples have no numbers; as with those that have."""
        if self._scribe is not None:
            self._drawn += 1
            self._scribe.note("drawn", self._drawn)

    def cannot_be_replayed(self, why: str) -> None:
        """Say at once what these logs will be for, here and in them: `replay` refuses with these words."""
        if self._file is not None and self._scribe is not None:
            self._scribe.note("unreplayable", why)
            rank_zero_warn(
                f"the logs in {self._folder} will be for `lightning-async report` and `audit` only: this run cannot be "
                f"replayed, since {why}"
            )

    def start(self, strategy: Recorded) -> None:
        """Training starts from these weights."""
        if self._scribe is not None:
            self._note("start", start(strategy))

    def set_off(self, trainer: Trainer) -> None:
        """A meeting is over."""
        if self._scribe is not None:
            facts = {"accumulate": trainer.accumulate_grad_batches, "chance": self._news_of_chance()}
            self._note("off", facts)
            self._time("off")

    def clock(self, trainer: Trainer) -> None:
        """A batch begins: at which step of the run, and whether as the last of its epoch."""
        if self._scribe is not None:
            last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self._note("clock", [trainer.global_step, last], news=True)

    def step_with(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> None:
        """An optimizer is about to step: its learning rate and what else is a number."""
        if self._scribe is not None:
            number = next((i for i, one in enumerate(optimizers) if one is optimizer), 0)
            self._note(f"knobs{number}", knobs_of_groups(optimizer), news=True)

    def loss(self, outputs: Any) -> None:
        """What the training step returned; its loss is kept for `batch` if it can be read without waiting."""
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._loss = None
        if isinstance(found, Tensor) and found.numel() == 1 and found.device.type == "cpu" and self._scribe is not None:
            self._loss = float(found)

    def batch(self) -> None:
        """A batch was trained on."""
        if self._scribe is not None:
            self._compare_loss(self._loss, self._scribe.note_batch(self._loss))
            self._time("batch")

    def arrived(self, arrivals: Sequence[Arrival]) -> None:
        """These were folded, refused or lost."""
        if self._scribe is not None and arrivals:
            told = [(a.peer, a.base, a.launched, a.folded, round(a.seconds, 6), a.factor, a.fate) for a in arrivals]
            self._scribe.note("arrivals", told)

    def met_with(self, strategy: AsyncStrategy, apart: float) -> None:
        """What is known of a meeting: the accounts, how far apart the replicas were (squared), the traffic so far."""
        if self._scribe is not None:
            self._scribe.note("accounts", strategy.accounts())
            self._scribe.note("spread", apart**0.5)
            self._scribe.note("traffic", plain(strategy.traffic(), strategy.kinds))

    def factor(self, arrival: Arrival, law: Callable[[], float]) -> float:
        """What a law says that a contribution counts; returns what the log says."""
        return law() if self._scribe is None else self._scribe.note_factor(arrival.peer, arrival.base, law)

    def mark(self, name: str) -> bool:
        """Something is done here because of the others; of a replay: whether it was."""
        return self._scribe is not None and bool(self._scribe.note(name, True))

    def told(self, name: str, value: float) -> float:
        """A number that the algorithm is told and no replay can find out; returns the recorded one."""
        recorded = None if self._scribe is None else self._scribe.note(name, value)
        return value if recorded is None else float(recorded)

    def stepped(self, step: int, replica: Weights) -> None:
        """A step was taken, and what came was folded."""
        if self._scribe is not None and step % EVERY == 0:
            self._note("weights", digest(replica.flat))

    def attends(self) -> Iterator[None]:
        """A look at the mail, by who waits for the others to come to a meeting."""
        return iter((None,)) if self._scribe is None else self._scribe.attends()

    def meeting(self, replica: Weights) -> None:
        """The members meet, each with its own weights."""
        if self._scribe is not None:
            self._time("meet")
            self._note("own", digest(replica.flat))
            self._scribe.note_meeting()

    def met(self, replica: Weights) -> None:
        """They agreed on these weights."""
        self._met = True
        if self._scribe is not None:
            self._note("consensus", digest(replica.flat))

    def finish(self) -> None:
        """The training ended, and not by an accident."""
        if self._scribe is not None:
            self._scribe.finish()

    def close(self) -> None:
        """Nothing more is written. Idempotent."""
        if self._file is not None:
            self._file.close()
        self._file = self._scribe = None

    # -- inside ------------------------------------------------------------------------------------------------------

    def _catch_up(self, name: str) -> None:
        """Write down where the random generators are, if something else may have drawn since the last time."""
        if self._met and self._scribe is not None:
            self._note(name, {"chance": self._news_of_chance()})
        self._met = False

    def _time(self, what: str) -> None:
        """When it was, and how long this rank's thread had been busy with exchange, and with waiting, by then."""
        if self._scribe is not None and self.flags is not None:
            seconds = (time.monotonic(), self.flags.spent, self.flags.waited)
            self._scribe.note("time", [what, *(round(second, 6) for second in seconds)])

    def _note(self, name: str, value: Any, *, news: bool = False) -> None:
        if self._scribe is not None:
            self._compare(name, value, self._scribe.note(name, value, news=news))

    def _compare(self, name: str, now: Any, recorded: Any) -> None:
        """While a run is recorded there is nothing to compare."""

    def _compare_loss(self, now: float | None, recorded: float | None) -> None:
        """See `_compare`."""

    def _news_of_chance(self) -> dict[str, str]:
        """The random generators that are not as they were last time: most programs use one of the three."""
        written = chance.write(chance.taken())
        news = {name: state for name, state in written.items() if self._chance.get(name) != state}
        self._chance = written
        return news


def log_name(rank: int, fit: int = 1) -> str:
    """The file of a rank's events in the first, second, ... fit that was recorded into a folder."""
    return f"rank{rank}.jsonl" if fit == 1 else f"fit{fit}.rank{rank}.jsonl"


def fits_in(folder: Path) -> list[int]:
    """The numbers of the fits that were recorded into this folder, the newest one last."""
    names = (re.fullmatch(r"(?:fit(\d+)\.)?rank\d+\.jsonl", path.name) for path in folder.glob("*.jsonl"))
    return sorted({int(name[1] or 1) for name in names if name})
