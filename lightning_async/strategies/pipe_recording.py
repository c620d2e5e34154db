"""The event log of a stage: as every rank's, and of each pass of a batch a stamp of what it passed on.

    stage 0   F 17 --> 8c1f..   B 13 --> nothing          which stage first made something else, and of which batch,
    stage 1   F 17 --> 02ae..   B 15 --> 77d0..           shows at once, and not only in a loss two stages later
    last      loss of 17        B 17 --> 5b6e..

Between meetings of the log the pipe is full; at each it is drained (for a checkpoint, a stop, at the end). Rests and
what is evaluated between them change no weights: they are not in the log, but for replicas that average buffers there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_async.data.dealt import dealt_in_turn
from lightning_async.data.heard import Ear, Heard, StatefulHeard
from lightning_async.data.loader import is_shareable, remade
from lightning_async.data.stream import is_stateful
from lightning_async.pipeline.schedule import Pass
from lightning_async.strategies.facts import digest
from lightning_async.strategies.feeding import size_of
from lightning_async.strategies.pipe_data import stamp_of
from lightning_async.strategies.recording import Recording, Weights
from lightning_async.transport.record import plain

if TYPE_CHECKING:
    from lightning_async.strategies.pipe_batches import PipeBatches

PASSES = {"F": "forward", "B": "backward"}


class Held:
    """The weights that live on a stage, as `Recording` looks at a replica's."""

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters

    @property
    def flat(self) -> Tensor:
        """All of them, as bytes: they may be of several kinds."""
        parts = (p.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for p in self._parameters())
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *parts])


class StageRecording(Recording):
    """Where this stage's events go, if anywhere."""

    fed = ""
    """With what: see `Feeding.fed`; or of "several" loaders the numbers of samples."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What stands around the user's code: in a replay, the rank and the world of the run."""
    _numbered = 0
    """Loaders with numbered samples, of those that Lightning draws from together."""

    def passed(self, direction: Pass, batch: int, made: Tensor) -> None:
        """What a pass of a batch made is about to leave."""
        if self._scribe is not None:
            self._note(direction, [batch, stamp_of(made)])

    def clock(self, trainer: Trainer) -> None:
        """A batch begins; how many there are in an update may change from epoch to epoch."""
        super().clock(trainer)
        if self._scribe is not None:
            self._scribe.note("accumulate", trainer.accumulate_grad_batches, news=True)

    def skipped(self, batch: Any) -> None:
        """These samples are fetched in vain, where a run goes on in mid-epoch: workers draw for them too."""
        if self._scribe is not None:
            self._scribe.note("skipped", plain(batch if isinstance(batch, (list, tuple)) else [batch]))

    def taking(self) -> None:
        """A batch is trained on next. Workers may have fetched it before the last validation."""
        self._catch_up("taking")

    def epoch(self, epoch: int, size: int, *, batches: int | None = None) -> None:
        """The loaders that are noted from here on come in the place of those before."""
        super().epoch(epoch, size, batches=batches)
        self._numbered = 0

    def close(self) -> None:
        """A later fit may train on other data."""
        super().close()
        self.fed, self._numbered = "", 0

    def _took_numbers(self, loader: DataLoader[Any]) -> None:
        """Its samples have numbers."""

    def met(self, replica: Weights) -> None:
        """The pipe is drained: all gradients are applied."""
        self.strayed()
        if self._scribe is not None:
            self._note("drained", digest(replica.flat))

    def noted(self, strategy: PipeBatches, loader: object, *, done: int = 0) -> object:
        """The user's loader, of which each batch is written down; the first `done` are not trained on. A stream is
        heard."""
        if not self.hears:
            return loader
        trainer, size = strategy.trainer, size_of(loader)
        if type(loader) is not DataLoader or not is_shareable(loader):
            self.fed = "stream" if self.fed in ("", "stream") else "both"
            heard = StatefulHeard if is_stateful(loader) else Heard
            return heard(loader, _Drawing(self, lambda: self.epoch(trainer.current_epoch, size), self.around))
        self._took_numbers(loader)
        self._numbered += 1
        self.fed = "both" if self.fed in ("stream", "both") else "several" if self._numbered > 1 else "numbers"
        batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        length = len(batches) if isinstance(batches, Sized) else None

        def began() -> None:
            self.epoch(trainer.current_epoch, size, batches=length)
            self.dealt(dealt_in_turn(loader, cut=trainer.limit_train_batches != 1.0))

        noted = _Noted(batches, began, self.fetched, done, skipped=self.skipped, opens=partial(self.opens, loader))
        return remade(loader, noted)


class _Drawing(Ear):
    """That a stage drew is noted: what it drew follows from where it began, and from a batch's number (`draws`); of one
    stage alone from the random generators."""

    def __init__(
        self,
        recording: StageRecording,
        began: Callable[[], None],
        around: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._recording, self._began, self._around = recording, began, around

    def begins(self) -> AbstractContextManager[object]:
        self._began()
        self._recording.strayed()
        return self._around()

    def draws(self) -> AbstractContextManager[object]:
        self._recording.fetching()
        return self._around()

    def drew(self) -> None:
        self._recording.drew()


class _Noted:
    """A sampler of batches that says what it gives: the order of an epoch is drawn before that is said."""

    def __init__(
        self,
        batches: Iterable[Any],
        began: Callable[[], None],
        fetched: Callable[[Any], None],
        done: int,
        *,
        skipped: Callable[[Any], None],
        opens: Callable[[], None],
    ) -> None:
        self._batches, self._began, self._fetched, self._done = batches, began, fetched, done
        self._skipped, self._opens = skipped, opens

    def __len__(self) -> int:
        return len(cast(Sized, self._batches))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_batches"], name)

    def __iter__(self) -> Iterator[Any]:
        self._opens()
        return self._noted()

    def _noted(self) -> Iterator[Any]:
        done, self._done = self._done, 0
        for at, batch in enumerate(self._batches):
            if at == done:
                self._began()
            (self._fetched if at >= done else self._skipped)(batch)
            yield batch
