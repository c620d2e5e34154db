"""A stream is the user's own loader, watched: a bookmark lies behind the last batch that was trained on.

    the loader itself    1 2 3 4 5 6|          Lightning has fetched one batch ahead: its state is that of batch 6
    trained on           1 2 3 4 5             being trained on: 5
    the bookmark         1 2 3 4|              the loader's state right after batch 4: what a checkpoint needs

Who came to the stream's end before the others did waits for them, and does so again in a run that was saved then: that
epoch is over for it (`Streams.over`), though its state reads as a beginning.

A stream has no positions, so it is not shared out: every rank trains on all that its own loader yields, and each rank
has its own bookmark. Only states are kept, one for each batch on its way, and no batch.

Where the state comes from: from the loader, if it has a `state_dict` (torchdata's StatefulDataLoader, litdata's
StreamingDataLoader, one's own); else from the data set of a DataLoader without workers. The data set of a DataLoader
with workers is copied into them and advances there, unseen: such a stream has no bookmark.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_async.data.around import Around
from lightning_async.data.heard import DEAF, Ear, drawn
from lightning_async.data.skipped import count_once

_OWN = (
    *("_source", "_begun", "_over", "_ear", "_way", "_mark", "_handed"),
    *("_ended", "_moved", "_cut", "_live", "_loaded", "_resumed"),
)


class Stream(Around, own=_OWN):
    """A loader with a bookmark.

    Args:
        loader: The user's loader.
        begun: Is called when an iterator draws its first batch.
        over: Whether this epoch has nothing for this rank, whatever the loader has.
        ear: Who hears of what is drawn.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        begun: Callable[[], object] = lambda: None,
        over: Callable[[], bool] = lambda: False,
        ear: Ear = DEAF,
    ) -> None:
        super().__init__(loader)
        self._source = source_of(loader)
        self._begun = begun
        self._over = over
        self._ear = ear
        self._way: deque[Any] = deque()
        self._mark: Any = None
        self._loaded: Any = None
        self._handed = 0
        self._ended = self._moved = self._cut = self._resumed = False
        self._live: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        with self._ear.begins():
            self._begun()
            over = self._over()
            went_on = not over and self._back()
            live = None if over else self._made()
        if live is None:
            self._ended = True
            return
        yield from self._drawn(live)
        if went_on and not self._handed:  # it was cut right at its end
            with self._ear.begins():
                live = self._made()
            yield from self._drawn(live)
        self._end()

    def _made(self) -> Iterator[Any]:
        if self._live is None:
            self._live = iter(self._loader)
            count_once(self._live, self._loaded)
            self._loaded = None
        return self._live

    def _drawn(self, live: Iterator[Any]) -> Iterator[Any]:
        for batch in drawn(live, self._ear):
            self._way.append(self._state())
            self._handed += 1
            yield batch
        self._live = None

    @property
    def dry(self) -> bool:
        """Whether there is nothing more in this epoch and all that came is trained on."""
        return not self._way and (self._ended or self._handed == length_of(self._loader))

    def trained(self) -> None:
        """The oldest batch that came was trained on: the bookmark moves behind it."""
        if self._way:
            self._mark, self._moved = self._way.popleft(), True

    def cut(self) -> None:
        """The epoch ends here, by a limit: the next one goes on from here, as a run does that was saved here."""
        self._cut = self._cut or not self._ended

    def bookmark(self) -> Any:
        """The state right after the last batch that was trained on; None where there is none."""
        return self._state() if self._mark is None else self._mark

    def go_to(self, bookmark: Any, *, in_mid_epoch: bool = True) -> None:
        """Go on from this rank's own bookmark with the next iterator: of the same epoch, or of the next one."""
        if self._source is not None and bookmark is not None:
            self._resumed, self._cut = True, not in_mid_epoch
            self._turn_to(bookmark)

    def _turn_to(self, bookmark: Any) -> None:
        self._source.load_state_dict(copy.deepcopy(bookmark))
        self._mark = self._loaded = bookmark
        self._way.clear()
        self._live = None

    def _state(self) -> Any:
        return None if self._source is None else copy.deepcopy(self._source.state_dict())

    def _back(self) -> bool:
        """A new iterator; whether it goes on: what the last one fetched in vain comes again, and a loader that was cut
        has its iterator back.

        An iterator that came to its end has nothing to take back: its last batches are still on their way. A data set
        stands where it is to go on; a loader that nobody cut begins anew, as it does under Lightning.
        """
        whole, in_vain = self._source is self._loader, bool(self._way) and not self._ended
        goes_on = self._source is not None and whole and self._cut
        if in_vain:
            if self._source is not None and (self._cut or not self._moved or not whole):
                self._turn_to(self._mark)
                goes_on = True
            self._way.clear()
        if not goes_on:
            self._live = None
        if self._mark is None:
            self._mark = self._state()
        self._ended = self._moved = self._cut = False
        self._handed = 0
        return goes_on

    def _end(self) -> None:
        """Behind the last batch of an epoch lies the state in which the next one begins."""
        self._ended = True
        if self._way:
            self._way[-1] = self._state()
        else:
            self._mark = self._state()


