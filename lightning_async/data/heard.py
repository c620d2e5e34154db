"""A loader of the rank's own that is listened to: an ear hears when an iterator is made, and of each batch drawn.

    iter(loader)      begins |..........|
    next(iterator)                        draws |......|  drew     draws |......|  drew

The ear stands around the user's own code: what it does on the way in comes before that code runs, what it does on the
way out behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_async.data.around import Around

_NO_MORE = object()


class Ear:
    """Hears nothing."""

    def begins(self) -> AbstractContextManager[object]:
        """Around the making of an iterator."""
        return nullcontext()

    def draws(self) -> AbstractContextManager[object]:
        """Around the drawing of a batch, or of the word that there is none."""
        return nullcontext()

    def drew(self) -> None:
        """There was one."""


DEAF = Ear()


class Heard(Around, own=("_ear",)):
    """A loader with an ear.

    Args:
        loader: The user's loader.
        ear: Who hears.
    """

    def __init__(self, loader: Any, ear: Ear) -> None:
        super().__init__(loader)
        self._ear = ear

    def __iter__(self) -> Iterator[Any]:
        with self._ear.begins():
            iterator = iter(self._loader)
        return drawn(iterator, self._ear)


class StatefulHeard(Heard):
    """One whose loader has a state: some look for these methods on the class."""

    def state_dict(self) -> Any:
        """The loader's."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """The loader's."""
        self._loader.load_state_dict(state)


def drawn(iterator: Iterator[Any], ear: Ear) -> Iterator[Any]:
    """All batches of an iterator."""
    while True:
        with ear.draws():
            batch = next(iterator, _NO_MORE)
        if batch is _NO_MORE:
            return
        ear.drew()
        yield batch
