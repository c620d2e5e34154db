"""Networks in blocks, to be cut anywhere, and what they learn: real data that packages carry, nothing is downloaded.

convolutional  20 layers with BatchNorm, as ResNet-20: on scikit-learn's digits, pictures of 8x8
transformer    four rounds of attention, on the sources of Python's standard library
deep           112 layers with straight ways beside them, on the digits

All are small, so that ten seeds of every variant take minutes on one core. The networks of all seeds go through a block
at once, each with its own weights and samples: a batch has a dimension for them, the first one, and so have weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.tasks import CHARACTERS, CONTEXT, characters, digits

SHORT = 16  # characters of a piece


class Draws:
    """Random numbers for the networks of several seeds: what one of them draws does not depend on the others."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.random = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int, std: float) -> nn.Parameter:
        """Weights of the normal distribution, one set for each network."""
        return nn.Parameter(std * torch.stack([torch.randn(shape, generator=one) for one in self.random]))

    def orders(self, samples: int, passes: int) -> Tensor:
        """The order of the samples for each network."""
        return torch.stack(
            [torch.cat([torch.randperm(samples, generator=one) for _ in range(passes)]) for one in self.random]
        )

    def __len__(self) -> int:
        return len(self.random)


@dataclass(frozen=True)
class Job:
    """A network in blocks, its samples, and how it is trained.

    Attributes:
        name: Its name in the tables.
        train: Inputs and targets.
        validation: Inputs and targets.
        blocks: Makes the network.
        sgd: The learning rate of SGD with momentum.
        adam: That of AdamW.
        passes: How often the samples are seen.
        batch: Samples of an update.
        parts_matter: Whether a batch in parts gives another gradient: with BatchNorm.
    """

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    blocks: Callable[[Draws], list[nn.Module]]
    sgd: float
    adam: float
    passes: int
    batch: int
    parts_matter: bool = False


class Linear(nn.Module):
    """A linear layer for each network."""

    def __init__(self, draws: Draws, inputs: int, outputs: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = draws.normal(inputs, outputs, std=gain * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(draws), 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Each through its own."""
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).view(*x.shape[:-1], -1)


class Norm(nn.Module):
    """Layer normalisation, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean 0, variance 1."""
        return F.layer_norm(x, x.shape[-1:])


class Beside(nn.Module):
    """Layers beside a straight way."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return x + self.inner(x)  # type: ignore[no-any-return]


class Wide(nn.Module):
    """Two layers beside a straight way, which is all there is at first."""

    def __init__(self, draws: Draws, width: int) -> None:
        super().__init__()
        self.norm = Norm()
        self.first, self.second = draws.normal(width, width, std=width**-0.5), draws.normal(width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return torch.baddbmm(x, F.relu(torch.bmm(self.norm(x), self.first)), self.second)


class Attention(nn.Module):
    """Attention to what came before."""

    def __init__(self, draws: Draws, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.back = Linear(draws, width, 3 * width), Linear(draws, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """One round."""
        q, k, v = self.attend(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        seen = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), is_causal=True)
        back: Tensor = self.back(seen.transpose(1, 2).flatten(-2).view_as(x))
        return back


class Embed(nn.Module):
    """Characters and their places."""

    def __init__(self, draws: Draws, width: int) -> None:
        super().__init__()
        self.characters = draws.normal(CHARACTERS, width, std=0.02)
        self.places = draws.normal(1, CONTEXT, width, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """One vector for each character."""
        networks = torch.arange(len(x))[:, None, None]
        return self.characters[networks, x] + self.places[:, :, : x.shape[-1]]


class Pictures(nn.Module):
    """64 numbers are a picture of 8x8; from here on the networks' channels lie side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """[networks, batch, 64] to [batch, networks, 8, 8]."""
        return x.transpose(0, 1).reshape(x.shape[1], x.shape[0], 8, 8)


class Pooled(nn.Module):
    """The mean of each channel, and the networks come first again."""

    def __init__(self, networks: int) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x: Tensor) -> Tensor:
        """[batch, networks * channels, ...] to [networks, batch, channels]."""
        return x.mean((-1, -2)).view(len(x), self.networks, -1).transpose(0, 1)


class Convolution(nn.Module):
    """3x3 and BatchNorm, for each network by itself."""

    def __init__(self, draws: Draws, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.networks, self.stride = len(draws), stride
        self.weight = nn.Parameter(
            draws.normal(outputs, inputs, 3, 3, std=(2 / (9 * inputs)) ** 0.5).flatten(0, 1).detach()
        )
        self.norm = nn.BatchNorm2d(len(draws) * outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        x = F.conv2d(x, self.weight, stride=self.stride, padding=1, groups=self.networks)
        out: Tensor = self.norm(x)
        return out


class Residual(nn.Module):
    """Two convolutions beside a straight way."""

    def __init__(self, draws: Draws, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(Convolution(draws, width, width), nn.ReLU(), Convolution(draws, width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return F.relu(x + self.inner(x))


def convolutional(draws: Draws, width: int = 8) -> list[nn.Module]:
    """20 layers: a convolution, nine residual blocks of two, a linear one."""
    first = nn.Sequential(Pictures(), Convolution(draws, 1, width, stride=2), nn.ReLU())
    last = nn.Sequential(Pooled(len(draws)), Linear(draws, width, 10))
    return [first, *(Residual(draws, width) for _ in range(9)), last]


def deep(draws: Draws, layers: int = 55, width: int = 24) -> list[nn.Module]:
    """112 layers: a linear one, residual blocks of two, a linear one."""
    return [
        Linear(draws, 64, width),
        *(Wide(draws, width) for _ in range(layers)),
        nn.Sequential(Norm(), Linear(draws, width, 10)),
    ]


def transformer(draws: Draws, width: int = 32, layers: int = 4) -> list[nn.Module]:
    """A small transformer."""
    rounds = [
        nn.Sequential(
            Beside(Norm(), Attention(draws, width)),
            Beside(Norm(), Linear(draws, width, 4 * width), nn.GELU(), Linear(draws, 4 * width, width)),
        )
        for _ in range(layers)
    ]
    return [Embed(draws, width), *rounds, nn.Sequential(Norm(), Linear(draws, width, CHARACTERS))]


def jobs() -> list[Job]:
    """What is trained.

    Learning rates are backpropagation's: of 0.001, 0.003, 0.01, ... the smallest with which seeds that are in no table
    come within half a point of the best. A pipeline's were not looked for.
    """
    task, text = digits(), characters(3600)
    pieces, held_out = ((x[:, :SHORT], y[:, :SHORT]) for x, y in (text.train, text.validation))
    pictures = Job("convolutional", task.train, task.validation, convolutional, sgd=0.1, adam=0.01, passes=18, batch=48)
    return [
        replace(pictures, parts_matter=True),
        Job("transformer", pieces, held_out, transformer, sgd=0.03, adam=0.01, passes=1, batch=12),
        Job("112 layers", task.train, task.validation, deep, sgd=3e-3, adam=1e-3, passes=12, batch=48),
    ]
