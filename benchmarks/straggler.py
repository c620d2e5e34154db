"""One rank is 4x or 10x slower, or all are uneven: samples per second and time to a loss against the ranks' own rates.

    limit     every rank at its own rate, all the time, and every sample worth as much as one of `ddp`'s
    control   mode="none": replicas that never talk, averaged at meetings; all ranks' own rates are measured on it,
              between the meetings
    ddp       everybody at the pace of the slowest: (4 * 1/80) / (3 * 1/20 + 1/80) = 31 % of the sum at 4x
    post-local SGD   PyTorch's: ddp for the first tenth, then the mean of the weights behind every 8th step

With sigma 1 every step's seconds are drawn log-normally around the same mean, on each rank for itself: nobody is slow,
and the slowest of four takes 2.2 times the mean.
Samples per second are those of whole epochs with their ends: the wait for the last batches, the meeting, the
validation. Time to target is in multiples of (samples that `ddp` needs / sum of rates). The loss is that of the
replicas' mean on held-out samples, computed afterwards from copies that each rank put aside: what a meeting at that
time would have given. In one pass (a single meeting at the end) a method that does not talk has no meetings to live on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.rivals import PERIOD, POST_LOCAL
from benchmarks.subject import GOSSIP, NONE, Knobs, subject
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import digits
from benchmarks.weighing import step_weights
from benchmarks.work import Record, Work, fit

N = 4
STEP = 0.02
EVERY = 0.1
TARGET, QUICK_TARGET = 0.3, 0.5  # fixed beforehand: `ddp` gets there in mid-run
SIGMA = 1.0
SHARE, TIME, FAIR = 0.95, 1.1, 1.1
ONE_PASS: Knobs = {"at_meeting": "keep"}
LIMIT = 600.0  # seconds that a run may take


@dataclass(frozen=True)
class Setting:
    """How one rank, or all, are slow."""

    slow: float
    work: Work
    ddp: Work
    target: float
    strategy: str = GOSSIP

    @property
    def name(self) -> str:
        """What is slow about it."""
        return f"sigma {self.work.sigma:g}" if self.work.sigma else f"{self.slow:g}x"

    def variants(self) -> Mapping[str, tuple[Knobs | None, Work]]:
        """Knobs (None: `ddp`) and work by name."""
        whole = replace(self.work, batches=self.work.batches * self.work.epochs, epochs=1)
        mine = subject(self.strategy)
        one_pass = {**mine, **ONE_PASS} if self.strategy == GOSSIP else mine  # a server's weights are one's own
        talking: dict[str, tuple[Knobs | None, Work]] = {
            self.strategy: (mine, self.work),
            "none": (NONE, self.work),
            "ddp": (None, self.ddp),
            "sync": ({**mine, "mode": "sync"}, self.ddp),
            POST_LOCAL: (_post_local(self.ddp), self.ddp),
        }
        if self.work.sigma:
            return talking
        return {
            **talking,
            f"{self.strategy}, one pass": (one_pass, whole),
            "none, one pass": ({**NONE, **ONE_PASS}, whole),
        }


def _post_local(work: Work) -> Knobs:
    """Begins after about a tenth, so that the last step is one behind which weights are averaged: all end equal."""
    steps = work.batches * work.epochs // N
    return {POST_LOCAL: {"start": (steps - 1) % PERIOD + steps // 10 // PERIOD * PERIOD}}


def settings(quick: bool) -> list[Setting]:
    """An epoch is so long that the slow rank takes 50 batches in it (25 in a quick run); with sigma, 5 s (3 s)."""
    if quick:
        work = _work(4.0, slowest=25, epochs=4)
        uneven = Work(600, 2, step=STEP, sigma=SIGMA, every=EVERY)
        return [Setting(4.0, work, work, QUICK_TARGET), Setting(1.0, uneven, _short(uneven, 120), QUICK_TARGET)]
    fourfold = _work(4.0, slowest=50, epochs=4)
    tenfold = _work(10.0, slowest=50, epochs=4)
    uneven = Work(1000, 3, step=STEP, sigma=SIGMA, every=EVERY)
    return [
        Setting(4.0, fourfold, fourfold, TARGET),
        Setting(10.0, tenfold, _short(tenfold, 400), TARGET),
        Setting(1.0, uneven, _short(uneven, 400), TARGET),
    ]


def _short(work: Work, batches: int) -> Work:
    """For `ddp`'s rate; how many samples it needs is known from 4x."""
    return replace(work, batches=batches, epochs=1)


