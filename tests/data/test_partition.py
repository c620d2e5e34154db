"""The law of ownership: every sample given out has one owner, and a member that stays never loses one."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_async.data.order import shuffled
from lightning_async.data.partition import NOBODY, ByOwner, Partition, positions_of
from lightning_async.data.ranges import each


def add(partition: Partition, epoch: int, sizes: list[int], members: list[int] | None = None) -> None:
    partition.add(epoch, list(zip(members or range(len(sizes)), sizes, strict=True)))


def owned(partition: Partition, members: list[int]) -> dict[int, set[int]]:
    return {rank: set(partition.samples(rank).tolist()) for rank in members}


def test_samples_have_one_owner_who_keeps_them() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        n, size = rng.randint(1, 6), rng.randint(50, 400)
        partition, members = Partition(size), list(range(n))
        before: dict[int, set[int]] = {}
        for epoch in range(6):
            if len(members) > 1 and rng.random() < 0.3:
                members.remove(rng.choice(members))
            new = min(rng.randint(0, size // 5), size - partition.given)
            amount = new + sum(k for _, k in partition.freed(members))
            cuts = sorted(rng.randint(0, amount) for _ in members[1:])
            add(partition, epoch, [b - a for a, b in zip([0, *cuts], [*cuts, amount], strict=True)], members)
            now = owned(partition, members)
            assert sum(len(own) for own in now.values()) == partition.given == len(set().union(*now.values()))
            assert all(before[rank] <= now[rank] for rank in members if rank in before), f"seed {seed}"
            assert partition.owners().bincount(minlength=0).sum() == size if partition.given == size else True
            before = now


def test_samples_are_drawn_from_the_whole_data_set() -> None:
    partition = Partition(1000)
    add(partition, 0, [50, 50])
    assert sorted(each(partition._slots[0])) == list(range(50))
    assert partition.samples(0).tolist() == sorted(shuffled(1000, 0)[:50].tolist())
    owners = partition.owners()
    assert (owners == NOBODY).sum() == 900
    assert set((owners == 1).nonzero().reshape(-1).tolist()) == set(partition.samples(1).tolist())


def test_what_a_member_that_left_had_is_freed() -> None:
    partition = Partition(100)
    add(partition, 0, [10, 20, 30])
    assert partition.freed([0, 2]) == [(10, 20)]
    assert partition.kept([0, 2]) == [10, 30]
    add(partition, 1, [25, 5], [0, 2])  # 20 freed ones and 10 new ones
    assert (partition.owned(0), partition.owned(1), partition.owned(2)) == (35, 0, 35)
    assert partition.given == 70


def test_with_a_new_member_all_is_cut_anew() -> None:
    partition = Partition(100)
    add(partition, 0, [30, 30])
    assert partition.freed([0, 1, 2]) == [(0, 60)]
    assert partition.kept([0, 1, 2]) == [0, 0, 0]
    add(partition, 1, [30, 30, 40])
    assert [partition.owned(rank) for rank in range(3)] == [30, 30, 40]
    assert partition.given == 100


def test_state_goes_on_and_other_data_begin_anew() -> None:
    partition = Partition(100)
    add(partition, 3, [30, 0, 40])
    again, other = Partition(100), Partition(101)
    assert again.load_state_dict(partition.state_dict())
    assert (again.given, again.epoch) == (70, 3)
    assert owned(again, [0, 1, 2]) == owned(partition, [0, 1, 2])
    assert again.freed([0, 1, 2]) == []
    assert not other.load_state_dict(partition.state_dict())
    assert other.given == 0


def numbers(owners: list[int], members: list[int], least: int = 1) -> list[list[int]]:
    made, begin, found = ByOwner(torch.tensor(owners), members, least=least), 0, []
    for _, amount in made.seats:
        found.append(each(made.positions(begin, amount)))
        begin += amount
    assert begin == len(made)
    return found


def test_each_members_positions_are_a_range_of_numbers() -> None:
    assert numbers([1, 0, 1, 1, 0, 1, 0, 1], [0, 1]) == [[1, 4, 6], [0, 2, 3, 5, 7]]
    assert numbers([1, NOBODY, 0, 1, NOBODY], [0, 1]) == [[2], [0, 3]]
    assert numbers([NOBODY] * 3, [0, 1]) == [[], []]


def test_every_member_has_the_least() -> None:
    assert numbers([0, 0, 0, 0], [0, 1]) == [[0, 1, 2], [3]]
    assert numbers([0] * 8, [0, 1, 2], 2) == [[0, 1, 2, 3], [6, 7], [4, 5]]
    assert numbers([0, NOBODY], [0, 1, 2]) == [[0], [0], [0]]
    assert numbers([0, 0, 1], [0, 1], 4) == [[0, 1, 0, 1], [1, 0, 1, 0]] or all(
        len(own) >= 4 for own in numbers([0, 0, 1], [0, 1], 4)
    )


def test_positions_go_by_their_samples() -> None:
    owners = torch.tensor([0, 1, 0, 1, NOBODY], dtype=torch.int32)
    assert positions_of(owners, [3, 3, 0, 4, 1], 5).tolist() == [1, 1, 0, NOBODY, 1]
    assert positions_of(owners, range(5), 3).tolist() == [0, 1, 0]


def test_what_is_no_index_is_refused() -> None:
    with pytest.raises(ValueError, match="`partition='kept'` gives samples to members for good"):
        positions_of(torch.tensor([0]), [[0, 1], [2]], 2)
