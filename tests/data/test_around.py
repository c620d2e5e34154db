"""What stands around a loader has its own attributes and no others; all the rest is the loader's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_async.data.around import Around


class Marked(Around, own=("_mark",)):
    """Has a mark of its own."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._mark = 1


class Twice(Marked, own=("_second",)):
    """Has its parent's too."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._second = self._mark = 2


class Loader:
    """It has attributes of these names too."""

    def __init__(self) -> None:
        self._mark = self._second = self.told = 0


def test_own_attributes_stay_here_and_all_others_are_the_loaders() -> None:
    loader = Loader()
    marked: Any = Marked(loader)
    marked._mark, marked._second, marked.told = 5, 6, 7
    assert (marked._mark, marked._second, marked.told) == (5, 6, 7)
    assert vars(loader) == {"_mark": 0, "_second": 6, "told": 7}


def test_a_subclass_has_those_of_its_parent_and_its_siblings_have_none_of_its_own() -> None:
    loader = Loader()
    twice: Any = Twice(loader)
    assert (twice._mark, twice._second) == (2, 2)
    assert vars(loader) == {"_mark": 0, "_second": 0, "told": 0}
    one: Any = Marked(loader)
    one._second = 3
    assert loader._second == 3


def test_its_length_is_the_loaders() -> None:
    assert len(Around(DataLoader([1, 2, 3], batch_size=2))) == 2  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        len(Around(Loader()))


def test_a_copy_stands_around_a_copy() -> None:
    """While it is made it has no attributes, not even the loader that it would ask."""
    loader = Loader()
    one: Any = copy.deepcopy(Marked(loader))
    one.told = 4
    assert (one.told, loader.told, one._mark) == (4, 0, 1)
