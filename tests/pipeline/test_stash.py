"""A gradient belongs to the weights of its forward pass, whatever the optimizer did since."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_async.pipeline.stash import Held, Semantics, Stash


class Scaled(nn.Module):
    """Keeps its weight in a function of its own."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)  # type: ignore[attr-defined]
            return x * w

        @staticmethod
        def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors  # type: ignore[attr-defined]
            return g * w, (g * x).sum(0)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.Times.apply(x, self.w)  # type: ignore[no-any-return]


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(8, 8),
    lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 3)),
    lambda: nn.LayerNorm(8),
    lambda: nn.BatchNorm1d(8),
    lambda: nn.PReLU(8),
    lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)),
    lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.LSTM(4, 3)),
    lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)),
    Scaled,
]


def _loss(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (out if isinstance(out, Tensor) else out[0]).square().sum()


def _late(layer: nn.Module, x: Tensor, semantics: Semantics) -> list[Tensor]:
    """The gradient of a batch after the weights moved."""
    stash = Stash(layer.parameters(), semantics)
    with stash.keeping():
        out = _loss(layer(x))
    stash.push(Held(1, x, out))
    stash.before_step()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    return list(torch.autograd.grad(out, [x, *layer.parameters()]))


@pytest.mark.parametrize("make", LAYERS)
def test_the_gradient_is_that_of_the_old_weights(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    layer, x = make(), torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad(_loss(layer(x)), [x, *layer.parameters()])
    moved = [p.detach() + 1.0 for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(_late(layer, x, "stash"), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), moved, strict=True))


def test_a_hybrid_gradient_is_neither_old_nor_new() -> None:
    torch.manual_seed(1)
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    old = torch.autograd.grad(_loss(layer(x)), [x, *layer.parameters()])
    hybrid = _late(layer, x, "hybrid")
    new = torch.autograd.grad(_loss(layer(x)), [x, *layer.parameters()])
    assert torch.equal(hybrid[3], old[3])  # of the last layer: all it needs are activations
    assert not any(torch.equal(h, o) for h, o in zip(hybrid[:3], old[:3], strict=True))
    assert not any(torch.equal(h, n) for h, n in zip(hybrid, new, strict=True))


def test_old_weights_live_as_long_as_a_graph_needs_them() -> None:
    layer = nn.Linear(8, 8)
    stash = Stash(layer.parameters())
    held_storage = layer.weight.data_ptr()
    stash.before_step()
    assert layer.weight.data_ptr() == held_storage  # nothing is held, nothing is copied
    with stash.keeping():
        out = layer(torch.randn(2, 8, requires_grad=True))
    stash.push(Held(1, None, out))
    stash.before_step()
    assert layer.weight.data_ptr() != held_storage
    stash.pop(1)
    assert len(stash) == 0
    assert stash.most == 1


def test_what_is_changed_in_place_otherwise_is_refused_as_ever() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8, requires_grad=True)
    stash = Stash(layer.parameters())
    with stash.keeping():
        hidden = layer(x)
        out = hidden.exp()
    out.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="changed by an in-place operation"):
        out.sum().backward()


def test_batches_come_back_in_order() -> None:
    stash = Stash([])
    with pytest.raises(RuntimeError, match="gradient of batch 1 came, but the oldest batch in the stash is none"):
        stash.pop(1)
    stash.push(Held(1, None, None))
    stash.push(Held(2, None, None))
    with pytest.raises(RuntimeError, match="gradient of batch 2 came, but the oldest batch in the stash is 1"):
        stash.pop(2)
    assert stash.pop(1).batch == 1


def test_semantics_has_three_values() -> None:
    with pytest.raises(ValueError, match="`semantics` must be 'stash', 'recompute' or 'hybrid', got 'exact'"):
        Stash([], "exact")  # type: ignore[arg-type]
