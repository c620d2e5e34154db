"""What a benchmark is of: a strategy by name, as knobs that the ranks' processes can read, or as an algorithm.

{}                                                the default: gossip_ring with its defaults
{"strategy": "async_global", "local_steps": 4}    another one; all other keys are its knobs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_async.algorithms.algorithm import Algorithm
from lightning_async.algorithms.gossip import gossip
from lightning_async.strategies import STRATEGIES, AsyncStrategy

Knobs = Mapping[str, Any]
GOSSIP = "gossip_ring"
NONE: Knobs = {"mode": "none"}


def subject(strategy: str) -> Knobs:
    """A strategy with its defaults."""
    return {} if strategy == GOSSIP else {"strategy": strategy}


def with_control(strategy: str) -> dict[str, Knobs | None]:
    """It, the control, and `ddp` (None)."""
    return {strategy: subject(strategy), "none": NONE, "ddp": None}


def made(knobs: Knobs) -> AsyncStrategy:
    """The strategy with these knobs."""
    name, kinds = knobs.get("strategy", GOSSIP), {kind.name: kind for kind in STRATEGIES}
    if name not in kinds:
        raise ValueError(f"the strategies are {', '.join(kinds)}, got {name!r}")
    return kinds[name](**_without_name(knobs))


def algorithm(knobs: Knobs) -> Algorithm:
    """Its algorithm alone, for the virtual cluster."""
    return made(knobs).algorithm if "strategy" in knobs else gossip(**_without_name(knobs))


def _without_name(knobs: Knobs) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if name != "strategy"}
