"""Networks in blocks, to be cut anywhere, and what they learn: real data that packages carry, nothing is downloaded.

perceptron     18 layers with straight ways beside them, on scikit-learn's digits
transformer    four rounds of attention, on the sources of Python's standard library
convolutional  20 layers with BatchNorm, on the digits as pictures of 8x8
deep           112 layers, on the digits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.tasks import CHARACTERS, CONTEXT, Block, characters, digits


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


def convolutional(width: int = 16) -> list[nn.Module]:
    """20 layers: a convolution, nine residual blocks of two, a linear one."""
    first = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    )
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return [first, *(Residual(width) for _ in range(9)), last]


def perceptron(layers: int = 8, width: int = 48) -> list[nn.Module]:
    """A linear layer, residual blocks of two, a linear layer."""
    return [nn.Linear(64, width), *(Wide(width) for _ in range(layers)), nn.Linear(width, 10)]


def transformer(width: int = 32, layers: int = 4) -> list[nn.Module]:
    """A small transformer."""
    return [
        Embed(width),
        *(Block(width) for _ in range(layers)),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CHARACTERS)),
    ]


def small() -> list[Job]:
    """Minutes for all seeds."""
    task, text = digits(), characters(6400)
    return [
        Job("digits", task.train, task.validation, perceptron, sgd=0.05, adam=2e-3, passes=24, batch=32),
        Job("characters", text.train, text.validation, transformer, sgd=0.2, adam=4e-3, passes=1, batch=16),
    ]


def large() -> list[Job]:
    """Hours for all seeds."""
    task = digits()
    return [
        Job("convolutional", task.train, task.validation, convolutional, sgd=0.05, adam=2e-3, passes=24, batch=32),
        Job(
            "112 layers", task.train, task.validation, lambda: perceptron(55), sgd=0.02, adam=1e-3, passes=24, batch=32
        ),
    ]
