"""Real DataLoaders fed from shares: all samples once, the user's options kept, and no length."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_async.data.loader import drops_last, is_shareable, samples_per_batch, shared_loader
from lightning_async.data.order import Order, fingerprint, pick
from lightning_async.data.share import Share, make_share
from tests.data.epoch_bench import Clock, FakeBoard, at_once

N = 50


@pytest.fixture(autouse=True)
def child_signal() -> Iterator[None]:
    """The first DataLoader with workers sets a handler of SIGCHLD and leaves it; here it goes with the test."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


class Reversed(Sampler[int]):
    """A user's sampler; with `set_epoch`, epoch 1 is turned round."""

    epoch = 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(range(N) if self.epoch else range(N - 1, -1, -1))


class Turning(Reversed):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Crew:
    """Ranks in one process, each with the loader that the user's function makes."""

    def __init__(self, *loaders: DataLoader[Any], balance: str = "claim", seed: int = 0) -> None:
        clock = Clock()
        self.shares: list[Share] = []
        self.loaders: list[Any] = []
        for loader, desk in zip(loaders, FakeBoard(clock, len(loaders)).desks(), strict=True):
            share = make_share(balance, desk, batch=samples_per_batch(loader), drop_last=drops_last(loader))  # type: ignore[arg-type]
            made = shared_loader(loader, share, drive=at_once, seed=seed)
            self.shares.append(share)
            self.loaders.append(made)

    def epoch(self, number: int) -> list[list[list[int]]]:
        """Each rank's batches; the ranks take turns."""
        for loader in self.loaders:
            (loader.sampler if loader.batch_sampler is None else loader.batch_sampler).sampler.set_epoch(number)
        found: list[list[list[int]]] = [[] for _ in self.loaders]
        running = list(enumerate(iter(loader) for loader in self.loaders))
        while running:
            for rank, batches in list(running):
                batch = next(batches, None)
                if batch is None:
                    running.remove((rank, batches))
                    continue
                found[rank].append(torch.as_tensor(batch).reshape(-1).tolist())
                self.shares[rank].completed()
        return found


def flat(found: list[list[list[int]]]) -> list[int]:
    return [item for rank in found for batch in rank for item in batch]


def test_every_sample_once_and_no_length() -> None:
    crew = Crew(*(DataLoader(Numbers(), batch_size=8, shuffle=True) for _ in range(2)))
    epochs = [crew.epoch(0), crew.epoch(1)]
    assert all(sorted(flat(found)) == list(range(N)) for found in epochs)
    assert flat(epochs[0]) != flat(epochs[1])
    with pytest.raises(TypeError):
        len(crew.loaders[0])


def test_last_batch_of_the_epoch_is_partial_unless_dropped() -> None:
    kept = Crew(DataLoader(Numbers(), batch_size=8)).epoch(0)
    assert [len(b) for b in kept[0]] == [8] * 6 + [2]
    crew = Crew(DataLoader(Numbers(), batch_size=8, drop_last=True))
    assert [len(b) for b in crew.epoch(0)[0]] == [8] * 6
    assert crew.shares[0].abandoned() == 0


def test_unequal_batch_sizes() -> None:
    found = Crew(DataLoader(Numbers(), batch_size=3), DataLoader(Numbers(), batch_size=8)).epoch(0)
    assert sorted(flat(found)) == list(range(N))
    assert len(found[0][0]) == 3
    assert len(found[1][0]) == 8


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_prefetch_without_losing_or_hoarding(persistent: bool) -> None:
    options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 2, "persistent_workers": persistent}
    crew = Crew(*(DataLoader(Numbers(), batch_size=4, shuffle=True, **options) for _ in range(2)))
    assert crew.loaders[0].persistent_workers == persistent
    for number in range(2 if persistent else 1):
        found = crew.epoch(number)
        assert sorted(flat(found)) == list(range(N))
        assert abs(len(found[0]) - len(found[1])) <= 5


def test_outstanding_counts_what_workers_have() -> None:
    crew = Crew(DataLoader(Numbers(), batch_size=4, num_workers=2, prefetch_factor=2))
    batches = iter(crew.loaders[0])
    next(batches)
    assert crew.shares[0].outstanding == 4 * (1 + 2 * 2)
    crew.shares[0].completed()
    assert crew.shares[0].outstanding == 4 * (2 * 2)


@pytest.mark.parametrize("in_order", [True, False])
def test_queues_that_were_left_short_end_no_epoch(in_order: bool) -> None:
    """The DataLoader asks again although it was told "no more": what its batch iterator's pauses rest on."""
    options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 4, "in_order": in_order}
    crew = Crew(*(DataLoader(Numbers(), batch_size=2, **options) for _ in range(2)))
    batches = iter(crew.loaders[0])
    next(batches)
    assert crew.shares[0].outstanding == 2 * (2 + 1)  # one for each worker, and the one that came
    assert sorted(flat(crew.epoch(0))) == list(range(N))


def test_new_iterator_over_the_same_epoch_loses_nothing() -> None:
    crew = Crew(DataLoader(Numbers(), batch_size=8))
    next(iter(crew.loaders[0]))
    assert sorted(flat(crew.epoch(0))) == list(range(N))


def test_users_sampler_is_shared_by_position() -> None:
    crew = Crew(*(DataLoader(Numbers(), batch_size=8, sampler=Reversed()) for _ in range(2)))
    found = crew.epoch(0)
    assert found[0][0] == list(range(N - 1, N - 9, -1))
    assert sorted(flat(found)) == list(range(N))


