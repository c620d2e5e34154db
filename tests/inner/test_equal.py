"""Tiles, branches and overlapped steps give what the plain model gives: outputs, gradients, buffers and weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.inner.branches import Branches
from lightning_async.inner.overlap import OverlappedSteps
from lightning_async.inner.threads import Threads
from lightning_async.inner.tiles import TiledConv2d, tile

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """In double precision sums in another order are the same to ten digits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(3)
    yield made
    made.close()


def passed(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What one pass gives: output, gradients of input and weights, buffers."""
    x = x.clone().requires_grad_()
    output = model(x)
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    weights = dict(model.named_parameters())
    grads = [
        weights[name].grad
        for name in sorted(weights, key=lambda n: n.removeprefix("model."))
        if weights[name].requires_grad
    ]
    return [output.detach(), x.grad, *grads, *model.buffers()]  # type: ignore[list-item]


def check(plain: nn.Module, made: nn.Module, x: Tensor) -> None:
    for theirs, ours in zip(passed(plain, x), passed(made, x), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "padding": (4, 2), "stride": 2},
        {"kernel_size": (1, 3), "padding": (0, 1), "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": 3, "groups": 2},
        {"kernel_size": 7, "padding": 6, "stride": (3, 1)},
        {"kernel_size": 1, "stride": 4},
    ],
)
def test_tiles_make_the_convolution(options: dict[str, Any], batch: int, threads: Threads) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 6, **options), nn.ReLU())
    made = copy.deepcopy(plain)
    tile(made, threads)
    assert isinstance(made[0], TiledConv2d)
    check(plain, made, torch.randn(batch, 4, 11, 13))


def test_without_a_gradient_to_the_input(threads: Threads) -> None:
    plain = nn.Conv2d(3, 4, 3)
    made, x = copy.deepcopy(plain), torch.randn(4, 3, 9, 9)
    tile(made, threads)
    for model in (plain, made):
        model(x).square().sum().backward()
    torch.testing.assert_close(made.weight.grad, plain.weight.grad, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(made(x), plain(x), **CLOSE)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_where_tiles_do_not_apply_it_is_the_plain_one(options: dict[str, Any], threads: Threads) -> None:
    plain = nn.Conv2d(3, 4, 3, **options)
    made, x = copy.deepcopy(plain), torch.randn(2, 3, 8, 8)
    tile(made, threads)
    assert torch.equal(made(x), plain(x))
    assert torch.equal(made(x[0]), plain(x[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == plain(x).dtype


def test_tiles_can_be_taken_back_and_copied(threads: Threads) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2))
    names = list(model.state_dict())
    put_back = tile(model, threads)
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == names
    assert twin[0].threads is threads
    assert twin[0].weight is not model[0].weight
    put_back()
    assert type(model[0]) is nn.Conv2d
    assert not hasattr(model[0], "threads")


class Branched(nn.Module):
    """Branches with layers, functions, a shared layer, a weight of its own, a detour and a join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2), nn.Sigmoid())
        self.shared = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left, right = self.left(x), self.right(x)
        third = self.shared(left) * self.scale
        fourth = self.shared(torch.tanh(right)) + self.frozen(x) + self.scale
        joined = torch.cat([left, right, third, fourth], 1)
        return self.head(joined.mean((2, 3)).reshape(joined.size(0), -1))  # type: ignore[no-any-return]


def test_branches_make_the_model(threads: Threads) -> None:
    plain = Branched()
    made = Branches(copy.deepcopy(plain), threads)
    for _ in range(3):  # later passes go by the costs measured in the first
        check(plain, made, torch.randn(5, 3, 8, 8))
    assert len(made.chains) >= 4
    assert list(made.model.state_dict()) == list(plain.state_dict())


def test_branches_train_like_the_model(threads: Threads) -> None:
    plain = Branched()
    made = Branches(copy.deepcopy(plain), threads)
    tile(made, threads)
    x, ends = torch.randn(6, 3, 8, 8), []
    for model in (plain, made):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for theirs, ours in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(x), plain.eval()(x), **CLOSE)


class Splits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2)
        return a + b


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


def test_what_branches_cannot_do_is_said(threads: Threads) -> None:
    with pytest.raises(ValueError, match="a branch of the model hands on tuple, and only tensors can be"):
        Branches(Splits(), threads)(torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match="a model of branches must return one tensor"):
        Branches(Pairs(), threads)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_overlapped_steps_are_the_steps(optimizer: Any, threads: Threads) -> None:
    plain = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    made, x = copy.deepcopy(plain), torch.randn(16, 8)
    theirs = optimizer(plain.parameters(), lr=0.01)
    ours = OverlappedSteps(lambda p: optimizer(p, lr=0.01), made.parameters(), threads)
    for _ in range(5):
        theirs.zero_grad()
        plain(x).square().mean().backward()
        theirs.step()
        made(x).square().mean().backward()
        ours.finish()
    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    ours.close()
    made(x).sum().backward()
    assert made[0].weight.grad is not None
