"""A result never stands alone: a table has the physical limit, the control (replicas that never talk) and ratios.

A figure in seconds says something about one machine on one afternoon; a ratio between two variants that took turns on
that machine says something about the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

Cell = float | int | str | None


class Role(str, Enum):
    """What a row is there for."""

    LIMIT = "limit"
    CONTROL = "control"
    OTHER = "other"
    RESULT = "result"


@dataclass(frozen=True)
class Row:
    """One variant. `cells` maps a column to a figure; None is printed as a dash."""

    name: str
    role: Role
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Claim:
    """A sentence that the figures must bear out."""

    sentence: str
    met: bool


@dataclass(frozen=True)
class Table:
    """What a benchmark returns.

    Attributes:
        title: What was measured, on how many ranks.
        rows: At least one limit, one control and one result.
        claims: What must hold; the harness fails where one does not.
        notes: What a reader must know to judge the figures.
        no_control: Why a control would say nothing here; only then may it be missing.
    """

    title: str
    rows: Sequence[Row]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    no_control: str = ""
    columns: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        roles = {row.role for row in self.rows}
        wanted = {Role.LIMIT, Role.RESULT} | (set() if self.no_control else {Role.CONTROL})
        if missing := sorted(role.value for role in wanted - roles):
            raise ValueError(f"{self.title!r} has no row for: {', '.join(missing)}")
        object.__setattr__(self, "columns", list(dict.fromkeys(name for row in self.rows for name in row.cells)))

    @property
    def met(self) -> bool:
        """Whether all claims hold."""
        return all(claim.met for claim in self.claims)

    def text(self) -> str:
        """The table as aligned text."""
        head = ["", "", *self.columns]
        body = [[row.name, row.role.value, *(_shown(row.cells.get(c)) for c in self.columns)] for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [self.title, "", *(_aligned(line, widths) for line in [head, *body]), ""]
        lines += [f"{'met    ' if claim.met else 'NOT MET'}  {claim.sentence}" for claim in self.claims]
        lines += [f"no control: {self.no_control}"] if self.no_control else []
        return "\n".join([*lines, *self.notes])

    def plain(self) -> dict[str, object]:
        """The table as JSON takes it."""
        return {
            "title": self.title,
            "rows": [{"name": r.name, "role": r.role.value, "cells": _plain(r.cells)} for r in self.rows],
            "claims": [{"sentence": c.sentence, "met": c.met} for c in self.claims],
            "notes": list(self.notes),
            "no_control": self.no_control,
        }


def _plain(cells: Mapping[str, Cell]) -> dict[str, Cell]:
    return {name: None if isinstance(cell, float) and not math.isfinite(cell) else cell for name, cell in cells.items()}


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    words = [f"{w:<{n}}" if i < 2 else f"{w:>{n}}" for i, (w, n) in enumerate(zip(line, widths, strict=True))]
    return "  ".join(words).rstrip()


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