class StatefulStream(Stream):
    """A stream whose loader has a state that Lightning saves too: rank 0's, and all ranks are given that one."""

    def state_dict(self) -> Any:
        """The loader's state right after the last batch that was trained on."""
        return self.bookmark()

    def load_state_dict(self, state: Any) -> None:
        """Go on from Lightning's state, unless this rank has been given its own."""
        if not self._resumed:
            self._turn_to(state)


class Streams:
    """All streams of a rank that are drawn from together, in Lightning's order.

    Args:
        begun: Is called when one of them draws its first batch.

    Attributes:
        over: Whether this epoch has nothing more for this rank: it waited for the others when the run was saved. Until
            all have met.
    """

    def __init__(self, begun: Callable[[], object]) -> None:
        self._begun = begun
        self._all: list[Stream] = []
        self._noted: list[object] = []
        self._bookmarks: list[Any] = []
        self._in_mid_epoch = True
        self.over = False

    def __len__(self) -> int:
        return len(self._all)

    def watch(self, loader: Any, ear: Ear = DEAF) -> Stream:
        """One more; it goes on from its bookmark, if one was given."""
        kind = StatefulStream if is_stateful(loader) else Stream
        made = kind(loader, begun=self._begun, over=lambda: self.over, ear=ear)
        made.go_to(next(iter(self._bookmarks[len(self._all) :]), None), in_mid_epoch=self._in_mid_epoch)
        self._all.append(made)
        return made

    def note(self, loader: object) -> None:
        """A loader that nobody watches: only its length counts."""
        self._noted.append(loader)

    @property
    def known(self) -> bool:
        """Whether there are any, watched or not."""
        return bool(self._all or self._noted)

    def clear(self) -> None:
        """Others come instead of them, which begin where they begin."""
        self._all.clear()
        self._noted.clear()
        self._bookmarks.clear()

    @property
    def dry(self) -> bool:
        """Whether none has anything more in this epoch."""
        return all(stream.dry for stream in self._all)

    def trained(self) -> None:
        """A batch from all of them was trained on."""
        for stream in self._all:
            stream.trained()

    def cut(self) -> None:
        """The epoch ends behind the batch under way, whatever is left of them."""
        for stream in self._all:
            stream.cut()

    def bookmarks(self) -> list[Any]:
        """The state of each right after what was trained on last."""
        return [stream.bookmark() for stream in self._all]

    def load(self, bookmarks: Sequence[Any], *, in_mid_epoch: bool = True, over: bool = False) -> None:
        """Go on from these."""
        self._bookmarks, self._in_mid_epoch, self.over = list(bookmarks), in_mid_epoch and not over, over
        for stream, bookmark in zip(self._all, bookmarks, strict=False):
            stream.go_to(bookmark, in_mid_epoch=self._in_mid_epoch)

    def batches(self, limit: int | float) -> int | None:
        """How many batches an epoch has; None if that is not known."""
        lengths = [length_of(stream) for stream in (*self._all, *self._noted)]
        length = max((n for n in lengths if n is not None), default=None) if None not in lengths else None
        if isinstance(limit, float):
            return None if length is None else int(length * min(limit, 1.0))
        return limit if length is None else min(limit, length)


def source_of(loader: object) -> Any:
    """What has the state of this loader; None if nothing has, or nothing here."""
    if is_stateful(loader):
        return loader
    if isinstance(loader, DataLoader) and loader.num_workers == 0 and is_stateful(loader.dataset):
        return loader.dataset
    return None


def is_stateful(thing: object) -> bool:
    """Whether it has a state, as Lightning looks for it."""
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def length_of(loader: object) -> int | None:
    """The loader's number of batches; None if it has none."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # how loaders over streams say that they have no length
        return None
