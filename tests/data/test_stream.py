"""The law of a bookmark: what is trained on before it and after it is the stream, once, whatever was fetched ahead."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_async.data.stream import StatefulStream, Stream, Streams, is_stateful, length_of, source_of
from tests.strategies.ranks import run

N = 20


class Cursor(IterableDataset[int]):
    """A data set that knows where it is; after its end it begins again."""

    def __init__(self, n: int = N) -> None:
        self.n, self.at = n, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.n:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)  # live: it changes while the stream goes on

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Loader:
    """A loader with a state of its own, as torchdata's: an iterator after a finished one begins anew."""

    batch_size = 1

    def __init__(self, n: int = N) -> None:
        self.n, self.next, self.running = n, 0, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.running, self.next = self.next, 0
        while self.running < self.n:
            self.running += 1
            yield torch.tensor([self.running - 1])
        self.running = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.running}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = self.running = state["next"]


class Plain:
    """Batches without a state or a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.tensor([k]) for k in range(N)])


def watched(kind: str) -> Stream:
    made = {"loader": Loader, "data set": lambda: DataLoader(Cursor(), batch_size=1), "plain": Plain}[kind]()
    return Streams(lambda: None).watch(made)


def train(stream: Stream, batches: int, *, ahead: int) -> list[int]:
    """Train on so many batches of a new iterator, with `ahead` fetched beyond the one that is trained on."""
    iterator, queue, trained = iter(stream), deque[Any](), list[int]()
    for _ in range(batches):
        while len(queue) <= ahead and (batch := next(iterator, None)) is not None:
            queue.append(batch)
        if not queue:
            break
        trained.append(int(queue.popleft()))
        stream.trained()
    return trained


@pytest.mark.parametrize("kind", ["loader", "data set"])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_before_a_bookmark_and_after_it_is_the_stream(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    ahead, batches = rng.randrange(4), rng.randrange(N)
    first, second = watched(kind), watched(kind)
    before = train(first, batches, ahead=ahead)
    second.go_to(first.bookmark())
    assert before + train(second, 100, ahead=ahead) == list(range(N))
    assert second.dry
    assert train(second, 100, ahead=ahead) == list(range(N))


@pytest.mark.parametrize("kind", ["loader", "data set"])
def test_a_finished_epoch_is_followed_by_a_whole_one(kind: str) -> None:
    first, second = watched(kind), watched(kind)
    train(first, 100, ahead=1)
    second.go_to(first.bookmark())
    assert train(second, 100, ahead=1) == list(range(N))


@pytest.mark.parametrize("kind", ["loader", "data set"])
def test_an_iterator_that_was_for_nothing_takes_nothing(kind: str) -> None:
    first, second = watched(kind), watched(kind)
    train(first, 3, ahead=1)
    second.go_to(first.bookmark())
    next(iter(second))  # fetched ahead and never trained on, as Lightning does before it knows its epoch
    assert train(second, 100, ahead=1) == list(range(3, N))


@pytest.mark.parametrize("kind", ["loader", "data set"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_what_follows_a_cut_is_what_was_left(kind: str, ahead: int) -> None:
    stream = watched(kind)
    assert train(stream, 5, ahead=ahead) == list(range(5))
    stream.cut()
    second = watched(kind)
    second.go_to(stream.bookmark(), in_mid_epoch=False)
    for one in (stream, second):
        assert train(one, 7, ahead=ahead) == list(range(5, 12))
        one.cut()
        assert train(one, 100, ahead=ahead) == list(range(12, N))
        one.cut()
        assert train(one, 100, ahead=ahead) == list(range(N))


def test_a_loader_that_was_cut_at_its_very_end_begins_anew() -> None:
    stream = watched("loader")
    assert train(stream, N, ahead=0) == list(range(N))
    stream.cut()
    next(iter(stream))  # for nothing
    assert train(stream, 100, ahead=0) == list(range(N))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_memory_is_one_state_a_batch_on_its_way(ahead: int) -> None:
    stream = watched("loader")
    iterator = iter(stream)
    for _ in range(1 + ahead):
        next(iterator)
    for _ in range(10):
        stream.trained()
        next(iterator)
        assert len(stream._way) == 1 + ahead


@pytest.mark.parametrize("kind", ["loader", "data set", "plain"])
def test_dry_when_all_that_came_is_trained_on(kind: str) -> None:
    stream = watched(kind)
    iterator = iter(stream)
    for _ in range(N):
        assert not stream.dry
        next(iterator)
    assert next(iterator, None) is None
    assert not stream.dry
    for _ in range(N):
        stream.trained()
    assert stream.dry
    next(iter(stream))
    assert not stream.dry


def test_dry_without_the_end_where_the_length_is_known() -> None:
    stream = Streams(lambda: None).watch(DataLoader([1, 2], batch_size=1))  # type: ignore[arg-type]
    iterator = iter(stream)
    for _ in range(2):
        assert not stream.dry
        next(iterator)
        stream.trained()
    assert stream.dry


def test_a_bookmark_before_the_first_batch_is_the_beginning() -> None:
    stream = watched("loader")
    assert stream.bookmark() == {"next": 0}
    next(iter(stream))
    assert stream.bookmark() == {"next": 0}


def test_a_stream_without_a_state_has_no_bookmark() -> None:
    stream = watched("plain")
    assert train(stream, 100, ahead=1) == list(range(N))
    assert stream.bookmark() is None
    stream.go_to({"next": 4})
    assert train(stream, 100, ahead=1) == list(range(N))


def test_state_in_workers_is_not_seen() -> None:
    assert source_of(DataLoader(Cursor(), num_workers=1)) is None
    assert isinstance(source_of(DataLoader(Cursor())), Cursor)


def test_only_a_loader_with_a_state_shows_it_to_lightning() -> None:
    assert isinstance(watched("loader"), StatefulStream)
    assert not is_stateful(watched("data set"))
    assert not is_stateful(watched("plain"))


def test_a_ranks_own_bookmark_goes_before_lightnings() -> None:
    own, lightnings = watched("loader"), watched("loader")
    own.go_to({"next": 5})
    for stream in (own, lightnings):
        assert isinstance(stream, StatefulStream)
        stream.load_state_dict({"next": 9})
    assert train(own, 1, ahead=1) == [5]
    assert train(lightnings, 1, ahead=1) == [9]
    assert lightnings.state_dict() == {"next": 10}  # type: ignore[attr-defined]


def test_in_all_else_it_is_the_users_loader() -> None:
    loader = DataLoader(Cursor(), batch_size=4)
    stream = Streams(lambda: None).watch(loader)
    assert (stream.batch_size, stream.dataset, stream.sampler) == (4, loader.dataset, loader.sampler)
    stream.worker_init_fn = print  # as Lightning does
    stream._iterator = None
    assert loader.worker_init_fn is print
    assert "_iterator" not in vars(stream)
    with pytest.raises(AttributeError, match="nothing"):
        assert stream.nothing
    assert length_of(stream) is None
    assert length_of(Streams(lambda: None).watch(DataLoader(range(6), batch_size=4))) == 2  # type: ignore[arg-type]


def test_streams_that_are_drawn_from_together() -> None:
    drawn: list[int] = []
    streams = Streams(lambda: drawn.append(1))
    streams.load([{"next": 18}])
    both = [streams.watch(Loader()), streams.watch(Plain())]
    assert not drawn
    iterators = [iter(stream) for stream in both]
    assert [int(next(iterator)) for iterator in iterators] == [18, 0]
    assert len(drawn) == 2
    streams.trained()
    assert streams.bookmarks() == [{"next": 19}, None]
    assert not streams.dry


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 5), (0.5, 2), (3, 3), (9, 5)])
def test_batches_of_an_epoch(limit: float, batches: int) -> None:
    streams = Streams(lambda: None)
    streams.watch(DataLoader(range(10), batch_size=2))  # type: ignore[arg-type]
    assert streams.batches(limit) == batches
    streams.watch(Plain())
    assert streams.batches(limit) == (limit if isinstance(limit, int) else None)


class Nowhere(IterableDataset[int]):
    """A data set that does not know where it is."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(N))


def _in_four_runs(data: Any, workers: int, every: int) -> list[int]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    seen, mark = list[int](), None
    for drawn in (4, 1, 5, 2):
        loader = StatefulDataLoader(data(), batch_size=None, num_workers=workers, snapshot_every_n_steps=every)
        stream = StatefulStream(loader)
        stream.go_to(mark)
        batches = iter(stream)
        for _ in range(drawn):
            seen.append(int(next(batches)))
            stream.trained()
        mark = stream.bookmark()
    return seen


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:'set_vital'", "ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("data", [Nowhere, Cursor])
@pytest.mark.parametrize(("workers", "every"), [(0, 1), (1, 3), (1, 1)])
def test_a_loader_of_torchdata_that_goes_on_twice_leaves_nothing_out(data: Any, workers: int, every: int) -> None:
    """Its own states would: what it skipped the first time it would skip twice the second time."""
    pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    (seen,) = run(1, _in_four_runs, data, workers, every)  # workers leave a signal handler
    assert seen == list(range(12))