def _work(slow: float, *, slowest: int, epochs: int) -> Work:
    batches = round(slowest * (1 + (N - 1) * slow))
    return Work(batches - batches % N, epochs, step=STEP, slow={N - 1: slow}, every=EVERY)


def run(quick: bool, strategy: str = GOSSIP) -> Table:
    """All variants at all speeds."""
    rows: list[Row] = []
    claims: list[Claim] = []
    samples: list[float] = []
    for setting in [replace(setting, strategy=strategy) for setting in settings(quick)]:
        turns = repeat(
            {name: partial(measure, *v, setting.target) for name, v in setting.variants().items()}, 1 if quick else 2
        )
        samples = samples or [turn["samples to target"] for turn in turns.measures["ddp"]]
        more_rows, more_claims = _report(setting, turns, samples)
        rows, claims = rows + more_rows, claims + more_claims
    notes = [f"target: loss {settings(quick)[0].target}; time to target in multiples of (ddp's samples / own rates)"]
    return Table(
        f"{N} ranks, a step is {STEP * 1000:.0f} ms of sleep, one rank slower, or all uneven",
        rows,
        claims,
        [*notes, *NOTES, _gil(quick, strategy)],
    )


NOTES = [
    "own rates: between the meetings of `none`, all ranks at once; of limit: against the emulated time alone.",
    "one sample weighs the same: what a step of each rank moved the consensus by in a run of its own, at these speeds.",
    "spread: distance of the replicas from their mean in % of its norm, over the second half of the run.",
    f"ddp, sync and {POST_LOCAL} at 10x and with sigma run for one short epoch: their rate only.",
    f"{POST_LOCAL}: PyTorch's hook and averager, every {PERIOD} steps; each rank's replica is its own in between.",
    "sigma: each step's seconds are log-normal, with the same mean on every rank.",
]


# -- one run ----------------------------------------------------------------------------------------------------------


def measure(knobs: Knobs | None, work: Work, target: float, n: int = N) -> Measures:
    """Train on `n` ranks; the figures by name."""
    with tempfile.TemporaryDirectory() as folder:
        with Ranks(fit, n, arguments=work.arguments(knobs, Path(folder))) as ranks:
            records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
        copies = [Copies.load(Path(folder, f"{rank}.copies")) for rank in range(n)] if work.every else []
    if len({record.digest for record in records}) > 1:
        raise RuntimeError(f"the ranks ended unequal: {[record.digest for record in records]}")
    start, end = min(r.start for r in records), max(r.end for r in records)
    handled = sum(r.folded + r.refused for r in records)
    figures = {
        "samples/s": work.batch * sum(len(r.marks) for r in records) / (end - start),
        "own rates": work.batch * sum(r.rate() for r in records),
        "limit": work.batch * sum(work.rate(rank) for rank in range(n)),
        **{f"folded {rank}": float(r.folded) for rank, r in enumerate(records)},
        "refused": sum(r.refused for r in records) / max(1, handled),
        "reply": max(r.reply for r in records),
        "idle": max(r.idle() for r in records),
        "loss": records[0].loss,
        "slowest": float(min(len(r.marks) for r in records)),
    }
    return {**figures, **_learning(copies, work, start, target)} if copies else figures


@dataclass(frozen=True)
class Copies:
    """One rank's weights at some times."""

    times: Sequence[float]
    batches: Sequence[int]
    weights: Tensor

    @classmethod
    def load(cls, file: Path) -> Copies:
        """What the rank put aside."""
        return cls(**torch.load(file, weights_only=True))

    def at(self, now: float) -> int:
        """Which copy is the newest at this time."""
        return max(0, sum(time <= now for time in self.times) - 1)


