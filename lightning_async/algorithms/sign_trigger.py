"""A rank sends where its news outweighs what has moved lately, and after `max_skip` silent rounds in any case.

    news > threshold * mean over the last `history` rounds of |agreed|^2  +  error_weight * (missed^2 now + when sent)

    news    change   |v - v when it last said that it sends|^2     (LAG, LAQ; `innovation`: |v - what all have of it|^2)
            backlog  |v + rest|^2, all that a sheet would say now

Both sides are in units of v, be that gradients or updates, so there is no learning rate in it. The first `history`
rounds always send. Signs miss about as much as they say, so an `error_weight` of 3, as for finer grids, hardly fires.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_async.algorithms.press import Press, Rest, Source
from lightning_async.algorithms.sheets import Cut

News = Literal["change", "backlog"]


class Trigger:
    """One rank's decisions, in the order of the rounds that they are for.

    Args:
        history: How many rounds are remembered, and always sent at first.
        threshold: How many times the mean square of the last rounds the news must exceed.
        error_weight: How much what signs miss counts against sending.
        max_skip: Silent rounds in a row, at most.
        weights: How much each of those rounds counts in the mean, the latest first; None: all alike.
        like: Where the news are a change, a vector like the flat one; None: they are v and what is kept of it.
    """

    def __init__(
        self,
        *,
        history: int,
        threshold: float,
        error_weight: float,
        max_skip: int,
        weights: Sequence[float] | None = None,
        like: Tensor | None,
    ) -> None:
        self.history = history
        self._weights = [1.0] * history if weights is None else [*reversed(weights)]
        self._threshold, self._error_weight, self._max_skip = threshold, error_weight, max_skip
        self._moved: deque[float] = deque(maxlen=history)
        self._last = None if like is None else Rest(like.new_zeros(like.shape))
        self._missed = 0.0
        self._skipped = 0
        self.fired: Counter[str] = Counter()

    def remember(self, square: float) -> None:
        """What all agreed on in a round."""
        self._moved.append(square)

    def decide(self, number: int, press: Press, source: Source, rest: Rest, cuts: Sequence[Cut]) -> bool:
        """Whether to send in round `number`, going by the numbers of this one."""
        reason = self._reason(number, press, source, rest, cuts)
        self.fired[reason or "skipped"] += 1
        self._skipped = 0 if reason else self._skipped + 1
        if reason and self._last is not None:
            self._last.vector.zero_()
            for cut in cuts:
                press.add(source, cut, self._last)
            self._last.vector.neg_()
        return reason is not None

    def _reason(self, number: int, press: Press, source: Source, rest: Rest, cuts: Sequence[Cut]) -> str | None:
        if number <= self.history:
            return "first"
        against = rest if self._last is None else self._last
        squares = [press.square(source, cut, against) for cut in cuts]
        news, missed = (sum(square) for square in zip(*squares, strict=True))
        weights = self._weights[-len(self._moved) :]
        mean = sum(w * moved for w, moved in zip(weights, self._moved, strict=False)) / (sum(weights) or 1.0)
        fires = news > self._threshold * mean + self._error_weight * (missed + self._missed)
        if not fires and self._skipped < self._max_skip:
            return None
        self._missed = missed
        return "trigger" if fires else "clock"

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "moved": list(self._moved),
            "last": None if self._last is None else self._last.vector.cpu().clone(),
            "missed": self._missed,
            "skipped": self._skipped,
            "fired": dict(self.fired),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._moved.clear()
        self._moved.extend(state["moved"])
        if self._last is not None:
            self._last.vector.copy_(state["last"])
        self._missed, self._skipped, self.fired = state["missed"], state["skipped"], Counter(state["fired"])
