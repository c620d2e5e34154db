"""Laws of shrinking: what part of a late contribution counts, given how late it is.

    1 |####            law(0) = 1: what is not late counts in full
      |    ####        never rises with the delay
      |        ####    in (0, 1]: nothing is thrown away, nothing is reversed
    0 +------------ excess delay

`constant` beta^e (FDG) · `inverse` 1 / (1 + rate e) · `poly` (1 + e)^-power · `exp` exp(-rate e) ·
`hinge` 1 up to `knee`, then 1 / (1 + rate (e - knee))

The adaptive ones have a state, and at any one state they are such a law too. `relative` judges a delay by those before
it, `alignment` by the cosine between it and what is fresh, `stability` by how the loss bends, or goes.
"""

from __future__ import annotations

import cmath
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, get_args

from lightning_async.fresh import Fresh, nothing_fresh

LawName = Literal["constant", "inverse", "poly", "exp", "hinge", "relative", "alignment", "stability"]
LEAST = 2.0**-64
"""The smallest factor: whatever the delay, it stays above 0."""


class Law:
    """A factor for each delay; this one has no state and forgets all it is told.

    Args:
        of: The factor of an excess delay.
    """

    def __init__(self, of: Callable[[float], float]) -> None:
        self._of = of

    def factor(self, excess: float, fresh: Fresh = nothing_fresh) -> float:
        """What part of a contribution counts that is so much later than a healthy one."""
        return 1.0 if excess <= 0 else min(1.0, max(LEAST, self.of(excess)))

    def of(self, excess: float) -> float:
        """The law at its present state, for an excess above 0."""
        return self._of(excess)

    def further(self, already: float, excess: float) -> float:
        """The factor for a contribution that others have shrunk on its way, for a part of its delay."""
        whole, part = (max(LEAST, self.of(e)) if e > 0 else 1.0 for e in (excess, already))
        return min(1.0, max(LEAST, whole / part))

    def observe(self, loss: float) -> None:
        """A step had this loss."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Relative(Law):
    """A delay counts in full within the usual ones, and by (usual + 1) / (delay + 1) beyond.

    Usual is up to the median and as much again as the upper quartile lies above it, of the last `window` delays.
    """

    def __init__(self, window: int = 256, least: int = 16) -> None:
        self._window, self._least = window, least
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def factor(self, excess: float, fresh: Fresh = nothing_fresh) -> float:
        """Judge by what came before, then remember."""
        found = super().factor(excess)
        self._remember(max(0.0, excess))
        return found

    def of(self, excess: float) -> float:
        """Full up to the usual delay."""
        return min(1.0, (self.usual + 1) / (excess + 1))

    @property
    def usual(self) -> float:
        """Up to which delay nothing is shrunk."""
        n = len(self._sorted)
        if n < self._least:
            return math.inf
        median, upper = self._sorted[n // 2], self._sorted[3 * n // 4]
        return median + 2 * max(1.0, upper - median)

    def state_dict(self) -> dict[str, Any]:
        """The delays, in their order."""
        return {"delays": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The same delays."""
        self._order, self._sorted = deque(state["delays"]), sorted(state["delays"])

    def _remember(self, excess: float) -> None:
        if len(self._order) == self._window:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(excess)
        insort(self._sorted, excess)


class Alignment(Law):
    """What goes against what is fresh counts less: 1 + 2 x cosine, between `floor` and 1.

    The cosine is smoothed, and the factor moves only when it would move by more than `slack`, or all the way to one of
    its ends: noise moves nothing.
    """

    def __init__(self, floor: float = 0.05, slack: float = 0.1, memory: float = 0.9) -> None:
        self._floor, self._slack, self._memory = floor, slack, memory
        self.cosine, self.level = 0.0, 1.0

    def factor(self, excess: float, fresh: Fresh = nothing_fresh) -> float:
        """Look how well it agrees, where that is known."""
        if excess > 0 and (found := fresh()) is not None:
            self._look(found)
        return super().factor(excess)

    def of(self, excess: float) -> float:
        """The same for all that is late: by the next look it is known how much that harms."""
        return self.level

    def further(self, already: float, excess: float) -> float:
        """Each stage looks for itself."""
        return self.level if excess > 0 else 1.0

    def _look(self, found: float) -> None:
        self.cosine += (1 - self._memory) * (found - self.cosine)
        wanted = min(1.0, max(self._floor, 1 + 2 * self.cosine))
        if abs(wanted - self.level) > self._slack or wanted in (1.0, self._floor):
            self.level = wanted

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"cosine": self.cosine, "level": self.level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self.cosine, self.level = float(state["cosine"]), float(state["level"])


