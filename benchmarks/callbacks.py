"""All callbacks that measure, at once: what they cost a step of 5 ms, and whether the straggler's figure stays.

    steps    |with|without|with|without|...        within one run, in blocks of 40: whatever else happens hits both
    cost     seconds of the training thread between the first and the last callback of the list, of all hooks of a step:
             a block with them - the block without beside it; 95 % interval over the pairs
    step     the same difference of whole steps: it would show what they cost elsewhere, but steps of two ranks differ
             by more than what is looked for. Of each block's middle half: one step in which the system ran something
             else is a hundred times as long

    limit     0: nothing is measured
    control   the same blocks, with callbacks that do nothing at all: what Lightning takes for calling them

Only what happens at every step is switched off in the blocks without; what happens at meetings is told beside it. The
second part has one rank 4x slow, and compares whole epochs with them and without, by turns within one run (`by_turns`).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from benchmarks.by_turns import SURE, by_turns, drawn, told
from benchmarks.launch import Ranks
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Digits, Record, Work, loaders, measuring
from lightning_async import GossipRingStrategy, SpeedFaults

N = 2
STEP = 0.005
BLOCK = 40
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)
COST, SHARE = 0.01, 0.01  # at most so large a part of a step; so large a change of the straggler's figure
PAIRS = 45  # of epochs of 4 s
LIMIT = 600.0


def run(quick: bool) -> Table:
    """The cost of a step; in a long run the straggler too."""
    batches = BLOCK * (40 if quick else 150)
    found = {name: _blocks(name, batches) for name in ("measuring", "idle")}
    rows = [Row("nothing", Role.LIMIT, {"cost us": 0.0, "of a step": 0.0})]
    rows += [Row(name, role, found[name]) for name, role in (("measuring", Role.RESULT), ("idle", Role.CONTROL))]
    high = float(found["measuring"]["high us"] or 0.0) * 1e-6
    claims = [Claim(f"cost of a step, upper end of 95 %: {high / STEP:.2%}, at most {COST:.0%}", high <= COST * STEP)]
    if not quick:
        more, claim = _straggler()
        rows, claims = rows + more, [*claims, claim]
    return Table(
        f"{N} ranks, a step of {1000 * STEP:g} ms: all callbacks that measure, and AdaptiveShrink", rows, claims
    )


# -- the cost of a step -----------------------------------------------------------------------------------------------


def _blocks(name: str, batches: int) -> dict[str, Cell]:
    work = Work(N * batches, step=STEP)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**work.arguments({}, Path(folder)), "measures": name == "measuring"}
        with Ranks(switched, N, arguments=arguments) as ranks:
            values = ranks.values(timeout=LIMIT)
    hooks, steps = ([pair for value in values for pair in value[kind]] for kind in ("hooks", "steps"))
    mean, half = fmean(hooks), interval(hooks)
    return {
        "cost us": 1e6 * mean,
        "low us": 1e6 * (mean - half),
        "high us": 1e6 * (mean + half),
        "of a step": _told(hooks),
        "step": _told(steps),
        "pairs": len(hooks),
        "meeting ms": 1e3 * fmean(value["meeting"] for value in values),
    }


def _told(pairs: Sequence[float]) -> str:
    mean, half = fmean(pairs), interval(pairs)
    return f"{mean / STEP:.2%} ({(mean - half) / STEP:.2%} to {(mean + half) / STEP:.2%})"


def middle(values: Sequence[float]) -> float:
    """The mean of the middle half."""
    quarter = len(values) // 4
    return fmean(sorted(values)[quarter : len(values) - quarter])


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean."""
    return SURE * stdev(values) / math.sqrt(len(values))


def switched(work: dict[str, Any], knobs: dict[str, Any], folder: str, measures: bool) -> dict[str, Any]:
    """One rank: blocks of steps with and without the callbacks; the differences of neighbours, and the meeting."""
    job = Work.read(work)
    callbacks = measuring(folder) if measures else [Callback() for _ in measuring(folder)]
    lap = Lap()
    switch = Switch(callbacks, lap)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=GossipRingStrategy(**knobs),
        max_epochs=1,
        callbacks=[SpeedFaults(step_seconds=job.step), switch, lap.opens, *callbacks, lap.closes],
        logger=CSVLogger(folder, name="", version=""),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(job), *loaders(job))
    pairs = {"hooks": switch.pairs(switch.laps, fmean), "steps": switch.pairs(switch.steps, middle)}
    return {**pairs, "meeting": trainer.strategy.last_meeting["seconds"]}  # type: ignore[attr-defined]


class Lap:
    """Times what Lightning does between two callbacks of its list, over all hooks of a step."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.opens, self.closes = Callback(), Callback()
        for hook in HOOKS:
            vars(self.opens)[hook], vars(self.closes)[hook] = self._open, self._close

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _open(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _close(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._since


class Switch(Callback):
    """Takes callbacks out of the Trainer's list and puts them back, a block each.

    Attributes:
        steps: By block: the seconds of each step.
        laps: The same of the time between the callbacks that stand around them.
    """

    def __init__(self, others: Sequence[Callback], lap: Lap) -> None:
        self._others, self._lap = list(others), lap
        self.steps: list[list[float]] = [[]]
        self.laps: list[list[float]] = [[]]
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the border of two blocks, switch."""
        now, lap = time.perf_counter(), self._lap.take()
        if self._began:
            self.steps[-1].append(now - self._began)
            self.laps[-1].append(lap)
        self._began = now
        if len(self.steps[-1]) == BLOCK:
            self._put(trainer, len(self.steps) % 2 == 0)
            self.steps.append([])
            self.laps.append([])
            self._began = 0.0  # hooks of this batch may go by either list: it is not counted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All are there at the end, to say what they have measured."""
        self._put(trainer, True)

    def pairs(self, blocks: Sequence[Sequence[float]], mean: Callable[[Sequence[float]], float]) -> list[float]:
        """With minus without, of neighbouring blocks; the first pair warms up."""
        means = [mean(block) for block in blocks if len(block) == BLOCK]
        return [a - b for a, b in zip(means[0::2], means[1::2], strict=False)][1:]

    def _put(self, trainer: Trainer, there: bool) -> None:
        rest = [c for c in vars(trainer)["callbacks"] if c not in self._others]
        at = rest.index(self._lap.closes)
        vars(trainer)["callbacks"] = rest[:at] + (self._others if there else []) + rest[at:]


# -- the straggler ----------------------------------------------------------------------------------------------------


def _straggler() -> tuple[list[Row], Claim]:
    work, order = Work(650, step=0.02, slow={3: 4.0}), drawn(PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**work.arguments({}, Path(folder)), "order": order}
        with Ranks(by_turns, 4, arguments=arguments) as ranks:
            records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    ratio, cells = told(records, order, work.batches * work.batch)
    rows = [Row(f"straggler, {name}", Role.OTHER, cells[name]) for name in ("without", "with")]
    sentence = f"the straggler's figure within {SHARE:.0%} of that without, all of 95 %: {ratio}"
    return rows, Claim(sentence, ratio.off <= SHARE)
