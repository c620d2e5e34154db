"""A training script that any launcher can start: it says how many nodes and devices, Lightning finds the rest.

    python examples/launch/train.py                                          two processes on this machine
    torchrun --nnodes=2 --nproc-per-node=2 ... train.py --nodes 2 --devices 2

`docs/launching.md` has the launchers, and the files beside this one are theirs. What is saved lies below `--out`, which
all nodes must see. A run that is started again with the same `--out` under SLURM goes on where it was queued anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import KubeflowEnvironment  # type: ignore[attr-defined]  # public
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_async  # noqa: F401  # registers the names of the strategies


class Line(LightningModule):
    """Linear regression."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        loss: Tensor = (self.layer(x) - y).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The learning rate is ddp's."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Train."""
    parser = argparse.ArgumentParser(description="A line on several processes.")
    parser.add_argument("--strategy", default="gossip_ring", help="its name (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="machines, or pods (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes on each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of the run (default: %(default)s)")
    parser.add_argument("--out", default="run", help="where files go (default: %(default)s)")
    parser.add_argument("--kubeflow", action="store_true", help="started by a PyTorchJob, one process a pod")
    told = parser.parse_args(argv)

    seed_everything(0)
    x = torch.randn(1000, 8)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    trainer = Trainer(
        strategy=told.strategy,
        accelerator="cpu",
        num_nodes=told.nodes,
        devices=told.devices,
        max_steps=told.steps,
        max_epochs=-1,
        plugins=[KubeflowEnvironment()] if told.kubeflow else None,  # the one that Lightning does not find by itself
        callbacks=list(callbacks),
        default_root_dir=told.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), DataLoader(data, batch_size=10, shuffle=True))
    return trainer


if __name__ == "__main__":
    main()