def _learning(copies: Sequence[Copies], work: Work, start: float, target: float) -> Measures:
    """When the mean of the replicas reached the target, after how many samples; how far apart replicas were."""
    model, begin, end = work.model(), max(c.times[0] for c in copies), min(c.times[-1] for c in copies)
    before: tuple[float, float, float] | None = None
    found, spreads = (float("inf"), float("inf")), []
    for k in range(int((end - begin) / EVERY) + 1):
        now = begin + k * EVERY
        picks = [(c, c.at(now)) for c in copies]
        weights = torch.stack([c.weights[i] for c, i in picks])
        point = (_loss(model, weights.mean(0)), now - start, float(work.batch * sum(c.batches[i] for c, i in picks)))
        if point[0] <= target < (before or point)[0] and before and found[0] == float("inf"):
            part = (before[0] - target) / (before[0] - point[0])
            found = (before[1] + part * (point[1] - before[1]), before[2] + part * (point[2] - before[2]))
        before = point
        spreads.append(100 * ((weights - weights.mean(0)).norm(dim=1).mean() / weights.mean(0).norm()).item())
    return {"seconds to target": found[0], "samples to target": found[1], "spread": fmean(spreads[len(spreads) // 2 :])}


@torch.no_grad()
def _loss(model: nn.Sequential, weights: Tensor) -> float:
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    x, y = digits().validation
    return F.cross_entropy(model(x), y).item()


# -- the table --------------------------------------------------------------------------------------------------------


def _report(setting: Setting, turns: Turns, samples: Sequence[float]) -> tuple[list[Row], list[Claim]]:
    at = f"{setting.name}: "
    own = median(turn["own rates"] for turn in turns.measures["none"])
    limits: dict[str, Cell] = {"samples/s": own, "share": 1.0, "of limit": own / turns.of("none", "limit").median}
    rows = [Row(f"{at}sum of own rates", Role.LIMIT, {**limits, "time to target": 1.0})]
    for name in setting.variants():
        rows.append(Row(at + name, ROLES.get(name, Role.RESULT), _cells(turns, name, samples)))
    share, time = _shares(turns, setting.strategy), _times(turns, setting.strategy, samples)
    weights = step_weights(subject(setting.strategy), setting.work, N, timeout=LIMIT)
    unfair = max(weights) / min(weights)
    claims = [
        Claim(f"{at}samples/s are at least {SHARE:.0%} of the sum of own rates: {share:.1%}", share >= SHARE),
        Claim(f"{at}time to target is at most {TIME}x of the limit: {time:.2f}x", time <= TIME),
        Claim(f"{at}one sample weighs the same, slowest or fastest, within {FAIR}: {unfair:.3f}", unfair <= FAIR),
    ]
    return rows, claims


ROLES = {"none": Role.CONTROL, "none, one pass": Role.CONTROL, **dict.fromkeys(("ddp", "sync", POST_LOCAL), Role.OTHER)}


def _cells(turns: Turns, name: str, samples: Sequence[float]) -> dict[str, Cell]:
    of: Callable[[str], float] = lambda key: turns.of(name, key).median  # noqa: E731
    time = _times(turns, name, samples)
    return {
        "samples/s": of("samples/s"),
        "share": _shares(turns, name),
        "of limit": of("samples/s") / of("limit"),
        "time to target": time if time < float("inf") else "never",
        "folded by rank": " ".join(str(round(of(f"folded {rank}"))) for rank in range(N)),
        "refused %": round(100 * of("refused"), 2),
        "spread %": round(of("spread"), 2),
        "reply p99 ms": round(1000 * of("reply")),
        "idle ms": round(1000 * of("idle")),
        "loss": of("loss"),
        "batches of slowest": round(of("slowest")),
    }


def _shares(turns: Turns, name: str) -> float:
    """Samples per second over the own rates that `none` measured in the same turn."""
    pairs = zip(turns.measures[name], turns.measures["none"], strict=True)
    return median(mine["samples/s"] / none["own rates"] for mine, none in pairs)


def _times(turns: Turns, name: str, samples: Sequence[float]) -> float:
    """Time to target over the limit of the same turn."""
    triples = zip(turns.measures[name], turns.measures["none"], samples, strict=True)
    return median(mine["seconds to target"] / (needed / none["own rates"]) for mine, none, needed in triples)


def _gil(quick: bool, strategy: str) -> str:
    """The share with a step that is pure Python, in a sentence."""
    work = Work(250 if quick else 1250, 1 if quick else 2, step=STEP, slow={1: 4.0}, hold_gil=True)
    variants = {
        name: partial(measure, knobs, work, 0.0, 2) for name, knobs in ((strategy, subject(strategy)), ("none", NONE))
    }
    turns = repeat(variants, 1)
    return (
        f"with the step holding Python's lock (2 ranks, one 4x slower): {_shares(turns, strategy):.1%} of the sum of "
        f"own rates, control {_shares(turns, 'none'):.1%}; 99 % of what was folded was younger than "
        f"{1000 * turns.of(strategy, 'reply').median:.0f} ms"
    )
