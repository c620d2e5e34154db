"""Two batches are told apart, whatever they are made of; a loader goes on in mid-epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_async.strategies.pipe_data import FromMidEpoch, stamp_of

X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    "other",
    [
        [X + 1, X],
        [X, X.bfloat16()],
        [X.view(4, 3), X],
        {"x": X, "y": [X, X]},
        [X > 3, X],
        [X[:0], X],
        [X.to(torch.int64)],
    ],
)
def test_another_batch_has_another_stamp(other: Any) -> None:
    assert stamp_of([X, X.clone()]) == stamp_of((X.clone(), X))
    assert stamp_of(other) != stamp_of([X, X])
    assert stamp_of(other) == stamp_of(other)


def test_what_holds_no_tensor_has_no_stamp() -> None:
    assert stamp_of(["text", 3]) == stamp_of(None) == 0


def test_a_loader_of_a_run_that_goes_on_is_the_loader_but_for_its_state() -> None:
    loader = FromMidEpoch(DataLoader(list(range(10)), batch_size=2))
    assert len(loader) == 5
    assert loader.batch_size == 2
    assert [b.tolist() for b in loader][3:] == [[6, 7], [8, 9]]
    loader.load_state_dict(loader.state_dict())
