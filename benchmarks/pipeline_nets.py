"""Networks in blocks, to be cut anywhere, and what they learn: real data that packages carry, nothing is downloaded.

convolutional  20 layers with BatchNorm, as ResNet-20: on scikit-learn's digits as pictures of 8x8
transformer    four rounds of attention, on the sources of Python's standard library
deep           112 layers with straight ways beside them, on the digits

All are small, so that ten seeds of every variant take minutes on one core. Learning rates are the best of three for
backpropagation, as the table shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F  # noqa: N812

from benchmarks.tasks import CHARACTERS, CONTEXT, Block, characters, digits

SHORT = 32  # characters of a piece


@dataclass(frozen=True)
class Job:
    """A network in blocks, its samples, and how it is trained."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    blocks: Callable[[], list[nn.Module]]
    sgd: float
    adam: float
    passes: int
    batch: int


class Copies(nn.Module):
    """One block of several networks that are alike: each has its own weights and samples, and learns by itself.

    Their weights are stacked, and so is what goes through them: the first dimension is the network.
    """

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        weights, buffers = stack_module_state(list(copies))
        self._names, self._kept = list(weights), list(buffers)
        self._one = [copies[0]]  # in a list: its own weights are not ours
        self._weights = nn.ParameterList(weights.values())
        for at, buffer in enumerate(buffers.values()):
            self.register_buffer(f"buffer{at}", buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Each through its own."""
        self._one[0].train(self.training)
        weights = dict(zip(self._names, self._weights, strict=True))
        buffers = dict(zip(self._kept, self.buffers(), strict=True))

        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self._one[0], (weights, buffers), (x,))  # type: ignore[no-any-return]

        return vmap(one)(weights, buffers, x)


class Residual(nn.Module):
    """Two convolutions beside a straight way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return F.relu(x + self.inner(x))


class Wide(nn.Module):
    """Two layers beside a straight way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        nn.init.zeros_(self.inner[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return x + self.inner(x)  # type: ignore[no-any-return]


class Embed(nn.Module):
    """Characters and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))

    def forward(self, x: Tensor) -> Tensor:
        """One vector for each character."""
        return self.characters(x) + self.places[: x.shape[1]]  # type: ignore[no-any-return]


def convolutional(width: int = 8) -> list[nn.Module]:
    """20 layers: a convolution, nine residual blocks of two, a linear one."""
    first = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    )
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return [first, *(Residual(width) for _ in range(9)), last]


def deep(layers: int = 55, width: int = 48) -> list[nn.Module]:
    """112 layers: a linear one, residual blocks of two, a linear one."""
    return [nn.Linear(64, width), *(Wide(width) for _ in range(layers)), nn.Linear(width, 10)]


def transformer(width: int = 32, layers: int = 4) -> list[nn.Module]:
    """A small transformer."""
    return [
        Embed(width),
        *(Block(width) for _ in range(layers)),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CHARACTERS)),
    ]


def jobs() -> list[Job]:
    """What is trained; the learning rates are the best of three for backpropagation."""
    task, text = digits(), characters(1600)
    pieces, held_out = ((x[:, :SHORT], y[:, :SHORT]) for x, y in (text.train, text.validation))
    return [
        Job("convolutional", task.train, task.validation, convolutional, sgd=0.05, adam=3e-3, passes=6, batch=32),
        Job("transformer", pieces, held_out, transformer, sgd=0.3, adam=5e-3, passes=1, batch=8),
        Job("112 layers", task.train, task.validation, deep, sgd=0.03, adam=1e-3, passes=6, batch=32),
    ]
