"""What the silence of a rank means. The rounds ask here, and know no rule by its name.

rule        a rank that does not send               the others count it with       agreed where nobody sends
always      there is none                           -                              -
accumulate  rest <- rest + v                        0                              0
periodic    the same, by the clock: the control     0                              0
paper       drops v, rest stands still              its last sheet                 what it was in the last round
innovation  nothing: sheets say how v has changed   no change                      what it was in the last round
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Rule = Literal["always", "accumulate", "periodic", "paper", "innovation"]


@dataclass(frozen=True)
class Silence:
    """One rule.

    Attributes:
        decides: Each rank decides whether it sends, by its trigger; else the number of the round does.
        keeps: A silent rank's values wait at home for its next sheet.
        reuses: A silent rank counts with its last sheet.
        tracks: A sheet says how values have changed since the last one, and what was agreed adds up.
    """

    decides: bool = True
    keeps: bool = False
    reuses: bool = False
    tracks: bool = False


RULES: Mapping[str, Silence] = {
    "always": Silence(decides=False),
    "accumulate": Silence(keeps=True),
    "periodic": Silence(decides=False, keeps=True),
    "paper": Silence(reuses=True),
    "innovation": Silence(tracks=True),
}
