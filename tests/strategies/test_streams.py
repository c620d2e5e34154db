"""Streams on several ranks: each trains on its own, they meet at their epochs' ends, and each has its own bookmark."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import AsyncStrategy, SpeedFaults
from lightning_async.data.resume import State, unite
from tests.strategies.lit import INPUTS, TARGETS, Lit, Numbers, loader, trainer, weights
from tests.strategies.ranks import Forked, run


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


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:`Batches` is not a DataLoader")
@pytest.mark.parametrize(
    ("kind", "lengths", "slow"), [(Stream, [12, 40], 5.0), (Stream, [40, 12], 1.0), (Batches, [12, 40], 1.0)]
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


@pytest.mark.few(1)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (1, 3)])
def test_an_epoch_goes_on_with_any_number_of_ranks(before: int, after: int) -> None:
    first = run(before, _part, "shared", 7, [], None)
    told = [{**end["feeding"], "done": torch.tensor(end["feeding"]["done"])} for end in first]
    second = run(after, _part, "shared", None, [], unite(told))
    seen = Counter(index for end in [*first, *second] for index in end["seen"])
    assert set(seen.values()) == {1}
    assert len(seen) == 240
    assert all(end["seen"] for end in second)


def _dry(n: int, lengths: list[int], feed: str, folder: str | None, path: str | None) -> list[list[int]]:
    """What was trained on, epoch by epoch: rank 1 has many times more than the others."""
    of: dict[str, Any] = {
        "loader": lambda: Batches(lengths),
        "data set": lambda: DataLoader(Stream(lengths), batch_size=4),
        "all of two": lambda: CombinedLoader([Batches(lengths), Batches(lengths)], "max_size_cycle"),
        "shorter of two": lambda: CombinedLoader([Batches(lengths), Batches([n + 8 for n in lengths])], "min_size"),
    }
    lit = Pairs() if "two" in feed else Lit()
    by_epoch = ByEpoch()
    save = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)] if folder else []
    callbacks = [SpeedFaults(step_seconds=0.003), by_epoch, *save]
    t = trainer(n, callbacks=callbacks, max_epochs=2, enable_checkpointing=folder is not None)
    t.fit(lit, of[feed](), loader(40, shuffle=False), ckpt_path=path)
    return by_epoch.epochs


class Pairs(Lit):
    """Takes the first of two batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:`Batches` is not a DataLoader", "ignore:rank .* had no batch in this epoch")
