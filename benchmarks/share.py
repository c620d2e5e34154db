"""The share of the sum of rates at 4x alone, in more turns than `straggler` takes: minutes in place of twenty.

    limit     the sum of all ranks' own rates between meetings, measured on `none`
    control   mode="none": the same epochs with the same ends, and not one message

Beside the share of `none`'s rates stands each variant's share of its own rates: the first holds what the exchange costs
in a step and what an epoch's end costs, the second the end alone.
"""

from __future__ import annotations

from functools import partial

from benchmarks.repeat import Turns, repeat
from benchmarks.straggler import SHARE, measure, settings
from benchmarks.table import Claim, Role, Row, Table

TURNS = 3


def run(quick: bool) -> Table:
    """`gossip_ring` and `none`, in turns."""
    setting = settings(quick)[0]
    variants = {name: partial(measure, *setting.variants()[name], setting.target) for name in ("gossip_ring", "none")}
    turns = repeat(variants, 1 if quick else TURNS)
    rows = [Row("sum of own rates", Role.LIMIT, {"share": "1.000", "share of its own rates": "1.000"})]
    for name, role in (("gossip_ring", Role.RESULT), ("none", Role.CONTROL)):
        own = [turn["samples/s"] / turn["own rates"] for turn in turns.measures[name]]
        rows.append(Row(name, role, {"share": _shares(turns, name), "share of its own rates": _listed(own)}))
    least = min(a["samples/s"] / b["own rates"] for a, b in _pairs(turns, "gossip_ring"))
    claim = Claim(
        f"samples/s are at least {SHARE:.0%} of the sum of own rates in every turn: {least:.1%}", least >= SHARE
    )
    return Table(f"4 ranks, one {setting.slow:g}x slower: samples/s of whole epochs with their ends", rows, [claim])


def _pairs(turns: Turns, name: str) -> list[tuple[dict[str, float], dict[str, float]]]:
    return [(dict(a), dict(b)) for a, b in zip(turns.measures[name], turns.measures["none"], strict=True)]


def _shares(turns: Turns, name: str) -> str:
    return _listed([a["samples/s"] / b["own rates"] for a, b in _pairs(turns, name)])


def _listed(values: list[float]) -> str:
    return "  ".join(f"{value:.3f}" for value in values)
