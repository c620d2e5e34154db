"""All ranks of EF-/LE-SIGNGD in a few arrays, written from the equations: the academic twin of `LazySign`.

One tensor of d numbers, d a multiple of n * block, so that slices are equal and blocks do not straddle them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_async.algorithms.signs import STRETCH

Array = NDArray[np.float64]


class Twin:
    """n ranks at once; `step` takes what each rank wants to send (n x d) and answers what all agree on (d)."""

    def __init__(
        self,
        n: int,
        d: int,
        *,
        rule: str,
        block: int,
        slices: bool,
        history: int = 10,
        threshold: float = 0.8,
        max_skip: int = 7,
        ahead: int = 1,
        news: str = "change",
        stretch: float | None = None,
        history_weights: list[float] | None = None,
        error_weight: float = 0.0,
    ) -> None:
        self.weights, self.error_weight = history_weights or [1.0] * history, error_weight  # of lag 1, 2, ...
        self.missed = np.zeros(n)
        self.stretch = stretch or (1.0 if rule == "innovation" else STRETCH)
        self.n, self.d, self.rule, self.block, self.slices = n, d, rule, block, slices
        self.history, self.threshold, self.max_skip, self.ahead, self.news = history, threshold, max_skip, ahead, news
        self.rest, self.server = np.zeros((n, d)), np.zeros(d)  # `innovation`: rest is G, what all have of each rank
        self.last, self.applied, self.common = np.zeros((n, d)), np.zeros(d), np.zeros(d)
        self.reference, self.skipped = np.zeros((n, d)), np.zeros(n, dtype=int)
        self.moved: list[float] = []
        self.planned: dict[int, NDArray[np.bool_]] = {}
        self.k = 0
        self.sent: list[NDArray[np.bool_]] = []

    def compress(self, p: Array) -> Array:
        blocks = p.reshape(-1, self.block)
        scale = self.stretch * np.abs(blocks).mean(1, keepdims=True)
        return (scale * np.where(blocks >= 0, 1.0, -1.0)).reshape(p.shape)

    def step(self, v: Array) -> Array:
        self.k += 1
        if self.ahead == 0:
            self.plan(v, self.k)
        fires = self.fires(self.k)
        self.sent.append(fires)
        sheets = np.zeros((self.n, self.d))
        for m in range(self.n):
            if fires[m] and self.rule == "innovation":
                sheets[m] = self.compress(v[m] - self.rest[m])
                self.rest[m] += sheets[m]
            elif fires[m]:
                p = v[m] + self.rest[m]
                sheets[m] = self.last[m] = self.compress(p)
                self.rest[m] = p - sheets[m]
            elif self.rule in ("accumulate", "periodic"):
                self.rest[m] += v[m]
        if self.ahead:
            self.plan(v, self.k + self.ahead)
        return self.agree(sheets, bool(fires.any()))

    def agree(self, sheets: Array, any_sent: bool) -> Array:
        mean = (self.last if self.rule == "paper" else sheets).mean(0)
        if any_sent:
            p = mean + self.server
            agreed = self.compress(p) if self.slices else mean
            self.server = p - agreed
            self.applied = agreed
        elif self.rule == "paper":
            agreed = self.applied if self.slices else mean
            self.server += mean - agreed
        else:
            agreed = np.zeros(self.d)
        if self.rule == "innovation":
            self.common = self.common + agreed
            agreed = self.common
        self.moved = [*self.moved, float(agreed @ agreed)][-self.history :]
        return agreed

    def fires(self, k: int) -> NDArray[np.bool_]:
        if self.rule == "always" or (self.lazy and k <= max(self.history, self.ahead)):
            return np.ones(self.n, dtype=bool)
        if self.rule == "periodic":
            return np.full(self.n, k % (self.max_skip + 1) == 0)
        return self.planned.pop(k)

    @property
    def lazy(self) -> bool:
        return self.rule not in ("always", "periodic")

    def plan(self, v: Array, k: int) -> None:
        if not self.lazy or k <= max(self.history, self.ahead):
            return
        lags = [*zip(self.weights, reversed(self.moved), strict=False)]
        bar = self.threshold * sum(xi * moved for xi, moved in lags) / sum(xi for xi, _ in lags)
        planned = np.zeros(self.n, dtype=bool)
        for m in range(self.n):
            if self.rule == "innovation":
                news = v[m] - self.rest[m]
            elif self.news == "backlog":
                news = v[m] + self.rest[m]
            else:
                news = v[m] - self.reference[m]
            left = news - self.compress(news)
            error = self.error_weight * (left @ left + self.missed[m])
            planned[m] = bool(news @ news > bar + error) or self.skipped[m] >= self.max_skip
            self.skipped[m] = 0 if planned[m] else self.skipped[m] + 1
            if planned[m]:
                self.reference[m], self.missed[m] = v[m], left @ left
        self.planned[k] = planned


def train(twin: Twin, gradient: Callable[[int, int, Array], Array], theta: Array, lrs: list[float]) -> list[Array]:
    """The weights after each step of exact arithmetic on `gradient(rank, step, weights)`; updates are exchanged."""
    path = []
    for k, lr in enumerate(lrs, start=1):
        updates = np.stack([-lr * gradient(m, k, theta) for m in range(twin.n)])
        theta = theta + twin.step(updates)
        path.append(theta)
    return path
