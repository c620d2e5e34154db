"""How far the replicas are apart: exactly at meetings, by a sketch in between.

spread/rms          root of the mean squared distance to the consensus, over ranks and weights
spread/relative     the same as a part of the weights' own size
spread/farthest     the rank that is farthest off, and spread/farthest_rms its distance
spread/in/head/rms  of a part of the module
spread/sketch       an estimate between meetings, on rank 0: what the heartbeats brought, a second old
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_async.callbacks.sketch import Sketch
from lightning_async.callbacks.stats import Figures, Stats
from lightning_async.callbacks.watched import Watched
from lightning_async.progress.stretch import Stretch

ALL = ""


class SpreadStats(Stats):
    """Measures the distance of the replicas to their consensus.

    Args:
        depth: Also by the parts of the module whose names have so many words: 1 for `encoder` and `head`, 2 for
            `encoder.0` and `encoder.1`; 0: for the module as a whole only.
        every: Seconds between two sketches; None: none. A sketch goes with a heartbeat, and nobody waits for it.
        folder: Where the journal for `lightning-async report` goes; None: beside the logger's files.
    """

    group = "spread"
    shown = ("relative",)
    needs = "it has no replicas that could be apart"

    def __init__(self, *, depth: int = 0, every: float | None = 1.0, folder: str | None = None) -> None:
        super().__init__(folder=folder)
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
            raise ValueError(f"`depth` must be an integer of at least 0, got {depth!r}")
        if every is not None and (not isinstance(every, (int, float)) or isinstance(every, bool) or not every > 0):
            raise ValueError(f"`every` must be a number of seconds above 0, or None, got {every!r}")
        self.depth, self.every = depth, every
        self._module: LightningModule | None = None
        self._parameters: dict[str, Tensor] = {}
        self._sketch: Sketch | None = None
        self._due = 0.0

    def sees(self, strategy: Watched) -> bool:
        """There must be replicas to be apart."""
        return strategy.has_replicas

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the parameters by name; make the sketch, the same on every rank."""
        self._module = module
        self._parameters = _trained(module)
        if self._strategy is not None and self.every is not None and trainer.world_size > 1:
            self._sketch, self._due = Sketch(self._parameters.values()), time.monotonic() + self.every
            self.listen("on_train_batch_end", self._sketch_sometimes)

    def end(self, trainer: Trainer) -> None:
        """No more sketches."""
        self._sketch = self._module = None

    def say(self, stretch: Stretch) -> Any:
        """By part of the module: squared distance, squared size, how many weights."""
        parts: dict[str, list[float]] = {}
        self._follow()
        for (name, parameter), square in zip(self._parameters.items(), stretch.apart(), strict=False):
            size = float(parameter.detach().double().square().sum())
            for part in dict.fromkeys((ALL, self._part(name))):
                sums = parts.setdefault(part, [0.0, 0.0, 0.0])
                parts[part] = [sums[0] + square, sums[1] + size, sums[2] + parameter.numel()]
        return parts

    def conclude(self, words: Mapping[int, Any]) -> Figures:
        """The whole, the farthest rank, and the parts."""
        figures = _figures([word[ALL] for word in words.values() if ALL in word])
        far = {rank: math.sqrt(word[ALL][0] / max(1, word[ALL][2])) for rank, word in words.items() if ALL in word}
        if far:
            farthest = max(far, key=lambda rank: far[rank])
            figures |= {"farthest": float(farthest), "farthest_rms": far[farthest]}
        for part in sorted({part for word in words.values() for part in word} - {ALL}):
            found = _figures([word[part] for word in words.values() if part in word])
            figures |= {f"in/{part}/{name}": value for name, value in found.items()}
        return figures

    def _follow(self) -> None:
        """What is trained may have changed since the last meeting, on all ranks alike (a thawed backbone)."""
        now = self._parameters if self._module is None else _trained(self._module)
        if list(now) != list(self._parameters):
            self._parameters = now
            self._sketch = None if self._sketch is None else Sketch(now.values())

    def _part(self, name: str) -> str:
        return ".".join(name.split(".")[: self.depth])

    def _sketch_sometimes(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if now < self._due or self._sketch is None or self._strategy is None or self.every is None:
            return
        self._due = now + self.every
        board, mine = self._strategy.board, self._sketch.of()
        board.publish(mine)
        if trainer.is_global_zero:
            estimate = self._sketch.spread({**board.notes(), trainer.global_rank: mine})
            self._log(trainer, estimate)

    def _log(self, trainer: Trainer, estimate: float) -> None:
        if math.isfinite(estimate):
            for logger in trainer.loggers:
                logger.log_metrics({"spread/sketch": estimate}, step=trainer.global_step)
            if self._journal is not None:
                self._journal.note("sketch", trainer.global_step, trainer.current_epoch, {"rms": estimate})


def _trained(module: LightningModule) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _figures(rows: list[list[float]]) -> Figures:
    square, size, numbers = (sum(row[at] for row in rows) for at in range(3)) if rows else (0.0, 0.0, 0.0)
    rms = math.sqrt(square / numbers) if numbers else 0.0
    return {"rms": rms, "relative": math.sqrt(square / size) if size else 0.0}
