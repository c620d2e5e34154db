"""The server's optimizer: a shard alone moves as in the whole, and its state is what the rule says it remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.server_groups import Groups, MakeOptimizer, check_elementwise, numbers
from lightning_async.algorithms.server_step import ServerStep

GRADIENTS = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
GOOD: dict[str, MakeOptimizer] = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, 0.01),
}


def start() -> Tensor:
    return torch.linspace(-1, 1, 64)


def rule(make: MakeOptimizer, weights: Tensor, begin: int = 0) -> ServerStep:
    whole = nn.Parameter(start())
    return ServerStep(weights, Groups(make([whole]), [(whole, 0)]), begin)


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_alone_it_is_the_optimizer_to_the_bit(make: MakeOptimizer) -> None:
    twin, weights = nn.Parameter(start()), start()
    theirs, mine = make([twin]), rule(make, weights)
    for gradient in GRADIENTS:
        twin.grad = gradient.clone()
        theirs.step()
        mine.arrive(weights, gradient, 1.0, 1)
        assert torch.equal(weights, twin)


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_two_halves_move_as_the_whole(make: MakeOptimizer) -> None:
    whole, halves = start(), [start()[:32].clone(), start()[32:].clone()]
    rules = [rule(make, whole), rule(make, halves[0]), rule(make, halves[1], 32)]
    for gradient in GRADIENTS:
        for one, weights, part in zip(rules, (whole, *halves), (gradient, *gradient.split(32)), strict=True):
            one.arrive(weights, part, 0.25, 4)
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_an_heir_with_its_tensors_and_count_goes_on_to_the_bit(make: MakeOptimizer) -> None:
    weights = start()
    old = rule(make, weights)
    for gradient in GRADIENTS[:5]:
        old.arrive(weights, gradient, 0.5, 2)
    heirs = weights.clone()
    heir = rule(make, heirs)
    heir.count = old.count
    for mine, theirs in zip(heir.tensors, old.tensors, strict=True):
        mine.copy_(theirs)
    for gradient in GRADIENTS[5:]:
        old.arrive(weights, gradient, 0.5, 2)
        heir.arrive(heirs, gradient, 0.5, 2)
    assert torch.equal(weights, heirs)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_what_a_forward_pass_in_another_thread_computes_with_changes_nothing(
    make: MakeOptimizer, default: torch.dtype
) -> None:
    """Lightning's "bf16-true" sets torch's default dtype in it, for all threads."""
    plain, beside = start(), start()
    mine, other = rule(make, plain), rule(make, beside)
    for i, gradient in enumerate(GRADIENTS):
        share = 0.3 if i % 2 else 0.7
        mine.arrive(plain, gradient, 0.5, 2, share=share)
        torch.set_default_dtype(default if i % 3 else torch.float32)
        try:
            other.arrive(beside, gradient, 0.5, 2, share=share)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(plain, beside)


def test_each_group_has_its_own_numbers_and_what_is_in_none_stays() -> None:
    parts = [nn.Parameter(start()[16 * i : 16 * i + 16].clone()) for i in range(4)]
    groups = [{"params": [parts[0], parts[2]], "weight_decay": 0.5}, {"params": [parts[1]], "lr": 0.01}]
    theirs, weights = optim.AdamW(groups, 0.1), start()
    known = Groups(theirs, [(p, 16 * i) for i, p in enumerate(parts)])
    rules = [ServerStep(weights[:24], known), ServerStep(weights[24:], known, 24)]
    for k, gradient in enumerate(GRADIENTS):
        theirs.param_groups[1]["lr"] = 0.01 * (k + 1)
        known.hear(numbers(theirs))
        for p, part in zip(parts[:3], gradient.split(16), strict=False):
            p.grad = part.clone()
        theirs.step()
        for one, part in zip(rules, (weights[:24], weights[24:]), strict=True):
            one.arrive(part, gradient[:24] if one is rules[0] else gradient[24:], 1.0, 1)
        assert torch.equal(weights, torch.cat([p.detach() for p in parts]))
    assert torch.equal(weights[48:], start()[48:])


class ByNorm(optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        return super().step(closure)


BAD: list[tuple[MakeOptimizer, str]] = [
    (lambda p: ByNorm(p, 0.1), "ByNorm moves two halves in another way than the whole"),
    (lambda p: optim.Adafactor(p), "Adafactor moves two halves"),
    (lambda p: optim.Muon(p), "Muon cannot"),
    (lambda p: optim.LBFGS(p), "LBFGS cannot"),
    (lambda p: optim.RMSprop(p), "knows how to spread a step of SGD, Adam or AdamW over the members' pushes, got RMS"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD)
def test_what_cannot_serve_is_refused_with_a_sentence(make: MakeOptimizer, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_elementwise(make([nn.Parameter(torch.zeros(4, 4))]))


LIMITS = {  # momentum: of the learning rate times the curvature; in step, n - 1 pushes late, and 2 (n - 1); 4 ranks
    0.0: (2.0, 1.78, 0.96),
    0.9: (3.8, 0.135, 0.068),
}


def grows(momentum: float, rate: float, n: int, late: int) -> bool:
    """Whether a parabola of curvature 1 is left for good, by gradients of so many versions before."""
    whole = nn.Parameter(torch.ones(1, dtype=torch.float64))
    weights = whole.detach().clone()
    server = ServerStep(weights, Groups(optim.SGD([whole], rate, momentum=momentum), [(whole, 0)]))
    seen = [weights.clone()] * (late + 1)
    heights = []
    for _ in range(1500):
        server.arrive(weights, seen[-1 - late], 1 / n, n)
        seen = [*seen[-late:], weights.clone()] if late else [weights.clone()]
        heights.append(abs(float(weights)))
        if heights[-1] > 1e3:
            return True
    return max(heights[-300:]) > max(heights[300:600])


@pytest.mark.few(2)
@pytest.mark.parametrize("late", [0, 3, 6])
@pytest.mark.parametrize("momentum", LIMITS)
def test_late_gradients_bear_smaller_rates_and_far_smaller_ones_under_momentum(momentum: float, late: int) -> None:
    limit, n = LIMITS[momentum][late // 3], 4 if late else 1
    assert not grows(momentum, 0.97 * limit, n, late)
    assert grows(momentum, 1.03 * limit, n, late)