@pytest.mark.filterwarnings("ignore:.*does not go on to the bit", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("feed", ["loader", "data set", "all of two", "shorter of two"])
def test_who_was_through_when_the_run_was_saved_waits_for_the_next_epoch_again(feed: str, tmp_path: Path) -> None:
    """The state of a stream that came to its end reads as a beginning: nothing may be trained on twice."""
    whole = run(2, _dry, 2, [8, 48], feed, str(tmp_path), None)
    path = tmp_path / "step=6.ckpt"
    for lengths in ([8, 48], [8, 48, 8]):
        again = run(len(lengths), _dry, len(lengths), lengths, feed, None, str(path))
        assert [sorted(epoch) for epoch in again[0]] == [[], sorted(whole[0][1])]
        assert again[1][1] == whole[1][1]
        assert 0 < len(again[1][0]) < len(whole[1][0])
        assert again[1][0] == whole[1][0][-len(again[1][0]) :]
        assert all(epochs[0] == [] and epochs[1] for epochs in again[2:])  # it has the place of rank 0's stream


# -- a limit cuts them -------------------------------------------------------------------------------------------------


class Live(IterableDataset[Any]):
    """It has no state that one could ask for, and what was drawn from it is gone."""

    def __init__(self) -> None:
        self.rest = iter(Numbers(float("inf")))

    def __iter__(self) -> Iterator[Any]:
        return self.rest


class Anew(IterableDataset[Any]):
    """Every iterator begins where the first began."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Numbers(float("inf")))


class Bookmarked:
    """A loader with a state, as torchdata's: only an iterator that follows a load goes on where another stood."""

    def __init__(self, length: float) -> None:
        self.length, self.next, self.at = length, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.at, self.next = self.next, 0
        while self.at < self.length:
            self.at += 1
            pair = torch.tensor([2 * self.at - 2, 2 * self.at - 1])
            yield pair, INPUTS[pair % 240], TARGETS[pair % 240]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = self.at = state["at"]


class ByEpoch(Callback):
    """What was trained on in each epoch, and after how many batches of all there were validations."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []
        self.validations: list[int] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking and isinstance(trainer.strategy, AsyncStrategy):
            self.validations.append(trainer.strategy.clock.progress.agreed.batches)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.epochs.append(module.seen)
        module.seen = []


class Sized(Numbers):
    """One that says how long it is."""

    def __len__(self) -> int:
        return int(self.length)

    def __iter__(self) -> Iterator[Any]:
        self.at %= int(self.length)
        return super().__iter__()


class Whole(IterableDataset[Any]):
    """24 batches of two on rank 0 and 12 on rank 1; every iterator begins where the first began."""

    def __len__(self) -> int:
        return 48 if os.environ["RANK"] == "0" else 24

    def __iter__(self) -> Iterator[Any]:
        return iter(Numbers(len(self)))


class Short(Sized):
    """One that has less than it says, on rank 0."""

    def __len__(self) -> int:
        return int(self.length) + (20 if os.environ["RANK"] == "0" else 0)


class Scheduled(Lit):
    """It has a schedule that goes by epochs."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1.0)]


class Few(IterableDataset[Any]):
    """So many samples an epoch on each rank, which always begin anew."""

    def __init__(self, *lengths: float) -> None:
        self.length = lengths[int(os.environ["RANK"])]

    def __iter__(self) -> Iterator[Any]:
        return iter(Numbers(self.length))


LOADERS: dict[str, Any] = {
    "both anew": lambda: DataLoader(Whole(), batch_size=2),
    "few": lambda: DataLoader(Few(float("inf"), 6), batch_size=2),
    "exact": lambda: DataLoader(Few(float("inf"), 4, 12), batch_size=2),
    "data set": lambda: DataLoader(Numbers(float("inf")), batch_size=2),
    "live": lambda: DataLoader(Live(), batch_size=2),
    "anew": lambda: DataLoader(Anew(), batch_size=2),
    "loader": lambda: Bookmarked(float("inf")),
    "sized": lambda: DataLoader(Sized(48), batch_size=2),
    "unlike": lambda: DataLoader(Sized(48 if os.environ["RANK"] == "0" else 24), batch_size=2),
    "short": lambda: DataLoader(Short(16), batch_size=2),
    "sixes": lambda: Bookmarked(6),
    "tens": lambda: Bookmarked(10),
}


def _limited(
    n: int,
    kind: str,
    strategy: Any,
    slow: float = 1.0,
    folder: str | None = None,
    path: str | None = None,
    validates: int | float = 1.0,
    limit: int | float = 6,
    accumulate: int = 1,
) -> dict[str, Any]:
    torch.manual_seed(0)
    lit, by_epoch = Scheduled(lr=0.001), ByEpoch()
    saver = [ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_epochs=1)] if folder else []
    pace = [SpeedFaults(step_seconds=0.002, slow={1: slow})] if slow > 1 else []
    t = trainer(
        n,
        callbacks=[*pace, by_epoch, *saver],
        max_epochs=4,
        limit_train_batches=limit,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=folder is not None,
        val_check_interval=validates,
        strategy=strategy,
    )
    t.fit(lit, LOADERS[kind](), loader(40, shuffle=False), ckpt_path=path)
    stepped = lit.lr_schedulers().last_epoch  # type: ignore[union-attr]
    return {
        "epochs": by_epoch.epochs,
        "end": weights(lit),
        "step": t.global_step,
        "scheduled": stepped,
        "validations": by_epoch.validations,
    }


def _flat(end: dict[str, Any]) -> list[int]:
    return [index for epoch in end["epochs"] for index in epoch]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["data set", "live", "anew"])
