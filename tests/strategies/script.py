"""A user's script, run as a process of its own: `-m tests.strategies.script NAME MODE FOLDER [NODES DEVICES
[INTERFACE]]`; with an interface NAME is the default strategy, whose links go by it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")

import lightning_async  # noqa: E402, F401  # registers the names
from lightning_async import AsyncStrategy, GossipRingStrategy, SpeedFaults  # noqa: E402
from tests.strategies.lit import Ending, Lit, loader, weights  # noqa: E402


class Failing(Lit):
    """Fails on the last rank in its 5th batch."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        if self.global_rank == 1 and len(self.seen) >= 16:
            raise ValueError("the fifth batch is too much")


def main(name: str, mode: str, folder: str, nodes: str = "1", devices: str = "2", interface: str = "") -> None:
    lit = Ending(folder)
    rank = fit(lit, GossipRingStrategy(interface=interface) if interface else name, folder, nodes, devices)
    (Path(folder) / f"rank{rank}.txt").write_text(repr(weights(lit)))
    if mode == "works, then fails":
        fit(Failing(), name, folder, nodes, devices)


def fit(lit: Lit, strategy: str | AsyncStrategy, folder: str, nodes: str, devices: str) -> int:
    faults = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    t = L.Trainer(
        accelerator="cpu",
        num_nodes=int(nodes),
        devices=int(devices),
        strategy=strategy,
        max_epochs=2,
        callbacks=[faults],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    assert isinstance(t.strategy, AsyncStrategy)
    t.strategy.at_meeting = "keep"  # so that nothing but the end of the fit makes the ranks equal
    t.fit(lit, loader(), loader(40, shuffle=False))
    return t.global_rank


if __name__ == "__main__":
    main(*sys.argv[1:])
