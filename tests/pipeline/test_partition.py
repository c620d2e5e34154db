"""The cuts make the slowest stage as fast as it can be: against all cuts there are."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch
from torch import nn

from lightning_async.pipeline.partition import balanced, check_cuts, even, measure, spans


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_no_other_cuts_are_faster(stages: int) -> None:
    chance = random.Random(stages)
    for _ in range(50):
        seconds = [chance.random() for _ in range(chance.randint(stages, 9))]
        best = min(
            max(sum(seconds[i] for i in span) for span in spans(cuts, len(seconds)))
            for cuts in combinations(range(1, len(seconds)), stages - 1)
        )
        cuts = check_cuts(balanced(seconds, stages), len(seconds), stages)
        assert max(sum(seconds[i] for i in span) for span in spans(cuts, len(seconds))) == pytest.approx(best)


def test_even_cuts() -> None:
    assert even(7, 3) == (2, 4)
    assert even(4, 1) == ()
    assert [list(span) for span in spans((2, 4), 7)] == [[0, 1], [2, 3], [4, 5, 6]]


@pytest.mark.parametrize("cuts", [(), (0,), (5,), (1, 2), (True,), (2.0,)])
def test_cuts_that_are_none(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`split` must be 1 rising block numbers between 1 and 4"):
        check_cuts(cuts, 5, 2)


@pytest.mark.parametrize("cut", [lambda: even(2, 3), lambda: balanced([1.0, 1.0], 3), lambda: check_cuts((1, 2), 2, 3)])
def test_too_few_blocks(cut: object) -> None:
    with pytest.raises(ValueError, match="2 blocks cannot be cut into 3 stages"):
        cut()  # type: ignore[operator]


def test_measuring_changes_nothing() -> None:
    blocks = [
        nn.Embedding(5, 4),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        nn.ReLU(inplace=True),
    ]
    before = [x.clone() for block in blocks for x in block.state_dict().values()]
    state = torch.get_rng_state()
    seconds = measure(blocks, torch.tensor([[0, 1], [2, 3]]))
    assert len(seconds) == 3
    assert all(s > 0 for s in seconds)
    after = [x for block in blocks for x in block.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for block in blocks for p in block.parameters())
