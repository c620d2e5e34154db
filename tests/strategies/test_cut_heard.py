"""A rank hears what became of one cut before the next one ends on it: else its file, or its name, would be left out."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.algorithms.cut import Part
from lightning_async.strategies.cut_consensus import key
from lightning_async.strategies.cut_first import First
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

    def now(self) -> float:
        return 0.0

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


def test_a_new_first_rank_ends_the_cut_that_nobody_spoke_of() -> None:
    """Rank 0 began cut 5 and died. This rank has part of it with it; another one, slower, among those who live."""
    board, marked = Board(), list[int]()
    strategy = SimpleNamespace(
        office=SimpleNamespace(carrier=board),
        checkpoints=SimpleNamespace(late=SimpleNamespace(idle=True)),
        clock=SimpleNamespace(progress=SimpleNamespace(steps=lambda: 16), met_at=0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saves = ModelCheckpoint(every_n_train_steps=8)
    first = First(cast(Any, strategy), [saves])
    first.begin_if_due(cast(Any, SimpleNamespace(newest=5, begin_cut=marked.append)), 8)
    assert marked == [6]
    assert board.words[key(5)] == b"{}"
    assert key(6) not in board.words
