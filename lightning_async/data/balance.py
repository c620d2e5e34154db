"""How the samples of an epoch are divided between the members, as a user says it: one word, or IDPA's knobs.

in a config    balance: claim                                          as fast as each can, batch by batch
               balance: equal                                          the same number for all
               balance: incremental                                    in ten parts, by measured seconds a sample
               balance: {parts: 4, partition: kept, nominal: probe}    the same with other knobs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Name = Literal["equal", "claim", "incremental"]
PartitionForm = Literal["redrawn", "kept"]
Nominal = Literal["equal", "probe"] | list[float]


@dataclass(frozen=True)
class Incremental:
    """IDPA (Chen et al. 2019): the samples are allotted in parts, the first by nominal speed, later ones as measured.

    Args:
        parts: In how many parts the samples are allotted (the paper's A).
        partition: "redrawn" (all samples of every epoch, in parts within the epoch, anybody's next time) or "kept" (the
            paper's: one part more in each of the first epochs, and a sample stays with its member, whose disk may
            keep it).
        nominal: Speeds before any is measured: "equal", one number a rank (only their ratios count), or "probe" (each
            rank computes for a tenth of a second).
        memory: Weight of the newest batch in the running mean of seconds a sample, above 0 and at most 1.
    """

    parts: int = 10
    partition: PartitionForm = "redrawn"
    nominal: Nominal = "equal"
    memory: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.parts, int) or isinstance(self.parts, bool) or self.parts < 1:
            raise ValueError(f"`parts` must be an integer of at least 1, got {self.parts!r}")
        if self.partition not in get_args(PartitionForm):
            raise ValueError(f"`partition` must be 'redrawn' or 'kept', got {self.partition!r}")
        if not _is_number(self.memory) or not 0 < self.memory <= 1:
            raise ValueError(f"`memory` must be above 0 and at most 1, got {self.memory!r}")
        if not _is_nominal(self.nominal):
            raise ValueError(
                f"`nominal` must be 'equal', 'probe', or one speed above 0 for each rank, got {self.nominal!r}"
            )


Balance = Name | Incremental
"""How the samples of an epoch are divided between the members."""


def refuse_unknown(balance: object) -> None:
    """Raise for what is no balance."""
    if not isinstance(balance, Incremental) and not (isinstance(balance, str) and balance in get_args(Name)):
        raise ValueError(f"`balance` must be 'claim', 'equal', 'incremental' or its knobs, got {balance!r}")


def meant_by(balance: Balance | None, *, in_step: bool) -> Balance:
    """What a user means who may have said nothing. Members that go in step have equal shares."""
    if balance is None:
        return "equal" if in_step else "claim"
    refuse_unknown(balance)
    if in_step and balance != "equal":
        raise ValueError(f"`balance` must be 'equal' with mode='sync', whose ranks go in step, got {balance!r}")
    return balance


def name_of(balance: Balance) -> Name:
    """The word for it."""
    return "incremental" if isinstance(balance, Incremental) else balance


def knobs_of(balance: Balance) -> Incremental:
    """IDPA's knobs, where the word alone was given."""
    return balance if isinstance(balance, Incremental) else Incremental()


def _is_nominal(nominal: object) -> bool:
    if isinstance(nominal, str):
        return nominal in ("equal", "probe")
    speeds = nominal if isinstance(nominal, Sequence) and not isinstance(nominal, bytes) else ()
    return len(speeds) > 0 and all(_is_number(s) and 0 < s < math.inf for s in speeds)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
