"""The same small task four times on four local processes, one of them 4x slow: who waits for it, and what it costs.

    ddp                         gradients averaged at every step: everybody waits for the slow one
    gossip_ring, mode="sync"    weights averaged with two neighbours at every step (D-PSGD): everybody waits too
    gossip_ring, mode="none"    the control: nobody waits and nobody talks
    gossip_ring                 nobody waits, and neighbours average their weights as they meet

All four see each training image equally often, begin with the same weights and use the same learning rate. Every epoch
ends with a meeting, at which the mean of the four replicas is validated; then each rank goes on from its OWN weights
(`at_meeting="keep"`), so that only what the ranks told each other on the way counts.

`make demo` runs it in two to three minutes. It prints a table and writes demo/demo.png and demo/demo.json.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # four processes share this machine's cores; must stand before torch is imported

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset, random_split

from lightning_async import Fate, GossipRingStrategy, SpeedFaults

RANKS = 4
SLOW = {3: 4.0}  # rank 3 takes four times as long
STEP = 0.02  # seconds that a step takes longer, as if the model were larger; rank 3: 0.08
BATCH = 8
PASSES = 2  # over the images, in one epoch
TARGET = 0.25  # validation loss, for the column "time to target"


# -- the task: nothing in it knows of strategies --------------------------------------------------------------------


class Digits(LightningModule):
    """A small network for images of 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and accuracy, averaged over the ranks."""
        images, labels = batch
        logits = self.net(images)
        self.log("loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One learning rate for all variants."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Images to train on, each `PASSES` times an epoch, and images to validate on."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16 - 0.5, torch.from_numpy(labels).long())
    train, held_out = random_split(data, [1197, 600], torch.Generator().manual_seed(0))
    repeated: ConcatDataset[Any] = ConcatDataset([train] * PASSES)
    return DataLoader(repeated, BATCH, shuffle=True), DataLoader(held_out, 150)


# -- the variants ----------------------------------------------------------------------------------------------------


def variants() -> dict[str, Strategy]:
    """What is compared. Forked processes start quickest; a script of your own needs no `start_method`."""
    return {
        "ddp": DDPStrategy(start_method="fork", process_group_backend="gloo"),
        "gossip_ring sync": GossipRingStrategy(mode="sync", at_meeting="keep", start_method="fork"),
        "gossip_ring none": GossipRingStrategy(mode="none", at_meeting="keep", start_method="fork"),
        "gossip_ring": GossipRingStrategy(at_meeting="keep", start_method="fork"),
    }


class Watch(Callback):
    """Counts steps and seconds of training (without validation) on every rank, and writes them into a folder."""

    def __init__(self, name: str, folder: Path, epochs: int) -> None:
        self.name, self.folder, self.epochs = name, folder, epochs
        self.samples = self.steps = self.folded = 0
        self.trained = self.stepping = 0.0
        self.curve: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock of this epoch starts."""
        self._began, self._starts = time.monotonic(), list[float]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins: how far these lie apart is the pace of this rank."""
        self._starts.append(time.monotonic())
        self.samples += len(batch[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks have ended their epoch and met: the clock stands still."""
        if not trainer.sanity_checking:
            self.trained += time.monotonic() - self._began
            self.stepping += self._starts[-1] - self._starts[0]
            self.steps += len(self._starts) - 1
            arrivals = trainer.strategy.arrivals() if isinstance(trainer.strategy, GossipRingStrategy) else []
            self.folded += sum(arrival.fate is Fate.FOLDED for arrival in arrivals)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One more point of the curve."""
        if trainer.sanity_checking:
            return
        loss, accuracy = (float(trainer.callback_metrics[key]) for key in ("loss", "accuracy"))
        self.curve.append({"seconds": self.trained, "loss": loss, "accuracy": accuracy, "spread": _spread(trainer)})
        if trainer.is_global_zero:
            print(
                f"  {self.name:<17} epoch {len(self.curve):>2} of {self.epochs}: "
                f"{self.trained:5.1f} s of training, validation loss {loss:.3f}",
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave this rank's record."""
        keys = ("samples", "steps", "folded", "trained", "stepping", "curve")
        record = json.dumps({key: getattr(self, key) for key in keys})
        (self.folder / f"{trainer.global_rank}.json").write_text(record, encoding="utf-8")


