"""What the ranks of these benchmarks do: a real task on emulated compute, and a record of when each step ended.

    |#.......|#.......|#.......|#...            # the task's own compute, about 1 ms; . the emulated rest of the step
             ^        ^        ^  marks: the end of each batch, on the clock that all processes of a machine share

The task is handwritten digits, seen again and again, so small that many ranks fit on few cores; a wider model makes
longer messages. With `every` a rank also copies its weights aside now and then: what the consensus would have been at
any time can be computed from the copies of all ranks afterwards, and nobody had to meet for it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.midway import obey
from benchmarks.rank import say
from benchmarks.rivals import POST_LOCAL, PostLocalSGD
from benchmarks.subject import Knobs, made
from benchmarks.tasks import digits
from lightning_async import AdaptiveShrink, AsyncStrategy, DelayStats, SpeedFaults, SpreadStats, TrafficStats
from lightning_async.arrival import Arrival, Fate

SEED = 20
MOMENTUM = 0.9
FOLDED = (Fate.FOLDED, Fate.SHRUNK)
TRAINING = 25  # batches after which a rank says "training": links are up by then


@dataclass(frozen=True)
class Work:
    """What is trained, for how long, and how slowly.

    Attributes:
        batches: Batches of one epoch, of all ranks together.
        epochs: How many epochs.
        batch: Samples of a batch.
        width: Neurons of a layer.
        layers: Hidden layers.
        lr: Learning rate.
        step: Emulated seconds of a step.
        slow: How many times as long a rank takes, for ranks that are slow.
        sigma: Log-normal spread of the emulated seconds; their mean stays the same.
        hold_gil: Whether the emulated compute holds Python's lock.
        every: Seconds between copies of the weights; 0: none.
        watch: Whether all callbacks that measure are there.
        workers: Workers of each rank's loader.
        prefetch: Batches that each of them has on its way.
        shared_memory: Whether messages between ranks of one host go through memory.
        midway: Whether ranks can be frozen and killed in the middle of a message.
    """

    batches: int
    epochs: int = 1
    batch: int = 8
    width: int = 64
    layers: int = 2
    lr: float = 0.01
    step: float = 0.02
    slow: Mapping[int, float] = field(default_factory=dict)
    sigma: float = 0.0
    hold_gil: bool = False
    every: float = 0.0
    watch: bool = False
    workers: int = 0
    prefetch: int = 2
    shared_memory: bool = True
    midway: bool = False

    def arguments(self, knobs: Knobs | None, folder: Path | None = None) -> dict[str, Any]:
        """The arguments of `fit`, as JSON takes them. `knobs` None: `ddp`."""
        return {"work": asdict(self), "knobs": knobs, "folder": str(folder) if folder else None}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Work:
        """What `arguments` wrote: JSON has no integer keys."""
        return cls(**{**plain, "slow": {int(rank): factor for rank, factor in plain["slow"].items()}})

    def rate(self, rank: int) -> float:
        """Batches per second of a rank whose step is the emulated time alone: the physical limit."""
        return 1 / (self.step * self.slow.get(rank, 1.0))

    def model(self) -> nn.Sequential:
        """The model; its weights are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            sizes = [64, *[self.width] * self.layers]
            hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
            return nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))


