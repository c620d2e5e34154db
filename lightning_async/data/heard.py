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

_OWN = frozenset({"_loader", "_ear"})
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


class Heard:
    """A loader with an ear. In all else it is the user's loader: attributes are read from and set on that.

    Args:
        loader: The user's loader.
        ear: Who hears.
    """

    def __init__(self, loader: Any, ear: Ear) -> None:
        self._loader, self._ear = loader, ear

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)  # without a length this is the TypeError it should be

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
