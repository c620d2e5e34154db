"""The ranks of a run are alike, or none of them trains: one version, one method, the same knobs.

Whoever expects a kind of message that a neighbour never sends waits at the first meeting as long as a meeting may last.
What belongs to a host alone (threads, network interfaces, folders) may differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_async.strategies.facts import knobs_of
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.version import __version__

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

OF_A_HOST = {"inner_threads", "threads"}


def creed(strategy: AsyncStrategy) -> dict[str, Any]:
    """What must be the same on every rank, the weightiest first."""
    knobs = {name: value for name, value in knobs_of(strategy).items() if name not in OF_A_HOST}
    return {"version": __version__, "strategy": strategy.name, **knobs}


def check_alike(mine: Mapping[str, Any], rounds: Rounds) -> Wait[None]:
    """Raise on all ranks if one is unlike the others, with the first thing in which it is."""
    words = yield from rounds.agree(json.dumps(mine).encode(), what="who is alike")
    creeds = {rank: json.loads(word) for rank, word in words.items()}
    for name in dict.fromkeys(name for theirs in creeds.values() for name in theirs):
        said: dict[str, list[str]] = {}
        for rank, theirs in creeds.items():
            said.setdefault(repr(theirs.get(name)), []).append(str(rank))
        if len(said) > 1:
            who = ", ".join(f"{name}={value} on rank {', '.join(at)}" for value, at in said.items())
            raise RuntimeError(
                f"the ranks are not alike: {who}. Give all of them the same lightning_async, strategy and knobs"
            )