class Stability(Law):
    """Steps as large as do not swing with this delay, where curvature is seen; else by how the loss goes.

    Where it is seen (`look`; in a pipeline), a late gradient counts `steadiness` / (4 x lr x curvature), at most 1: at
    `steadiness` a run swings for ever, at a quarter of it a late descent just does not swing. The curvature is a mean
    over about 100 batches: gradients that jump raise the shrink, and are forgotten afterwards.

    Where it is not, the factor is 1 / (1 + pressure x excess): the pressure grows while the loss rises, and eases off
    while it does not. The loss rises if its mean over about 10 steps is above that over about 100 by more than half of
    the noise of the first. One that is no number raises the pressure at once. It begins at `first`: a run that is too
    fast for its delays is lost before anything could be learnt of it. Whoever has no loss goes by another's pressure.
    """

    def __init__(self, first: float = 0.5, growth: float = 0.05, ease: float = 0.002, most: float = 1000.0) -> None:
        self._growth, self._ease, self._most = growth, ease, most
        self.pressure, self._fast, self._slow, self._noise = first, 0.0, 0.0, 0.0
        self._steps = self._looks = 0
        self._turned = self._went = self._lr = self._momentum = 0.0

    @property
    def sees(self) -> bool:
        """Whether the curvature is known."""
        return self._went > 0

    def of(self, excess: float) -> float:
        """Less, the higher the curvature, or the pressure."""
        if not self.sees:
            return 1 / (1 + self.pressure * excess)
        step = self._lr * self._turned / self._went
        return steadiness(excess, _near(self._momentum)) / (MARGIN * step) if step > 0 else 1.0

    def further(self, already: float, excess: float) -> float:
        """What a stage sees of curvature is that of gradients as they came, shrunk on their way."""
        return self.factor(excess) if self.sees else super().further(already, excess)

    def look(self, turned: float, went: float, *, lr: float, momentum: float) -> None:
        """How far gradients turned along the way of the weights, its length squared; the optimizer's knobs."""
        if not math.isfinite(turned + went):
            return
        self._looks += 1
        part = max(0.01, 1 / self._looks)
        self._turned += part * (turned - self._turned)
        self._went += part * (went - self._went)
        self._lr, self._momentum = lr, momentum

    def observe(self, loss: float) -> None:
        """One more loss."""
        if not math.isfinite(loss):
            self.pressure = min(self._most, 2 * self.pressure + 1)
            return
        self._steps += 1
        if self._steps == 1:
            self._fast = self._slow = loss
        quick, long = max(0.1, 1 / self._steps), max(0.01, 1 / self._steps)
        self._noise += long * (abs(loss - self._fast) - self._noise)
        self._fast += quick * (loss - self._fast)
        self._slow += long * (loss - self._slow)
        rising = self._steps > 20 and self._fast > self._slow + 0.5 * self._noise
        self.pressure = min(self._most, self.pressure + self._growth * (1 + self.pressure) * rising)
        self.pressure *= 1 - self._ease * (not rising)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {name.lstrip("_"): getattr(self, name) for name in _REMEMBERED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        for name in _REMEMBERED:
            setattr(self, name, type(getattr(self, name))(state[name.lstrip("_")]))


_REMEMBERED = (
    *("pressure", "_fast", "_slow", "_noise", "_steps"),
    *("_looks", "_turned", "_went", "_lr", "_momentum"),
)
MARGIN = 4.0
"""The limit of stability over the largest step without a swing, delay^delay / (delay + 1)^(delay + 1): 4 to 4.3."""


@lru_cache(4096)
def steadiness(delay: float, momentum: float = 0.0) -> float:
    """The largest lr x curvature at which gradient descent with this delay and momentum m converges.

    On a parabola w goes by (z - 1)(z - m) = -lr c z^(1 - delay). At the limit a z is on the unit circle, at the angle
    where the phases of both sides meet: arg(z - m) + (delay - 1/2) arg(z) = pi / 2. Without momentum that is the known
    2 sin(pi / (4 delay + 2)).
    """

    def ahead(angle: float) -> bool:
        phase = math.atan2(math.sin(angle), math.cos(angle) - momentum)
        return phase + (delay - 0.5) * angle > math.pi / 2

    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
    z = cmath.exp(1j * high)
    return abs((z - 1) * (z - momentum))


def _near(momentum: float) -> float:
    """To three digits of what it lacks to 1: a momentum that changes at every step is the same one now and then."""
    return 1 - float(f"{1 - momentum:.3g}")


def law(name: LawName, *, beta: float = 0.5, rate: float = 0.1, power: float = 0.5, knee: float = 8.0) -> Law:
    """The law of this name."""
    _check(name, beta, rate, power, knee)
    fixed: dict[str, Callable[[float], float]] = {
        "constant": lambda e: beta**e,
        "inverse": lambda e: 1 / (1 + rate * e),
        "poly": lambda e: (1 + e) ** -power,
        "exp": lambda e: math.exp(-rate * e),
        "hinge": lambda e: 1 / (1 + rate * max(0.0, e - knee)),
    }
    adaptive: dict[str, type[Law]] = {"relative": Relative, "alignment": Alignment, "stability": Stability}
    return Law(fixed[name]) if name in fixed else adaptive[name]()  # type: ignore[call-arg]  # all have defaults


def _check(name: str, beta: float, rate: float, power: float, knee: float) -> None:
    if name not in get_args(LawName):
        raise ValueError(f"`law` must be one of {', '.join(get_args(LawName))}, got {name!r}")
    if not _number(beta) or not 0 < beta <= 1:
        raise ValueError(f"`beta` must be above 0 and at most 1 (1: nothing is shrunk), got {beta!r}")
    for knob, value in (("rate", rate), ("power", power), ("knee", knee)):
        if not _number(value) or not 0 <= value < math.inf:
            raise ValueError(f"`{knob}` must be at least 0, got {value!r}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