def test_a_limited_epoch_trains_on_what_it_trains_on_under_ddp(kind: str) -> None:
    (theirs,) = run(1, _limited, 1, kind, "ddp")
    (ours,) = run(1, _limited, 1, kind, None)
    assert [len(epoch) for epoch in theirs["epochs"]] == [12] * 4
    assert ours["epochs"] == theirs["epochs"]
    assert ours["step"] == theirs["step"]


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:`Bookmarked` is not a DataLoader")
@pytest.mark.parametrize(("kind", "epochs"), [("loader", [12] * 4), ("sixes", [12] * 4), ("tens", [12, 8, 12, 8])])
def test_a_loader_with_a_state_goes_on_behind_the_limit(kind: str, epochs: list[int]) -> None:
    (end,) = run(1, _limited, 1, kind, None)
    assert [len(epoch) for epoch in end["epochs"]] == epochs
    period = {"loader": 48, "sixes": 12, "tens": 20}[kind]
    assert _flat(end) == [index % period for index in range(sum(epochs))]


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_a_part_of_a_stream_of_known_length_is_that_part_of_it() -> None:
    (theirs,) = run(1, _limited, 1, "sized", "ddp", 1.0, None, None, 1.0, 0.25)
    (ours,) = run(1, _limited, 1, "sized", None, 1.0, None, None, 1.0, 0.25)
    assert [len(epoch) for epoch in theirs["epochs"]] == [12] * 4
    assert ours["epochs"] == theirs["epochs"]
    assert ours["step"] == theirs["step"]


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_a_part_of_streams_of_unlike_lengths_is_refused_on_all_ranks() -> None:
    with Forked(2, _limited, 2, "unlike", None, 1.0, None, None, 1.0, 0.25) as forked:
        results = forked.results(20.0)
    assert "MisconfigurationException" in {result.kind for result in results}
    for result in results:  # its own word, or the other's, who read both words first
        assert result.kind in ("MisconfigurationException", "PeerFailedError"), result.trace
        assert "`limit_train_batches=0.25` is a part of streams of unlike lengths, in batches: " in result.error
        assert "6 on rank 0, 3 on rank 1; give a number of batches" in result.error


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_a_stream_that_has_less_than_its_length_meets_the_others_at_its_end() -> None:
    ends = run(2, _limited, 2, "short", None, 1.0, None, None, 1.0, 1.0)
    assert ends[0]["end"] == ends[1]["end"]
    assert [end["epochs"] for end in ends] == [[list(range(16))] * 4] * 2


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [4.0, 1.0])
def test_no_sample_of_a_limited_epoch_is_lost_on_any_rank(slow: float) -> None:
    for end in run(2, _limited, 2, "data set", None, slow):
        seen = _flat(end)
        assert seen == list(range(len(seen)))
        assert len(end["epochs"]) == 4


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("kind", ["few", "unlike", "sized"])
@pytest.mark.parametrize(("slow", "accumulate"), [(4.0, 4), (4.0, 1), (1.0, 1), (1.0, 4)])
def test_what_a_stream_lacks_of_a_limited_epoch_the_others_train_on(kind: str, slow: float, accumulate: int) -> None:
    """Twelve batches an epoch, of which rank 1 has three; or of 24 batches of the one and 12 of the other; or of 24
    batches of each, of which the one that was a little faster before ends in the middle of an epoch."""
    limit = 0.25 if kind == "sized" else 6
    ends = run(2, _limited, 2, kind, None, slow, None, None, 1.0, limit, accumulate)
    assert ends[0]["end"] == ends[1]["end"]
    epochs = zip(*(end["epochs"] for end in ends), strict=True)
    assert [len(one) + len(other) for one, other in epochs] == [24] * 4
    lengths = {"few": None, "unlike": (48, 24), "sized": (48, 48)}[kind]
    for rank, end in enumerate(ends):
        seen, period = ([_flat(end)], lengths[rank]) if lengths else (end["epochs"], 48)
        assert all(part == [index % period for index in range(len(part))] for part in seen)
        assert end["scheduled"] == 4
        assert end["step"] == 4 * -(-6 // accumulate)


@pytest.mark.few(0)
def test_a_stream_that_ends_with_its_part_steps_its_schedules_too() -> None:
    """Rank 2 has the six batches that are its part; rank 1 has two of them, so the epoch is not over there. Where the
    others both go on and a single batch is left, each of them takes one."""
    ends = run(3, _limited, 3, "exact", None)
    for epoch in zip(*(end["epochs"] for end in ends), strict=True):
        assert 36 <= sum(map(len, epoch)) <= 38
    assert [(end["scheduled"], end["step"]) for end in ends] == [(4, 24)] * 3


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize(
    ("every", "limit", "points"),
    [(5, 1.0, [10, 20, 30]), (6, 1.0, [12, 24, 36]), (4, 15, [8, 16, 24]), (5, 15, [10, 20, 30])],
)
def test_all_validate_at_the_same_batches_of_streams_of_unlike_lengths(
    every: int, limit: int | float, points: list[int]
) -> None:
    """36 batches an epoch, 24 of the one and 12 of the other; or 30 of them."""
    ends = run(2, _limited, 2, "both anew", None, 1.0, None, None, every, limit)
    assert ends[0]["validations"] == ends[1]["validations"]
    length = 36 if limit == 1.0 else 30
    assert ends[0]["validations"] == [epoch * length + point for epoch in range(4) for point in points]
    assert ends[0]["end"] == ends[1]["end"]


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:`Bookmarked` is not a DataLoader", "ignore:.*exists and is not empty")
@pytest.mark.parametrize("kind", ["data set", "loader", "sixes"])
@pytest.mark.parametrize("name", ["epoch=1-step=12", "epoch=1-step=9"])
def test_a_limited_epoch_goes_on_to_the_bit(kind: str, name: str, tmp_path: Path) -> None:
    """Saved at the end of an epoch, and in one."""
    done = int(name.rpartition("=")[2])
    validates = 1.0 if done % 6 == 0 else 3
    (through,) = run(1, _limited, 1, kind, None, 1.0, str(tmp_path), None, validates)
    (resumed,) = run(1, _limited, 1, kind, None, 1.0, str(tmp_path), str(tmp_path / f"{name}.ckpt"), validates)
    assert _flat(resumed) == _flat(through)[2 * done :]
    assert resumed["end"] == through["end"]
    assert resumed["step"] == through["step"] == 24