def _spread(trainer: Trainer) -> float:
    """How far the replicas were apart when they met (rms), in percent of the weights (rms)."""
    if not isinstance(trainer.strategy, GossipRingStrategy):
        return 0.0
    weights = trainer.strategy.replica.flat
    return float(100 * trainer.strategy.last_meeting["spread"] / weights.square().mean().sqrt())


def train(name: str, strategy: Strategy, epochs: int, step: float) -> list[dict[str, Any]]:
    """Train one variant; returns the record of every rank."""
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        slowness = SpeedFaults(step_seconds=step, slow=SLOW)
        trainer = Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=RANKS,
            max_epochs=epochs,
            callbacks=[slowness, Watch(name, Path(folder), epochs)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Digits(), *loaders())
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


# -- what came of it -------------------------------------------------------------------------------------------------


def summary(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One row for each variant; the limit is the sum of the ranks' own rates, taken from the control."""
    limit = sum(BATCH * rank["steps"] / rank["stepping"] for rank in records["gossip_ring none"])
    rows = {}
    for name, ranks in records.items():
        rate = sum(rank["samples"] for rank in ranks) / max(rank["trained"] for rank in ranks)
        curve = ranks[0]["curve"]
        rows[name] = {
            "samples_per_second": rate,
            "share_of_limit": 100 * rate / limit,
            "folded": sum(rank["folded"] for rank in ranks),
            "spread": curve[-1]["spread"],
            "seconds_to_target": crossing(curve),
            "loss": curve[-1]["loss"],
            "accuracy": 100 * curve[-1]["accuracy"],
            "curve": curve,
        }
    return rows


def crossing(curve: Sequence[Mapping[str, float]]) -> float | None:
    """When the line between the validations first comes down to the target; None: it never does."""
    before = curve[0]
    for point in curve:
        if point["loss"] <= TARGET:
            drop = before["loss"] - point["loss"]
            part = (before["loss"] - TARGET) / drop if drop else 1.0
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
        before = point
    return None


COLUMNS = {
    "samples_per_second": ("samples/s", "{:.0f}"),
    "share_of_limit": ("of the limit", "{:.0f} %"),
    "folded": ("messages folded", "{:d}"),
    "spread": ("spread", "{:.1f} %"),
    "seconds_to_target": (f"time to {TARGET}", "{:.1f} s"),
    "loss": ("final loss", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1f} %"),
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'':<17}" + "".join(f"{title:>17}" for title, _ in COLUMNS.values())]
    for name, row in rows.items():
        cells = ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(f"{name:<17}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


STYLES = [("#1b1b1b", "--", "s"), ("#d55e00", "-.", "^"), ("#999999", ":", "x"), ("#0072b2", "-", "o")]


def plot(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Validation loss against seconds of training; lines differ in style too, for printing in grey."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    for (name, row), (colour, line, mark) in zip(rows.items(), STYLES, strict=True):
        x, y = ([point[key] for point in row["curve"]] for key in ("seconds", "loss"))
        axes.plot(x, y, color=colour, linestyle=line, marker=mark, linewidth=2, markersize=5, label=name)
    axes.axhline(TARGET, color="#bbbbbb", linewidth=1)
    axes.set(yscale="log", xlabel="seconds of training", ylabel="validation loss (cross-entropy, log scale)")
    axes.set_xlim(left=0)
    axes.text(axes.get_xlim()[1], TARGET, f"target {TARGET} ", ha="right", va="bottom", color="#666666")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#eeeeee")
    axes.set_title(f"Digits on {RANKS} processes, one of them 4x slow: same samples, same learning rate")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Train all variants, one after the other, and show the difference."""
    parser = argparse.ArgumentParser(description="Four ways to train with one slow process.")
    parser.add_argument("--epochs", type=int, default=6, help=f"each of {PASSES} passes (default: %(default)s)")
    parser.add_argument("--step", type=float, default=STEP, help="seconds of a fast step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    _be_quiet()
    began, records = time.monotonic(), {}
    print(f"{RANKS} processes on this machine, rank 3 slowed 4x; {arguments.epochs} epochs for each variant")
    for number, (name, strategy) in enumerate(variants().items(), 1):
        print(f"[{number}/{len(variants())}] {name}", flush=True)
        records[name] = train(name, strategy, arguments.epochs, arguments.step)
    rows = summary(records)
    print(f"\n{table(rows)}\n")
    plot(rows, arguments.out / "demo.png")
    (arguments.out / "demo.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s in all; {arguments.out}/demo.png shows the losses over time")


def _be_quiet() -> None:
    """Only our own lines; a script of your own would keep Lightning's."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
