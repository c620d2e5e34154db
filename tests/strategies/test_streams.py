"""Streams on several ranks: each trains on its own, they meet at their epochs' ends, and each has its own bookmark."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import SpeedFaults
from lightning_async.data.resume import State, unite
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer, weights
from tests.strategies.ranks import run


class Stream(IterableDataset[Any]):
    """So many samples on this rank, from its own hundred on; it knows where it is."""

    def __init__(self, lengths: list[int]) -> None:
        rank = int(os.environ["RANK"])
        self.first, self.n, self.at = 100 * rank, lengths[rank], 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.n:
            self.at += 1
            index = self.first + self.at - 1
            yield torch.tensor(index), INPUTS[index], TARGETS[index]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Batches:
    """A loader that is no DataLoader, with a state: of whatever it wraps."""

    def __init__(self, lengths: list[int]) -> None:
        self.stream = Stream(lengths)
        self.state_dict, self.load_state_dict = self.stream.state_dict, self.stream.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.stream, batch_size=4))


class Says(Callback):
    """Remembers what the feeding says after each batch and at the end."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.validations = stop_after, 0
        self.dry: list[bool] = []
        self.said: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        feeding = trainer.strategy.feeding
        self.dry.append(feeding.dry)
        self.said = {
            "batches": feeding.batches,
            "samples": feeding.samples,
            "loaders": feeding.loader_states(),
            "feeding": {**feeding.state_dict(), "done": feeding.state_dict()["done"].tolist()},  # tensors travel badly
            "seen": list(module.seen),
        }
        if feeding.batches == self.stop_after:
            raise RuntimeError("interrupted")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validations += not trainer.sanity_checking


def _stream(kind: Any, lengths: list[int], slow: float) -> dict[str, Any]:
    lit, says = Lit(), Says()
    data = kind(lengths) if kind is Batches else DataLoader(kind(lengths), batch_size=4)
    t = trainer(2, callbacks=[SpeedFaults(step_seconds=0.001, slow={1: slow}), says])
    t.fit(lit, data, loader(40, shuffle=False))
    return {**says.said, "weights": weights(lit), "seen": lit.seen, "dry": says.dry, "validations": says.validations}


@pytest.mark.filterwarnings("ignore:`Batches` is not a DataLoader")
@pytest.mark.parametrize(
    ("kind", "lengths", "slow"), [(Stream, [40, 12], 1.0), (Stream, [12, 40], 5.0), (Batches, [12, 40], 1.0)]
)
def test_streams_of_unlike_lengths_meet_at_their_ends(kind: Any, lengths: list[int], slow: float) -> None:
    ends = run(2, _stream, kind, lengths, slow)
    assert ends[0]["weights"] == ends[1]["weights"]
    for rank, (end, n) in enumerate(zip(ends, lengths, strict=True)):
        assert end["seen"] == 2 * list(range(100 * rank, 100 * rank + n))
        assert end["batches"] == 2 * n // 4
        assert end["dry"] == 2 * [*[False] * (n // 4 - 1), True]
        assert end["validations"] == 2


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:`Batches` is not a DataLoader")
@pytest.mark.filterwarnings("ignore:rank . had no batch in this epoch")
@pytest.mark.parametrize("kind", [Stream, Batches])
@pytest.mark.parametrize("lengths", [[40, 0], [0, 40]])
def test_a_stream_that_yields_nothing_at_all_leaves_the_others_running(kind: Any, lengths: list[int]) -> None:
    ends = run(2, _stream, kind, lengths, 1.0)
    assert ends[0]["weights"] == ends[1]["weights"]
    for rank, (end, n) in enumerate(zip(ends, lengths, strict=True)):
        assert end["seen"] == 2 * list(range(100 * rank, 100 * rank + n))
        assert end["validations"] == 2


def _part(data: str, stop_after: int | None, loaders: list[Any], feeding: State | None) -> dict[str, Any]:
    """A run of one epoch that may be cut short; on which ranks, only they know."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lit, says = Lit(), Says(stop_after if rank == 0 else None)
    t = trainer(world, callbacks=[SpeedFaults(step_seconds=0.004, slow={world - 1: 3.0}), says], max_epochs=1)
    if loaders:
        t.strategy.feeding.load_loader_states(loaders[rank])  # type: ignore[attr-defined]
    if feeding is not None:
        t.strategy.feeding.load_state_dict(feeding)  # type: ignore[attr-defined]
    with suppress(RuntimeError):
        t.fit(
            lit, DataLoader(Stream([40, 40]), batch_size=4) if data == "stream" else loader(), loader(40, shuffle=False)
        )
    return says.said


def test_each_rank_goes_on_with_its_own_stream() -> None:
    first = run(2, _part, "stream", 7, [], None)
    second = run(2, _part, "stream", None, [end["loaders"] for end in first], None)
    for rank in range(2):
        assert first[rank]["batches"] < 10
        assert [*first[rank]["seen"], *second[rank]["seen"]] == list(range(100 * rank, 100 * rank + 40))


@pytest.mark.few(2)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (1, 3)])
def test_an_epoch_goes_on_with_any_number_of_ranks(before: int, after: int) -> None:
    first = run(before, _part, "shared", 7, [], None)
    told = [{**end["feeding"], "done": torch.tensor(end["feeding"]["done"])} for end in first]
    second = run(after, _part, "shared", None, [], unite(told))
    seen = Counter(index for end in [*first, *second] for index in end["seen"])
    assert set(seen.values()) == {1}
    assert len(seen) == 240
    assert all(end["seen"] for end in second)
