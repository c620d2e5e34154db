"""What is held back stays within its bound, and what travels is a bit a number, a scale a block, a word a round."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lightning_async.algorithms.sign_exchange import MEAN, PART
from lightning_async.algorithms.sign_notices import NOTICE
from lightning_async.transport.mail import Carrier, Message
from tests.algorithms.sign_world import LIVES, Member, members, quadratic

N, D, BLOCK, STEPS, LR = 3, 96, 16, 60, 0.1
KNOBS: dict[str, Any] = {"block": BLOCK, "min_size": 0, "history": 5, "max_skip": 3}


@pytest.mark.few(3)
@pytest.mark.parametrize("carrier", LIVES)
@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
def test_what_is_held_back_stays_within_its_bound(noise: float, carrier: str) -> None:
    """Karimireddy et al. (2019): |e|^2 <= 4 (1 - delta) / delta^2 lr^2 max |g|^2 where each packing keeps delta."""
    some = members(N, [(D,)], form="gather", **KNOBS)
    start, (gradient, _) = some[0].flat(), quadratic(N, D, noise=noise)
    LIVES[carrier](some, gradient, steps=STEPS, lr=lambda k: LR)
    for m in some:
        befores = [start, *m.weights]
        gradients = [gradient(m.rank, k, befores[k - 1]) for k in range(1, STEPS + 1)]
        held = [rest[:D] for rest in m.rests]
        packed = [-LR * g + e for g, e in zip(gradients, [0.0 * start, *held], strict=False)]
        missed = [float(e.square().sum() / p.square().sum()) for e, p in zip(held, packed, strict=True)]
        delta = 1 - max(missed)
        assert delta > 0
        bound = 4 * (1 - delta) / delta**2 * LR**2 * max(float(g.square().sum()) for g in gradients)
        assert max(float(e.square().sum()) for e in held) <= bound


class Counting:
    """A carrier that counts what is taken, by kind."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.messages: Counter[int] = Counter()
        self.nbytes: Counter[int] = Counter()
        self.rounds: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def post(self, peer: int, message: Message) -> bool:
        taken = self._carrier.post(peer, message)
        if taken:
            kind = NOTICE if message.kind >= NOTICE else message.kind
            self.messages[kind] += 1
            self.nbytes[kind] += 0 if message.body is None else message.body.numel() * message.body.element_size()
            self.rounds |= {message.version} if kind == PART else set()
        return taken


def sheet(numbers: int) -> int:
    """A bit a number, and a scale of float64 a block."""
    return numbers // 8 + 8 * (numbers // BLOCK)


@pytest.mark.few(3)
@pytest.mark.parametrize("carrier", LIVES)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("rule", ["always", "accumulate", "periodic", "paper", "innovation"])
def test_every_byte_is_a_sign_or_a_scale(rule: str, form: str, carrier: str) -> None:
    some: list[Member] = members(N, [(D,)], rule=rule, form=form, threshold=0.6, **KNOBS)
    posts: list[Counting] = []

    def counting(one: Carrier) -> Counting:
        posts.append(Counting(one))
        return posts[-1]

    gradient, _ = quadratic(N, D, noise=0.3)
    steps = STEPS if carrier == "virtual" else 15
    LIVES[carrier](some, gradient, seen=counting, steps=steps, lr=lambda k: LR)
    rounds = len(set().union(*(c.rounds for c in posts)))
    for m, counted in zip(some, posts, strict=True):
        uploads = steps - m.algorithm.skipped
        one = sheet(D // N if form == "slices" else D)
        assert counted.nbytes[PART] == uploads * (N - 1) * one
        assert counted.nbytes[MEAN] == (rounds * (N - 1) * one if form == "slices" else 0)
        decided = sum(m.algorithm.trigger.fired.values())
        assert counted.messages[NOTICE] == decided * (N - 1)
        assert counted.nbytes[NOTICE] == 0
        assert sum(counted.nbytes.values()) == counted.nbytes[PART] + counted.nbytes[MEAN]
    assert (rule == "always") == (rounds == steps and not any(m.algorithm.skipped for m in some))
