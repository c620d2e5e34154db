"""A rank hears what became of one cut before the next one ends on it: else its file, or its name, would be left out."""

from __future__ import annotations

import json
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import torch

from lightning_async.algorithms.cut import Part
from lightning_async.strategies.cut_consensus import key
from lightning_async.strategies.cuts import Cuts


class Board:
    """Rank 1's view of a run of two: who asks is answered a little later."""

    me = 1

    def __init__(self) -> None:
        said = {"number": 1, "at": 8, "saves": [], "names": [], "progress": {}, "steps": 8}
        self.words, self.asked = {key(1): json.dumps(said).encode()}, set[str]()

    def decided(self, key: str) -> bytes | None:
        if key in self.asked:
            return self.words.get(key)
        self.asked.add(key)
        return None

    def members(self) -> tuple[int, ...]:
        return 0, 1

    def take(self, kind: int) -> list[Any]:
        return []

    def propose(self, key: str, value: bytes) -> None:
        self.words.setdefault(key, value)

    def forget(self, key: str) -> None:
        del self.words[key]


def part_of(number: int) -> Part[Any]:
    """Nobody has anything yet."""
    done = torch.zeros(0, 2, dtype=torch.int64)
    return Part(number, 1, (0, 1), SimpleNamespace(counts=b"", data={"epoch": 0, "done": done}))


def test_a_slow_rank_hears_of_a_cut_before_it_ends_the_next() -> None:
    """Of mere weights, for which rank 0 waits for nobody's file: both of its cuts are here at once."""
    late = SimpleNamespace(trouble=lambda: None, queued=lambda: None)
    strategy = SimpleNamespace(
        office=SimpleNamespace(carrier=Board()),
        checkpoints=SimpleNamespace(late=late),
        checkpoint_io=None,
        is_global_zero=False,
    )
    cuts, told, parts = Cuts(cast(Any, strategy)), list[int](), [part_of(1), part_of(2)]
    names: Any = SimpleNamespace(look=lambda: None, told=lambda one: told.append(one.number))
    mail: Any = SimpleNamespace(between_steps=lambda: None, taken=lambda: parts.pop(0) if parts else None)
    cuts._names = names
    cuts._later = lambda job: Future()  # type: ignore[method-assign]
    held = []
    for _ in range(3):
        cuts._look(mail)
        held.append(cuts._part and cuts._part.number)
    assert held == [1, 1, 2]
    assert told == [1]
