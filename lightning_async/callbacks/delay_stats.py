"""How late everything came, who was slow, and what waiting cost: for every rank, by the figures of all of them.

delay/p95, delay/age_p95        steps and seconds between launch and fold, of all messages
delay/from3/p95                 of those that rank 3 sent
delay/rank3/samples_per_second  also steps, and the shares of compute, exchange, waiting, idling at meetings
delay/straggler                 the slowest rank that is a straggler, -1 if none is
delay/gain                      under a synchronous strategy: what an asynchronous one would gain
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median_low
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_async.callbacks.histograms import log_histogram
from lightning_async.callbacks.slowness import gain, stragglers
from lightning_async.callbacks.stats import Figures, Stats, check_by_rank
from lightning_async.callbacks.stopwatch import Stopwatch
from lightning_async.metrics import DelayMetric, merge_into, pack
from lightning_async.progress.stretch import Stretch

EVERY = 1000  # steps
OF_A_PEER = ("mean", "max", "p50", "p95", "p99", "age_mean", "age_p95", "arrived", "refused", "lost", "factor_mean")


class DelayStats(Stats):
    """Measures delays, rates and waits on every rank, names stragglers, and logs the figures of all ranks.

    Works with every strategy. Under `ddp` there are no delays: it tells each rank's compute and wait, who is slow, and
    what an asynchronous strategy would gain.

    Args:
        k: A straggler's step takes longer than the median by more than `k` usual differences (see `slowness`).
        by_rank: Up to so many ranks, figures are also logged for each of them; beyond, for all together only.
        folder: Where the journal for `lightning-async report` goes; None: beside the logger's files.
    """

    group = "delay"
    shown = ("p95", "straggler", "wait_share")

    def __init__(self, *, k: float = 3.0, by_rank: int = 16, folder: str | None = None) -> None:
        super().__init__(folder=folder)
        if not isinstance(k, (int, float)) or isinstance(k, bool) or not 0 < k < math.inf:
            raise ValueError(f"`k` must be above 0, got {k!r}")
        check_by_rank(by_rank)
        self.k, self.by_rank = k, by_rank
        self.stragglers: tuple[int, ...] = ()
        self.total: DelayMetric | None = None
        self._watch: Stopwatch | None = None
        self._named: tuple[int, ...] = ()

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Counts are those of this fit."""
        self._world = trainer.world_size
        self.total, self._metric = None, DelayMetric(self._world, sync_on_compute=False)
        self._named = self.stragglers = ()
        if self._strategy is not None:
            self.listen("on_train_batch_end", self._read_sometimes)
        else:
            self._watch = Stopwatch(trainer)
            self.listen("on_train_batch_end", self._batch_ended)
            if trainer.strategy.root_device.type != "cpu" and trainer.is_global_zero:
                rank_zero_info(
                    f"DelayStats: on {trainer.strategy.root_device.type} a synchronous step cannot be told apart into "
                    "compute and waiting: it logs rates of the whole step, and no shares, stragglers or gain"
                )

    def end(self, trainer: Trainer) -> None:
        """Leave the strategy as it was."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time between epochs is nobody's step."""
        super().on_train_epoch_start(trainer, pl_module)
        self._go_on()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor is a validation."""
        super().on_validation_end(trainer, pl_module)
        self._go_on()

    def stretch(self, trainer: Trainer) -> Stretch:
        """What the stopwatch says."""
        return self._watch.stretch() if self._watch is not None else Stretch()

    def say(self, stretch: Stretch) -> Any:
        """Arrivals since the last meeting as packed states, and how the time was spent."""
        self._read()
        delays = pack(self._metric)
        self._metric.reset()
        skipped = 0 if self._strategy is None else self._strategy.skipped
        return {
            "delays": delays,
            "skipped": skipped,
            "trained": list(stretch.trained),
            "seconds": round(stretch.seconds, 6),
            "compute": round(stretch.compute, 6),
            "exchange": round(stretch.exchange, 6),
            "waited": round(stretch.waited, 6),
            "idle": round(stretch.idle, 6),
            "until": round(stretch.until, 6),
            "split": self._watch is None or self._watch.splits,
            "accounts": {} if self._strategy is None else self._strategy.accounts(),
        }

    def conclude(self, words: Mapping[int, Any]) -> Figures:
        """Delays of the run so far, rates since the last meeting."""
        self.total = DelayMetric(self._world, sync_on_compute=False) if self.total is None else self.total
        merge_into(self.total, (word["delays"] for word in words.values()))
        figures = self.total.figures() if self._strategy is not None else {}
        if self._strategy is not None:
            figures["skipped"] = float(sum(word["skipped"] for word in words.values()))
        if self._strategy is not None and self._world <= self.by_rank:
            figures |= _by_sender(self.total, self._world)
        if not any(word["trained"][0] for word in words.values()):
            return {**self.figures, **figures}  # nobody trained since the last meeting: what it said of rates holds
        if all(word["split"] for word in words.values()):
            figures |= self._work(words)
        if self._world <= self.by_rank:
            figures |= self._by_rank(words)
        return figures

    def draw(self, trainer: Trainer) -> None:
        """The histogram of delays, for loggers that know histograms."""
        if self.total is not None and (counts := self.total.histogram()):
            for logger in trainer.loggers:
                log_histogram(logger, "delay/histogram", counts, trainer.global_step)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if self._strategy is not None:
            self._metric.update(self._strategy.arrivals(self))

    def _read_sometimes(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Strategies keep the newest arrivals only, and a meeting may be far."""
        if batch_idx % EVERY == 0:
            self._read()

    def _work(self, words: Mapping[int, Any]) -> Figures:
        """Who works how long, and what waiting costs: where work and waiting can be told apart."""
        seconds = {rank: _each(word, word["compute"]) for rank, word in words.items()}
        self.stragglers = stragglers(seconds, self.k)
        figures = _shares(words) | {"straggler": float(self.stragglers[0]) if self.stragglers else -1.0}
        if self._strategy is None:
            figures["gain"] = gain(seconds, max((_each(word, word["seconds"]) for word in words.values()), default=0.0))
        self._name(seconds, figures)
        return figures

    def _by_rank(self, words: Mapping[int, Any]) -> Figures:
        found: Figures = {}
        for rank in range(self._world):
            word = words.get(rank)
            if word is not None:
                rates = {"steps_per_second": word["trained"][1], "samples_per_second": word["trained"][2]}
                spent = max(word["seconds"], 1e-9)
                found |= {f"rank{rank}/{name}": count / spent for name, count in rates.items()}
                shares = _shares({rank: word}) if word["split"] else {}
                found |= {f"rank{rank}/{name}": share for name, share in shares.items()}
        return found

    def _name(self, seconds: Mapping[int, float], figures: Figures) -> None:
        """Say it once, when who is slow has changed."""
        if self.stragglers == self._named:
            return
        self._named = self.stragglers
        gains = ""
        if "gain" in figures:
            gains = f"; without waiting, all ranks would take {figures['gain']:.2f} times as many steps"
        middle = median_low(seconds.values())
        for rank in self.stragglers:
            rank_zero_info(
                f"DelayStats: rank {rank} is slow: {1000 * seconds[rank]:.1f} ms of work a step, the median is "
                f"{1000 * middle:.1f} ms{gains}"
            )

    def _go_on(self) -> None:
        if self._watch is not None:
            self._watch.go_on()

    def _batch_ended(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._watch is not None:
            self._watch.batch_ended(batch)


def _by_sender(total: DelayMetric, world: int) -> Figures:
    """Of the messages that each rank sent."""
    found: Figures = {}
    for rank in range(world):
        peer = total.figures(rank)
        found |= {f"from{rank}/{name}": peer[name] for name in OF_A_PEER}
    return found


def _each(word: Mapping[str, Any], seconds: float) -> float:
    """Seconds of one batch."""
    batches = word["trained"][0]
    return seconds / batches if batches else 0.0


def _shares(words: Mapping[int, Any]) -> Figures:
    """Parts of all ranks' time since the last meeting, this one's waits included."""
    sums = {name: sum(word[name] for word in words.values()) for name in ("compute", "exchange", "waited", "idle")}
    total = sum(sums.values())
    shares = {name: value / total if total else 0.0 for name, value in sums.items()}
    return {
        "compute_share": shares["compute"],
        "exchange_share": shares["exchange"],
        "wait_share": shares["waited"] + shares["idle"],
        "idle_seconds": max((word["idle"] for word in words.values()), default=0.0),
    }
