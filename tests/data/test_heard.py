"""An ear hears of iterators and batches, around the user's own code; in all else the loader is the user's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_async.data.heard import DEAF, Ear, Heard, StatefulHeard, drawn
from lightning_async.data.stream import Streams


class Writes(Ear):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def _around(self, what: str) -> Iterator[None]:
        self.lines.append(f"{what}(")
        yield
        self.lines.append(")")

    def begins(self) -> AbstractContextManager[object]:
        return self._around("begins")

    def draws(self) -> AbstractContextManager[object]:
        return self._around("draws")

    def drew(self) -> None:
        self.lines.append("drew")


class Loader:
    """Two batches; says itself when its code runs."""

    def __init__(self, ear: Writes, batches: int = 2) -> None:
        self.ear, self.batches, self.told = ear, batches, 0

    def __iter__(self) -> Iterator[int]:
        self.ear.lines.append("iter")
        return self._batches()

    def _batches(self) -> Iterator[int]:
        for batch in range(self.batches):
            self.ear.lines.append(f"next {batch}")
            yield batch
        self.ear.lines.append("end")


HEARD = ["begins(", "iter", ")", "draws(", "next 0", ")", "drew", "draws(", "next 1", ")", "drew", "draws(", "end", ")"]


def _stream(loader: Any, ear: Ear) -> Iterable[Any]:
    return Streams(lambda: None).watch(loader, ear)


@pytest.mark.parametrize("make", [Heard, _stream])
def test_an_ear_stands_around_the_users_code(make: Any) -> None:
    ear = Writes()
    assert list(make(Loader(ear), ear)) == [0, 1]
    assert ear.lines == HEARD


def test_nothing_is_drawn_ahead() -> None:
    ear = Writes()
    batches = iter(Heard(Loader(ear), ear))
    assert ear.lines == HEARD[:3]
    assert next(batches) == 0
    assert ear.lines == HEARD[:7]


def test_it_is_the_users_loader_in_all_else() -> None:
    loader = Loader(Writes())
    heard = Heard(loader, DEAF)
    heard.told = 7  # type: ignore[attr-defined]
    assert (loader.told, heard.batches) == (7, 2)  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        len(heard)
    with pytest.raises(AttributeError):
        heard.state_dict  # noqa: B018
    assert len(Heard(DataLoader([1, 2, 3], batch_size=2), DEAF)) == 2  # type: ignore[arg-type]
    assert list(drawn(iter([1, 2]), DEAF)) == [1, 2]


class Stateful(Loader):
    """One that knows where it stands."""

    def state_dict(self) -> dict[str, int]:
        return {"told": self.told}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.told = state["told"]


def test_its_state_is_the_loaders() -> None:
    loader = Stateful(Writes())
    heard = StatefulHeard(loader, DEAF)
    heard.load_state_dict({"told": 3})
    assert loader.told == 3
    assert heard.state_dict() == {"told": 3}
