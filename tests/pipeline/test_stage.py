"""A stage refuses what would be wrong without a word, each in a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_async.pipeline.stage import Stage
from lightning_async.pipeline.stash import Semantics


@pytest.mark.parametrize("semantics", ["stash", "recompute"])
@pytest.mark.parametrize(
    "first", [nn.ReLU(inplace=True), nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 4))]
)
def test_a_first_block_that_changes_its_input(first: nn.Module, semantics: Semantics) -> None:
    stage = Stage(1, 3, first.parameters(), semantics=semantics)
    with pytest.raises(ValueError, match="the first block of stage 1 changes what it gets in place"):
        stage.forward(1, torch.randn(2, 4), first.__call__)


def test_a_later_one_may() -> None:
    blocks = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    stage = Stage(1, 3, blocks.parameters())
    out = stage.forward(1, torch.randn(2, 4), blocks.__call__)
    gradient = stage.backward(1, torch.ones_like(out))
    assert gradient is not None


@pytest.mark.parametrize(
    ("out", "what"),
    [
        (lambda x: (x, x), "a tuple"),
        (lambda x: {"x": x}, "a dict"),
        (lambda x: x.argmax(-1), "a tensor of torch.int64"),
    ],
)
def test_what_cannot_go_to_the_next_stage(out: object, what: str) -> None:
    stage = Stage(0, 2, [])
    with pytest.raises(ValueError, match=f"stage 0 ends with {what}, but .* one floating-point tensor"):
        stage.forward(1, torch.randn(2, 4), out)  # type: ignore[arg-type]


def test_the_last_stage_may_end_as_it_likes() -> None:
    entered, out = Stage(1, 2, []).enter(1, torch.randn(2, 4), lambda x: (x, x))  # type: ignore[arg-type,return-value]
    assert entered.requires_grad
    assert isinstance(out, tuple)


def test_sums_of_gradients_are_kept_where_nobody_clears_them() -> None:
    layer = nn.Linear(2, 1, bias=False)
    stage = Stage(0, 2, layer.parameters())
    x = torch.ones(1, 2)
    for batch in (1, 2):
        stage.forward(batch, x, layer.__call__)
    for batch in (1, 2):
        stage.backward(batch, torch.ones(1, 1))
        assert layer.weight.grad is None
    stage.before_step()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[2.0, 2.0]]
    stage.after_step()
    assert layer.weight.grad is None


def test_frozen_stages_pass_nothing_on() -> None:
    layer = nn.Linear(2, 1).requires_grad_(False)
    stage = Stage(0, 2, [])
    stage.forward(1, torch.ones(1, 2), layer.__call__)
    assert stage.backward(1, torch.ones(1, 1)) is None


def test_a_stage_of_frozen_blocks_passes_gradients_on() -> None:
    layer = nn.Linear(2, 2, bias=False).requires_grad_(False)
    stage = Stage(1, 3, [])
    stage.forward(1, torch.ones(1, 2), layer.__call__)
    gradient = stage.backward(1, torch.ones(1, 2))
    assert gradient is not None
    assert torch.equal(gradient, layer.weight.sum(0, keepdim=True))


def test_what_does_not_reach_the_loss_has_a_gradient_of_zeros() -> None:
    stage = Stage(1, 3, [])
    stage.forward(1, torch.ones(1, 2), lambda x: torch.ones(1, 2))
    gradient = stage.backward(1, torch.ones(1, 2))
    assert gradient is not None
    assert torch.equal(gradient, torch.zeros(1, 2))


def _half(x: Tensor) -> Tensor:
    return x.bfloat16()


def test_a_gradient_takes_the_dtype_of_what_was_sent() -> None:
    stage = Stage(1, 3, [])
    assert stage.forward(1, torch.ones(1, 2), _half).dtype == torch.bfloat16
    gradient = stage.backward(1, torch.ones(1, 2))
    assert gradient is not None
    assert gradient.dtype == torch.float32
