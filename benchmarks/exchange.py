"""25 million weights on a small cluster with slow links: how many exchanges it makes, and what they cost the training.

    limit     the links: what a rank sends in an exchange (its pushes, and its answers to the others) over 200 Mbit/s
    control   mode="none": the same training without a message

    exchanges/s     of the shards of other ranks, mean over all pairs of ranks: between the first that came and the last
                    before the meeting; the limit is that of all uplinks always busy
    longest step    of any rank, in ms more than its median step

Every host is a network namespace of this machine (needs root, iproute2), so all ranks share its cores: the training
itself is small in samples, and the steps are those of 25 million weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median

from benchmarks.hosts import Hosts, available
from benchmarks.launch import Ranks
from benchmarks.subject import NONE, Knobs
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Record, Work, fit

N = 4
STEPS_BEFORE = 5
SHARE, GROWTH = 0.8, 0.1
LIMIT = 900.0
VARIANTS: dict[str, Knobs] = {
    "async_global": {"strategy": "async_global", "local_steps": 1, "attenuation": "none"},
    "none": NONE,
}


@dataclass(frozen=True)
class Setting:
    """Size of the model, speed of the links, length of the run."""

    mbit: float
    work: Work

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return 4 * sum(p.numel() for p in self.work.model().parameters())

    @property
    def exchanges(self) -> float:
        """Per second, if each uplink is always busy: (n - 1) / n of the weights out as pushes, as many as answers."""
        return self.mbit * 1e6 / 8 / (2 * (N - 1) / N * self.bytes)


def setting(quick: bool) -> Setting:
    """25 million weights for about two minutes; a quick run has 1.3 million."""
    if quick:
        return Setting(50.0, Work(N * 150, width=512, layers=6, step=0.05))
    return Setting(200.0, Work(N * 150, width=2048, layers=7, step=0.3))


def run(quick: bool) -> Table:
    """Both variants, one after the other."""
    if (reason := available()) is not None:
        raise RuntimeError(reason)
    at = setting(quick)
    found = {name: _measure(at, knobs) for name, knobs in VARIANTS.items()}
    roles = {"none": Role.CONTROL}
    rows = [Row("links always busy", Role.LIMIT, {"exchanges/s": at.exchanges, "longest - median ms": 0.0})]
    rows += [Row(name, roles.get(name, Role.RESULT), cells) for name, cells in found.items()]
    rate, growth = found["async_global"]["exchanges/s"], found["async_global"]["longest - median ms"]
    assert isinstance(rate, float)
    assert isinstance(growth, float)
    claims = [
        Claim(
            f"exchanges are at least {SHARE:.0%} of what the links allow: {rate / at.exchanges:.1%}",
            rate >= SHARE * at.exchanges,
        ),
        Claim(f"no step is {1000 * GROWTH:.0f} ms longer than the median: {growth:.0f} ms", growth <= 1000 * GROWTH),
    ]
    title = f"{at.bytes / 4e6:.1f} M weights, {N} hosts, {at.mbit:g} Mbit/s each way"
    return Table(title, rows, claims)


def _measure(at: Setting, knobs: Knobs) -> dict[str, Cell]:
    with (
        Hosts(N, mbit=at.mbit) as hosts,
        Ranks(fit, N, arguments=at.work.arguments(knobs), address=hosts.address(0), spawn=hosts.spawn) as ranks,
    ):
        records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    steps = [[seconds for _, seconds in record.gaps()][STEPS_BEFORE:] for record in records]
    return {
        "exchanges/s": fmean(_rate(record, peer) for rank, record in enumerate(records) for peer in _others(rank)),
        "median step ms": 1000 * median(s for rank in steps for s in rank),
        "longest - median ms": 1000 * max(max(rank) - median(rank) for rank in steps),
        "MB sent a rank": fmean(record.sent for record in records) / 1e6,
        "reply p99 ms": 1000 * max(record.reply for record in records),
    }


def _others(rank: int) -> list[int]:
    return [peer for peer in range(N) if peer != rank]


def _rate(record: Record, peer: int) -> float:
    """Exchanges per second with one peer; what is folded at the meeting, where the training waits for it, is none."""
    times = [when for when, who in record.remote if who == peer and when <= record.marks[-2]]
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
