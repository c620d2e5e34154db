"""Two small learning tasks in plain torch: small enough to repeat over seeds, real enough to tell methods apart.

    digits       scikit-learn's 8x8 digits, an MLP, SGD with momentum; 10 passes over 1,197 samples
    characters   the sources of Python's standard library, a transformer (2 layers, width 64, context 64), AdamW; 1 pass

The split into training and validation is fixed. A seed decides the first weights and the order of the samples, so two
variants with one seed are a pair. Text and labels are read from what is installed: nothing is downloaded.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, AdamW, Optimizer

SPLIT_SEED = 20
DIGITS_VALIDATION = 600

CONTEXT = 64
VALIDATION_PIECES = 256
CHARACTERS = 96  # printable ASCII, and one for all the rest: the line's end
MODULES = """
    _pydecimal argparse ast asyncio/base_events asyncio/streams asyncio/tasks bdb calendar codecs
    collections/__init__ configparser contextlib copy csv dataclasses datetime difflib dis doctest enum
    fractions ftplib functools gettext heapq http/client http/server imaplib inspect ipaddress json/encoder
    locale logging/__init__ logging/handlers mailbox optparse os pathlib pdb pickle pickletools platform
    plistlib random shutil smtplib socket statistics string subprocess tarfile tempfile threading traceback
    turtle typing unittest/case unittest/mock urllib/parse urllib/request uuid weakref xml/dom/minidom zipfile
"""
HELD_OUT = """
    bisect cmd fileinput fnmatch getopt glob netrc sched shelve shlex textwrap timeit zipapp
"""


@dataclass(frozen=True)
class Score:
    """How good weights are on the validation samples."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """Samples, a model and an optimizer.

    Attributes:
        name: Its name in the tables.
        train: Inputs and targets.
        validation: Inputs and targets.
        build: Makes the model.
        optimize: Makes the optimizer for these parameters and this learning rate.
        lr: DDP's learning rate, the best of `grid` for it (the tables say so).
        grid: The learning rates that were tried.
        batch: Samples of one rank's step.
        passes: How often the samples are seen.
    """

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    build: Callable[[], nn.Module]
    optimize: Callable[[Iterable[nn.Parameter], float], Optimizer]
    lr: float
    grid: tuple[float, ...]
    batch: int
    passes: int = 1

    def model(self, seed: int) -> nn.Module:
        """A new model; the seed alone decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def batches(self, seed: int, ranks: int) -> list[Tensor]:
        """The batches in the order in which they are handed out; as many as all ranks can share equally."""
        random = torch.Generator().manual_seed(seed)
        size = len(self.train[0])
        order = torch.cat([torch.randperm(size, generator=random) for _ in range(self.passes)])
        count = len(order) // (self.batch * ranks) * ranks
        return list(torch.split(order[: count * self.batch], self.batch))

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        """The mean loss of these training samples."""
        x, y = self.train
        return F.cross_entropy(model(x[samples]).flatten(0, -2), y[samples].flatten())

    @torch.no_grad()
    def score(self, model: nn.Module) -> Score:
        """Loss and accuracy on the validation samples."""
        x, y = self.validation
        logits, y = model(x).flatten(0, -2), y.flatten()
        return Score(F.cross_entropy(logits, y).item(), (logits.argmax(-1) == y).float().mean().item())


# -- digits -----------------------------------------------------------------------------------------------------------


@cache
def digits() -> Task:
    """Handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.data).float() / 16 - 0.5
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, kept = order[:DIGITS_VALIDATION], order[DIGITS_VALIDATION:]
    return Task(
        "digits",
        train=(x[kept], y[kept]),
        validation=(x[held_out], y[held_out]),
        build=lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        optimize=lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9),
        lr=0.1,
        grid=(0.02, 0.05, 0.1, 0.2),
        batch=8,
        passes=10,
    )


# -- characters -------------------------------------------------------------------------------------------------------


@cache
def characters(samples: int = 6400) -> Task:
    """The next character of Python's own sources; `samples` pieces of `CONTEXT` characters are trained on, once."""
    pieces = _pieces(MODULES)
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(SPLIT_SEED))[:samples]
    train, held_out = pieces[chosen], _pieces(HELD_OUT)
    validation = held_out[:: len(held_out) // VALIDATION_PIECES][:VALIDATION_PIECES]
    return Task(
        "characters",
        train=(train[:, :-1], train[:, 1:]),
        validation=(validation[:, :-1], validation[:, 1:]),
        build=Transformer,
        optimize=lambda parameters, lr: AdamW(parameters, lr=lr),
        lr=2e-3,
        grid=(1e-3, 2e-3, 5e-3, 1e-2),
        batch=4,
    )


class Transformer(nn.Module):
    """Guesses the next character from those before it."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the next character at every place."""
        logits: Tensor = self.out(self.norm(self.blocks(self.embed(x) + self.place[: x.shape[1]])))
        return logits


class Block(nn.Module):
    """Attention to what came before, then two layers at each place."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """One round."""
        q, k, v = self.attend(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.back(seen.transpose(1, 2).flatten(-2))
        thought: Tensor = x + self.think(self.second(x))
        return thought


def _pieces(modules: str) -> Tensor:
    """The text of the modules, cut into rows of `CONTEXT + 1` characters (the last one is only guessed)."""
    codes = torch.frombuffer(bytearray(_text(modules).encode("ascii", "replace")), dtype=torch.uint8).long() - 31
    codes = torch.where((codes >= 1) & (codes < CHARACTERS), codes, 0)
    rows = len(codes) // (CONTEXT + 1)
    return codes[: rows * (CONTEXT + 1)].view(rows, CONTEXT + 1)


def _text(modules: str) -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{module}.py" for module in modules.split()]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())
