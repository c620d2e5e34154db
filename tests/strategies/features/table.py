"""The table of features: each row says what a feature of Lightning does here, and names the run that shows it.

    Scene   one run on two ranks of unequal speed, fitted a few times; what both ranks saw goes to the rows
      Row   a feature, its value, a verdict, words for the page, and what must hold of what the ranks saw

A row without a scene of its own names the test that shows it, or says why it was not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Verdict(str, Enum):
    """What became of a feature."""

    WORKS = "works"
    DIFFERS = "differs"
    REFUSED = "refused"
    UNTRIED = "not tried"


@dataclass(frozen=True)
class Row:
    """One feature with one value.

    Attributes:
        of: The argument, class or method, as Lightning names it.
        value: What it is given, as in the user's code.
        verdict: What became of it.
        words: How it differs, or the sentence with which it is refused.
        holds: Whether what the ranks returned bears that out.
        shown: The test that shows it, in the place of `holds`.
    """

    of: str
    value: str
    verdict: Verdict
    words: str = ""
    holds: Callable[[Any, Any], bool] | None = None
    shown: str = ""


@dataclass(frozen=True)
class Scene:
    """One function that two ranks run, each with the same empty folder, and the rows that it shows.

    Attributes:
        section: Where rows go whose feature is not an argument or a class of Lightning's lists.
        run: Returns what a rank saw.
        rows: What it shows.
        warnings: What may be warned about meanwhile.
    """

    section: str
    run: Callable[[Path], Any]
    rows: Sequence[Row]
    warnings: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The function's."""
        return self.run.__name__


def works(of: str, value: str, holds: Callable[[Any, Any], bool], words: str = "") -> Row:
    """As with `ddp`."""
    return Row(of, value, Verdict.WORKS, words, holds)


def differs(of: str, value: str, words: str, holds: Callable[[Any, Any], bool]) -> Row:
    """Otherwise than with `ddp`; the words say how."""
    return Row(of, value, Verdict.DIFFERS, words, holds)


def refused(of: str, value: str, sentence: str, key: str = "") -> Row:
    """Every rank hears this sentence. `key`: under which name the scene returns what the rank heard."""
    return Row(of, value, Verdict.REFUSED, sentence, lambda a, b: all(sentence in one[key or value] for one in (a, b)))


def shown(of: str, value: str, verdict: Verdict, words: str, test: str) -> Row:
    """Another test shows it: `file::function`, below tests/."""
    return Row(of, value, verdict, words, shown=test)


def untried(of: str, value: str, why: str) -> Row:
    """Nobody has seen it run here."""
    return Row(of, value, Verdict.UNTRIED, why)
