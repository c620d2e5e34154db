"""Delays as a metric: whatever order arrivals are counted in, and on whichever ranks, the sum is the same.

    arrival --update--> counts by sender and bin --declared reductions--> the same counts of all ranks --> figures

Delays up to 255 steps have a bin each, so their quantiles are exact; beyond, 32 bins an octave (3 %). Ages have 32 bins
a decade (7 %). Means and largest values are exact. Only what was folded, shrunk or not, has a delay here; what was
refused or lost is counted by its fate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_async.arrival import Arrival, Fate

FATES = tuple(Fate)
EXACT, PARTS, OCTAVES = 256, 32, 16  # bins of one delay each; bins of an octave; octaves
DELAY_BINS = EXACT + PARTS * OCTAVES
YOUNGEST, DECADES = 1e-6, 10  # seconds; decades from there on
AGE_BINS = PARTS * DECADES
STATES = ("delays", "ages", "fates", "sums", "most", "least")
REDUCED = {"most": "amax", "least": "amin"}  # the others are added up
BEGIN = {"least": 1}  # the others begin with 0
QUANTILES = (0.5, 0.95, 0.99)


class DelayMetric(Metric):
    """How late what arrived was, in steps and in seconds, and what became of it; by sender and in all.

    Args:
        world: How many ranks may send.
        **options: As for every `torchmetrics.Metric`. Ranks at different steps must not gather on their own: there,
            `sync_on_compute=False`, and states are merged at meetings (`merge_state`).
    """

    full_state_update = False
    higher_is_better = False
    delays: Tensor
    ages: Tensor
    fates: Tensor
    sums: Tensor
    most: Tensor
    least: Tensor

    def __init__(self, world: int, **options: Any) -> None:
        super().__init__(**options)
        if world < 1:
            raise ValueError(f"`world` must be at least 1, got {world}")
        self.world = world
        self.add_state("delays", torch.zeros(world, DELAY_BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ages", torch.zeros(world, AGE_BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("fates", torch.zeros(world, len(FATES), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(world, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("most", torch.zeros(world, 2, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("least", torch.ones(world, dtype=torch.float64), dist_reduce_fx="min")

    def update(self, arrivals: Sequence[Arrival]) -> None:
        """Count arrivals. One call for many of them costs about a microsecond each."""
        if not arrivals:
            return
        peers, fates = _indices(a.peer for a in arrivals), _indices(FATES.index(a.fate) for a in arrivals)
        self.fates.index_put_((peers, fates), torch.ones_like(peers), accumulate=True)
        came = [a for a in arrivals if a.fate in (Fate.FOLDED, Fate.SHRUNK)]
        if not came:
            return
        peers, delays = _indices(a.peer for a in came), _indices(max(0, a.delay) for a in came)
        ages = torch.tensor([a.seconds for a in came], dtype=torch.float64)
        factors = torch.tensor([a.factor for a in came], dtype=torch.float64)
        ones = torch.ones_like(peers)
        self.delays.index_put_((peers, delay_bins(delays)), ones, accumulate=True)
        self.ages.index_put_((peers, age_bins(ages)), ones, accumulate=True)
        self.sums.index_put_((peers,), torch.stack([delays.double(), ages, factors], 1), accumulate=True)
        extremes = torch.stack([delays.double(), ages], 1)
        np.maximum.at(self.most.numpy(), peers.numpy(), extremes.numpy())
        np.minimum.at(self.least.numpy(), peers.numpy(), factors.numpy())

    def compute(self) -> dict[str, float]:
        """The figures of all senders together."""
        return self.figures()

    def figures(self, peer: int | None = None) -> dict[str, float]:
        """The figures by name, of one sender or of all; what has no value without an arrival is NaN."""
        rows = slice(None) if peer is None else slice(peer, peer + 1)
        delays, ages = self.delays[rows].sum(0), self.ages[rows].sum(0)
        count = int(delays.sum())
        means = (self.sums[rows].sum(0) / count).tolist() if count else [math.nan] * 3
        most = self.most[rows].amax(0).tolist() if count else [math.nan] * 2
        fates = {fate.value: float(n) for fate, n in zip(FATES, self.fates[rows].sum(0).tolist(), strict=True)}
        found = {"arrived": sum(fates.values()) - fates[Fate.LOST.value], **fates}
        found |= {"mean": means[0], "max": most[0]}
        found |= {f"p{100 * q:.0f}": quantile(delays, q, delay_of) for q in QUANTILES}
        found |= {"age_mean": means[1], "age_max": most[1]}
        found |= {f"age_p{100 * q:.0f}": quantile(ages, q, age_of) for q in QUANTILES}
        return found | {"factor_mean": means[2], "factor_min": float(self.least[rows].min()) if count else math.nan}

    def histogram(self, peer: int | None = None) -> dict[int, int]:
        """How often each delay came: the smallest delay of a bin, and its count; empty bins are left out."""
        counts = self.delays.sum(0) if peer is None else self.delays[peer]
        return {delay_of(at): int(counts[at]) for at in counts.nonzero().flatten().tolist()}


def delay_bins(delays: Tensor) -> Tensor:
    """The bin of each delay."""
    wide = delays.clamp(EXACT, 2 ** (8 + OCTAVES) - 1)
    octave = wide.double().log2().floor().long()
    part = (wide >> (octave - 5)) - PARTS
    return torch.where(delays < EXACT, delays, EXACT + (octave - 8) * PARTS + part)


def delay_of(at: int) -> int:
    """The smallest delay of a bin."""
    if at < EXACT:
        return at
    octave, part = divmod(at - EXACT, PARTS)
    return (PARTS + part) << (octave + 3)


def age_bins(seconds: Tensor) -> Tensor:
    """The bin of each age."""
    return ((seconds.clamp_min(YOUNGEST) / YOUNGEST).log10() * PARTS).floor().long().clamp(0, AGE_BINS - 1)


def age_of(at: int) -> float:
    """The middle of a bin, in seconds."""
    return float(YOUNGEST * 10 ** ((at + 0.5) / PARTS))


def quantile(counts: Tensor, q: float, value: Any) -> float:
    """The smallest value that at least a part `q` of all does not exceed."""
    total = int(counts.sum())
    if not total:
        return math.nan
    at = int(torch.searchsorted(counts.cumsum(0), math.ceil(q * total)))
    return float(value(at))


# -- as JSON ----------------------------------------------------------------------------------------------------------


def pack(metric: DelayMetric) -> dict[str, list[list[Any]]]:
    """The states as JSON can hold them: of each, where it is not as it began, and what is there."""
    packed = {}
    for name in STATES:
        flat: Tensor = getattr(metric, name).flatten()
        at = (flat != BEGIN.get(name, 0)).nonzero().flatten()
        packed[name] = [at.tolist(), flat[at].tolist()]
    return packed


def senders(packed: Mapping[str, Any]) -> int:
    """How many ranks there must be, by the last of those from which something came, or was lost."""
    (at, _) = packed["fates"]
    return 1 + max(at, default=-1) // len(FATES)


def merged(states: Iterable[Mapping[str, Any]], world: int) -> DelayMetric:
    """One metric of packed states."""
    total = DelayMetric(world, sync_on_compute=False)
    merge_into(total, states)
    return total


def merge_into(total: DelayMetric, states: Iterable[Mapping[str, Any]]) -> None:
    """Packed states besides what is there, by their declared reductions."""
    for packed in states:
        for name, (at, values) in packed.items():
            state: Tensor = getattr(total, name)
            places, found = torch.tensor(at, dtype=torch.int64), torch.tensor(values, dtype=state.dtype)
            state.view(-1).scatter_reduce_(0, places, found, REDUCED.get(name, "sum"))


def _indices(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