def test_users_set_epoch_is_called() -> None:
    crew = Crew(DataLoader(Numbers(), batch_size=8, sampler=Turning()))
    assert flat(crew.epoch(0)) == list(range(N))[::-1]
    assert flat(crew.epoch(1)) == list(range(N))


def weighted(generator: torch.Generator | None) -> DataLoader[int]:
    sampler = WeightedRandomSampler([1.0 + k for k in range(N)], 30, generator=generator)
    return DataLoader(Numbers(), batch_size=8, sampler=sampler)


def test_weighted_sampler_with_equal_generators() -> None:
    crew = Crew(*(weighted(torch.Generator().manual_seed(5)) for _ in range(2)))
    alone = Crew(weighted(torch.Generator().manual_seed(5)))
    assert sorted(flat(crew.epoch(0))) == sorted(flat(alone.epoch(0)))


def test_unequal_generators_are_refused() -> None:
    crew = Crew(*(weighted(torch.Generator().manual_seed(seed)) for seed in (5, 6)))
    with pytest.raises(ValueError, match="disagree on the order of epoch 0"):
        crew.epoch(0)


def test_global_random_state_may_differ_and_is_left_alone() -> None:
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        order = Order(WeightedRandomSampler([1.0] * N, 30))
        orders.append(list(order.items))
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]


def test_injected_distributed_sampler_is_unsplit() -> None:
    samplers = [DistributedSampler(Numbers(), 2, rank, seed=3) for rank in range(2)]
    crew = Crew(*(DataLoader(Numbers(), batch_size=8, sampler=s) for s in samplers))
    assert sorted(flat(crew.epoch(1))) == list(range(N))
    assert len(samplers[0]) == N // 2


def test_shuffle_is_that_of_distributed_sampler() -> None:
    theirs = DistributedSampler(Numbers(), 1, 0, seed=3)
    theirs.set_epoch(2)
    order = Order(DataLoader(Numbers(), shuffle=True).sampler, seed=3, epoch=2)
    assert pick(order.items, list(range(N))) == list(theirs)


@pytest.mark.parametrize("sampler", [SequentialSampler(range(N)), RandomSampler(range(N)), Reversed()])
def test_orders_are_picked_from_and_have_a_fingerprint_of_their_items(sampler: Any) -> None:
    order = Order(sampler, seed=4)
    items = pick(order.items, list(range(N)))
    assert {type(item) for item in items} == {int}
    assert order.digest == fingerprint(items)
    assert pick(order.items, [7, 3]) == [items[7], items[3]]


def test_no_list_is_made_of_a_large_order() -> None:
    for sampler in (
        SequentialSampler(range(10**6)),
        RandomSampler(range(10**6)),
        DistributedSampler(range(10**6), 2, 0),
    ):  # type: ignore[arg-type]
        assert isinstance(Order(sampler).items, (range, torch.Tensor))


def test_equal_balance_pads() -> None:
    found = Crew(*(DataLoader(Numbers(), batch_size=8) for _ in range(3)), balance="equal").epoch(0)
    assert [sum(map(len, rank)) for rank in found] == [17, 17, 17]


def test_users_batch_sampler_is_shared_whole() -> None:
    batches = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    crew = Crew(*(DataLoader(Numbers(), batch_sampler=batches) for _ in range(2)))
    found = crew.epoch(0)
    assert sorted(batch for rank in found for batch in rank) == batches


def test_plain_batch_sampler_given_by_hand_is_shared_by_sample() -> None:
    loader = DataLoader(Numbers(), batch_sampler=BatchSampler(Reversed(), 8, drop_last=True))
    assert (samples_per_batch(loader), drops_last(loader)) == (8, True)
    assert flat(Crew(loader).epoch(0)) == list(range(N - 1, 1, -1))


def test_single_items_without_batching() -> None:
    found = Crew(*(DataLoader(Numbers(), batch_size=None) for _ in range(2))).epoch(0)
    assert sorted(flat(found)) == list(range(N))


def marked(batch: list[int]) -> torch.Tensor:
    return torch.tensor(batch) + 1000


def seeded_worker(_: int) -> None:
    torch.manual_seed(0)


def test_options_of_the_user_are_kept() -> None:
    generator = torch.Generator()
    loader = DataLoader(
        Numbers(),
        batch_size=8,
        collate_fn=marked,
        num_workers=1,
        prefetch_factor=3,
        timeout=30,
        worker_init_fn=seeded_worker,
        generator=generator,
        multiprocessing_context="fork",
        in_order=False,
    )
    made = Crew(loader).loaders[0]
    kept = ["dataset", "collate_fn", "num_workers", "prefetch_factor", "timeout", "worker_init_fn", "generator"]
    for name in [*kept, "pin_memory", "multiprocessing_context", "persistent_workers"]:
        assert getattr(made, name) == getattr(loader, name), name
    assert made.in_order, "what was trained on is booked in that order"
    assert min(next(iter(made)).tolist()) >= 1000


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class OwnIterator(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize("loader", [DataLoader(Stream(), batch_size=2), [torch.zeros(2)]])
def test_stream_is_not_shareable(loader: object) -> None:
    assert not is_shareable(loader)


def test_loader_with_its_own_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match="`OwnIterator` has an iterator of its own"):
        Crew(OwnIterator(TensorDataset(torch.zeros(4))))
