"""Counts are those of the synchronous run."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch

from lightning_async.data.counts import epoch_batches, limited, samples_in


@pytest.mark.parametrize("total", [1, 47, 48, 49, 1000])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_epoch_has_the_batches_of_a_distributed_sampler(total: int, members: int) -> None:
    data: Any = range(total)
    sampler = torch.utils.data.DistributedSampler(data, members, 0)
    assert epoch_batches(total, members=members, batch=8) == len(torch.utils.data.DataLoader(data, 8, sampler=sampler))


@pytest.mark.parametrize("total", [48, 55, 60, 63, 1000])
def test_whole_batches_never_overrun_a_schedule(total: int) -> None:
    for members in (1, 2, 3):
        scheduled = epoch_batches(total, members=members, batch=8, drop_last=True)
        assert 0 <= scheduled - (total // 8) / members < 1


@pytest.mark.parametrize("batches", [(4, 12), (1, 2), (3, 5, 9)])
@pytest.mark.parametrize("total", [1, 47, 240, 1000])
def test_batches_of_unlike_size_make_as_many_steps_as_their_sum_does(total: int, batches: tuple[int, ...]) -> None:
    mean = Fraction(sum(batches), len(batches))
    assert epoch_batches(total, members=len(batches), batch=mean) == -(-total // sum(batches))
    assert limited(3, 1000, members=len(batches), batch=mean) == 3 * sum(batches)


@pytest.mark.parametrize(("limit", "positions"), [(1, 16), (3, 48), (100, 100), (1.0, 100), (0.5, 48), (0.99, 96)])
def test_limit_is_so_many_batches_of_each_rank(limit: float, positions: int) -> None:
    assert limited(limit, 100, members=2, batch=8) == positions


def test_part_of_less_than_a_batch_is_refused() -> None:
    with pytest.raises(
        ValueError, match="less than one of the 7 batches that each rank has in an epoch; give at least"
    ):
        limited(0.1, 100, members=2, batch=8)


@dataclass
class Pair:
    name: str
    inputs: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(8, 3), 8),
        (torch.tensor(3.0), 1),
        ([torch.zeros(4, 2), torch.zeros(4)], 4),
        ({"text": ["a", "b"], "label": torch.zeros(2)}, 2),
        (({"x": (torch.zeros(5),)}, None), 5),
        (Pair("name", torch.zeros(6)), 6),
        (["a", "b", "c"], 3),
        ((["a", "b"], ["c", "d"]), 2),
        (torch.zeros(7).numpy(), 7),
        ("text", None),
        (None, None),
        ({}, None),
        (3, None),
    ],
)
def test_samples_of_a_batch(batch: Any, samples: int | None) -> None:
    assert samples_in(batch) == samples