def fit(
    work: dict[str, Any], knobs: Knobs | None, folder: str | None, *, more: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train on this rank, with `more` callbacks; returns `Record` as a dictionary."""
    job = Work.read(work)
    if job.midway:
        obey()
    strategy = "ddp" if knobs is None else PostLocalSGD(**knobs[POST_LOCAL]) if POST_LOCAL in knobs else made(knobs)
    if isinstance(strategy, AsyncStrategy):
        strategy.office.shared_memory = job.shared_memory
    recorder = Recorder(job.every, Path(folder) if folder else None)
    faults = SpeedFaults(step_seconds=job.step, slow=dict(job.slow), sigma=job.sigma, hold_gil=job.hold_gil)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=job.epochs,
        callbacks=[recorder, faults, *(measuring(folder) if job.watch else []), *more],
        num_sanity_val_steps=1,  # what Lightning and torch do at a first time, they do before the clock starts
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    module = Digits(job)
    trainer.fit(module, *loaders(job))
    recorder.record.digest = digest(module)
    recorder.record.loss = float(trainer.callback_metrics.get("loss", float("nan")))
    return asdict(recorder.record)


def measuring(folder: str | None) -> list[Callback]:
    """All callbacks that measure, and one that shrinks."""
    return [kind(folder=folder) for kind in (DelayStats, TrafficStats, SpreadStats, AdaptiveShrink)]


def loaders(job: Work) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """What is trained on, and what is held out."""
    x, y = digits().train
    picks = torch.arange(job.batches * job.batch)
    train = TensorDataset(picks, x[picks % len(x)], y[picks % len(x)])
    held_out = TensorDataset(*digits().validation)
    options: dict[str, Any] = {}
    if job.workers:
        options = {"num_workers": job.workers, "prefetch_factor": job.prefetch, "persistent_workers": True}
    return DataLoader(train, job.batch, shuffle=True, **options), DataLoader(held_out, len(held_out))


def digest(module: nn.Module) -> str:
    """A fingerprint of all weights, to the bit."""
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


class Digits(LightningModule):
    """Handwritten digits."""

    def __init__(self, job: Work) -> None:
        super().__init__()
        self.model, self.lr = job.model(), job.lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        _, x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss of the consensus; every rank sees the same share of the held-out samples, as with `ddp`."""
        x, y = batch
        self.log("loss", F.cross_entropy(self.model(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), self.lr, momentum=MOMENTUM)


# -- the record -------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What one rank saw; all times are on the machine's monotonic clock.

    Attributes:
        start: When its training began.
        end: When it ended, the last meeting and validation included.
        marks: When each batch ended. The last one of an epoch includes the wait of the meeting.
        epochs: How many batches it had trained on at the end of each epoch.
        first: When the first batch of each epoch began.
        meetings: Seconds of each meeting, from its opening on this rank.
        folded: Messages folded.
        remote: When each of them that came from another rank was folded (a rank that serves also answers itself), and
            from whom: to the batch.
        refused: Messages refused.
        reply: The 99th percentile of the age of what was folded, in seconds.
        cpu: Seconds of processor time in training, of all its threads.
        sent: Bytes of messages that it sent.
        exchanged: Those of them that the method itself sent to other nodes: bodies, without meetings.
        taken: Samples taken over from the dead.
        loss: Validation loss at the end.
        digest: Fingerprint of its weights at the end.
    """

    start: float = 0.0
    end: float = 0.0
    marks: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    meetings: list[float] = field(default_factory=list)
    folded: int = 0
    remote: list[tuple[float, int]] = field(default_factory=list)
    refused: int = 0
    reply: float = 0.0
    cpu: float = 0.0
    sent: int = 0
    exchanged: int = 0
    taken: int = 0
    loss: float = float("nan")
    digest: str = ""

    def gaps(self) -> list[tuple[float, float]]:
        """(when, seconds) of each step, but for the first and the last of an epoch: those border on meetings."""
        found, begin = [], 0
        for end in self.epochs or [len(self.marks)]:
            marks = self.marks[begin : max(begin, end - 1)]
            found += [(b, b - a) for a, b in pairwise(marks)]
            begin = end
        return found

    def longest(self, begin: float, end: float) -> float:
        """The longest step that began and ended in this time, or was under way when it began."""
        return max((seconds for when, seconds in self.gaps() if begin < when <= end), default=0.0)

    def rate(self) -> float:
        """Batches per second between the meetings."""
        seconds = [seconds for _, seconds in self.gaps()]
        return len(seconds) / sum(seconds)

    def idle(self) -> float:
        """The longest that the end of an epoch took beyond a step: waiting, meeting, for the next epoch's first."""
        usual = 1 / self.rate()
        lasts = [self.marks[end - 1] - self.marks[end - 2] for end in self.epochs if end > 1]
        return max((last - usual for last in lasts), default=0.0)


class Recorder(Callback):
    """Keeps the record. With a folder it also writes there which samples were trained on, surviving a SIGKILL."""

    def __init__(self, every: float, folder: Path | None) -> None:
        self.record = Record()
        self._every, self._folder = every, folder
        self._copies: list[tuple[float, int, Tensor]] = []
        self._arrivals: list[Arrival] = []
        self._due = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts."""
        self.record.start, self._cpu = time.monotonic(), time.process_time()
        if self._folder and not self._every:
            self._seen = (self._folder / f"{trainer.global_rank}.seen").open("w", buffering=1, encoding="ascii")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """An epoch begins."""
        if batch_idx == 0:
            self.record.first.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over."""
        now = time.monotonic()
        self.record.marks.append(now)
        if len(self.record.marks) == TRAINING:
            say("training")
        if isinstance(trainer.strategy, AsyncStrategy):
            self._look(trainer.strategy, now)
        if self._folder and not self._every:
            self._seen.write(" ".join(map(str, [trainer.current_epoch, *batch[0].tolist()])) + "\n")
        if self._every and now >= self._due:
            self._due = now + self._every
            flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            self._copies.append((now, len(self.record.marks), flat))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over, its meeting and validation too."""
        self.record.epochs.append(len(self.record.marks))
        if isinstance(trainer.strategy, AsyncStrategy):
            self.record.meetings.append(trainer.strategy.last_meeting["seconds"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock stops."""
        self.record.end, self.record.cpu = time.monotonic(), time.process_time() - self._cpu
        if isinstance(trainer.strategy, AsyncStrategy):
            self._look(trainer.strategy, self.record.end)
            self._count()
            by_peer, own = trainer.strategy.traffic(), trainer.strategy.algorithm.kinds
            node, size = trainer.node_rank, trainer.num_devices
            self.record.sent = sum(count.bytes_out for kinds in by_peer.values() for count in kinds.values())
            apart = [kinds for peer, kinds in by_peer.items() if peer // size != node]
            self.record.exchanged = sum(kinds[kind].bytes_out for kinds in apart for kind in own if kind in kinds)
            self.record.taken = getattr(trainer.strategy.feeding.share, "repeated", 0)
        if self._copies and self._folder:
            times, batches, weights = zip(*self._copies, strict=True)
            copies = {"times": list(times), "batches": list(batches), "weights": torch.stack(weights)}
            torch.save(copies, self._folder / f"{trainer.global_rank}.copies")

    def _look(self, strategy: AsyncStrategy, now: float) -> None:
        new = strategy.arrivals()
        self._arrivals += new
        folded = (a.other for a in new if a.fate in FOLDED and a.other != strategy.global_rank)
        self.record.remote += [(now, peer) for peer in folded]

    def _count(self) -> None:
        arrivals = self._arrivals
        self.record.folded = sum(a.fate in FOLDED for a in arrivals)
        self.record.refused = sum(a.fate is Fate.REFUSED for a in arrivals)
        ages = sorted(a.seconds for a in arrivals if a.fate is not Fate.LOST)
        self.record.reply = ages[min(len(ages) - 1, int(0.99 * len(ages)))] if ages else 0.0
