"""What stands around a user's loader is that loader in all else: attributes are read from and set on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar


class Around:
    """Stands around a loader. A subclass names the attributes that are its own: `class Mine(Around, own=("_mark",))`.

    Args:
        loader: The user's loader.
    """

    __own: ClassVar[frozenset[str]] = frozenset({"_loader"})

    def __init_subclass__(cls, own: Iterable[str] = ()) -> None:
        super().__init_subclass__()
        cls.__own |= frozenset(own)

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name in self.__own:  # not set yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)  # without a length this is the TypeError it should be
