"""How much an arrival counts: gamma, a law of how late it is, and of no delay that a healthy run has.

    n equal members push once a round each: in the same order they are n - 1 versions late, and up to 2 (n - 1) where
    the order changes from round to round. That is nobody's fault.
    excess = max(0, delay - 2 (n - 1)) / n                    by so many rounds an arrival is too late

    none   1          poly   (1 + excess)^-a        hinge  1 up to b rounds, then 1 / (1 + a * (excess - b))
                      exp    e^(-a * excess)

    gamma = w / (n * mean of the members' last w),            w = samples * Q * law(excess)

So n equal members move the server as far in a round as one synchronous step of them all, at every n, and each sample of
unequal ones counts the same, however often its member pushes. (With a mean over the last n arrivals it would not: who
pushes often is more often in it.)

The paper's law (BPT-CNN; Chen et al. 2019, as far as it could be recovered) looks at versions alone, and damps the
latest to 0.37 of a fresh one:

    paper  gamma = e^(k / i) / sum over all members j of e^(k_j / i),  i the server's version now, k that of the start
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Literal, get_args

Attenuation = Literal["poly", "exp", "hinge", "none", "paper"]
Law = Callable[[float], float]
Bound = int | Literal["auto"] | None
"""An excess in versions; "auto": what `bound_among` says; None: none."""
STRENGTHS: Mapping[str, float] = {"poly": 0.5, "exp": 0.5, "hinge": 1.0}
FREE_ROUNDS = 10.0
"""So many rounds too late cost nothing under the law `hinge`: about what a member is that is twelve times slower."""


def excess_versions(delay: int, n: int) -> int:
    """By how many versions an arrival is later than in a healthy run of `n` members."""
    return max(0, delay - in_time(0, n))


def in_time(bound: int, n: int) -> int:
    """The largest delay of an arrival whose excess is within a bound."""
    return bound + 2 * (n - 1)


def bound_among(n: int, bound: Bound) -> int | None:
    """The bound among `n` members: "auto" leaves what is late, but not lost, to the law at any number of them."""
    return max(1000, 100 * n) if bound == "auto" else bound


def check_bound(name: str, bound: object) -> None:
    """Raise `ValueError` for what is no bound."""
    if bound is not None and bound != "auto" and (not isinstance(bound, int) or isinstance(bound, bool) or bound < 1):
        raise ValueError(f"`{name}` must be an integer of at least 1, or None for no bound, or 'auto', got {bound!r}")


def excess_rounds(delay: int, n: int) -> float:
    """The same in rounds of `n` arrivals, which is what the laws see."""
    return excess_versions(delay, n) / n


def _none(excess: float) -> float:
    return 1.0


def _poly(strength: float, excess: float) -> float:
    return float((1.0 + excess) ** -strength)


def _exp(strength: float, excess: float) -> float:
    return math.exp(-strength * excess)


def _hinge(strength: float, excess: float) -> float:
    return 1.0 if excess <= FREE_ROUNDS else 1.0 / (1.0 + strength * (excess - FREE_ROUNDS))


def law(attenuation: Attenuation, strength: float | None = None) -> Law:
    """The law of this name; `strength` is its a."""
    if attenuation not in get_args(Attenuation):
        names = ", ".join(map(repr, get_args(Attenuation)))
        raise ValueError(f"`attenuation` must be one of {names}, got {attenuation!r}")
    if strength is not None and attenuation not in STRENGTHS:
        raise ValueError(f"`strength` has no meaning with attenuation={attenuation!r}: leave it out")
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if strength is not None and not (number and 0 <= strength < math.inf):
        raise ValueError(f"`strength` must be a number of at least 0, got {strength!r}")
    if attenuation not in STRENGTHS:
        return _none
    chosen = STRENGTHS[attenuation] if strength is None else float(strength)
    return partial({"poly": _poly, "exp": _exp, "hinge": _hinge}[attenuation], chosen)


def normalised(weight: float, last: Collection[float], n: int) -> float:
    """Gamma of an arrival of this weight among `n` members; `last` are their last weights, as far as they are known."""
    return weight / (n * (sum(last) / len(last)))


def paper(base: int, version: int, bases: Iterable[int], n: int) -> float:
    """The paper's gamma of a member that started from `base`; `bases` are those of all members, this one included."""
    if version == 0:
        return 1.0 / n
    return math.exp(base / version) / sum(math.exp(k / version) for k in bases)
