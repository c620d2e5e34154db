"""A run with `inner_threads` is the run without, and the module is a plain one afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async import GossipRingStrategy
from lightning_async.inner.tiles import TiledConv2d
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run


class Convolves(Lit):
    """Two convolutions over the eight inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Sequential(
            nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, (2, 4)), nn.Flatten()
        )
        self.kinds: set[type] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kinds.add(type(self.layer[1]))
        return super().training_step(batch, batch_idx)


def _fit(inner_threads: int | None) -> dict[str, Any]:
    lit = Convolves()
    t = trainer(2, knobs={"mode": "none", "balance": "equal", "inner_threads": inner_threads})
    t.fit(lit, loader(), loader(40, shuffle=False))
    return {
        "weights": weights(lit),
        "during": [kind.__name__ for kind in lit.kinds],
        "after": type(lit.layer[1]).__name__,
        "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("inner")],
    }


@pytest.mark.few(0)
def test_tiles_change_nothing_but_the_threads() -> None:
    plain, tiled = run(2, _fit, None), run(2, _fit, 2)
    for theirs, ours in zip(plain, tiled, strict=True):
        assert ours["weights"] == pytest.approx(theirs["weights"], abs=1e-5)
        assert (theirs["during"], ours["during"]) == (["Conv2d"], [TiledConv2d.__name__])
        assert ours["after"] == "Conv2d"
        assert ours["threads"] == []


def test_the_number_is_checked() -> None:
    with pytest.raises(ValueError, match="`inner_threads` must be an integer of at least 1, got 0"):
        GossipRingStrategy(inner_threads=0)
