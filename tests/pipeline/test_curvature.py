"""On a parabola the curvature is that of the parabola, whatever the noise of single gradients and the shrink."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_async.fresh import nothing_fresh
from lightning_async.pipeline.curvature import SEEN, Curvature
from lightning_async.pipeline.stage import Stage

BENDS = torch.tensor([3.0, 1.0])


class Descent:
    """Late gradients of a parabola, w -> bends x w^2 / 2 in each direction, through a stage."""

    def __init__(self, stages: int, *, noise: float = 0.0, every: int = 1, factor: float = 1.0) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.stage = Stage(0, stages, [self.weight])
        self.turned = self.went = 0.0
        self.told: list[tuple[float, float]] = []
        assert self.stage.watch_curvature(lambda turned, went: self.told.append((turned, went)))
        self._noise, self._every, self._factor = noise, every, factor
        self._random = torch.Generator().manual_seed(4)
        self._at: dict[int, torch.Tensor] = {}

    def go(self, batches: range, lr: float) -> None:
        for batch in batches:
            if batch > self.stage.delay:
                self._back(batch - self.stage.delay, lr)
            self._at[batch] = self.weight.detach().clone()
            self.stage.forward(batch, torch.ones(2), lambda x: x * self.weight)

    def _back(self, batch: int, lr: float) -> None:
        noise = self._noise * torch.randn(2, generator=self._random)
        self.stage.backward(batch, (BENDS * self._at.pop(batch) + noise) / self._every, self._factor)
        if batch % self._every == 0:
            self.stage.before_step()
            with torch.no_grad():
                self.weight -= lr * self.weight.grad  # type: ignore[operator]
            self.stage.after_step()

    @property
    def curvature(self) -> float:
        return sum(turned for turned, _ in self.told) / sum(went for _, went in self.told)


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_without_noise_it_is_between_the_smallest_and_the_largest(stages: int, factor: float) -> None:
    descent = Descent(stages, factor=factor)
    descent.go(range(1, 60), 0.05)
    found = [turned / went for turned, went in descent.told if went > 0]
    assert len(found) > 40
    assert all(BENDS.min() - 1e-3 <= one <= BENDS.max() + 1e-3 for one in found)


@pytest.mark.parametrize("stages", [2, 4])
def test_a_run_that_swings_sees_the_steepest(stages: int) -> None:
    descent = Descent(stages)
    descent.go(range(1, 80), 0.4)
    turned, went = descent.told[-1]
    assert turned / went == pytest.approx(float(BENDS.max()), rel=1e-3)


@pytest.mark.parametrize(("stages", "every"), [(2, 1), (4, 1), (3, 3)])
def test_noise_is_gone_in_the_mean(stages: int, every: int) -> None:
    """Gradients of a weight that is at rest are nothing but noise, and follow no way; accumulated ones are parts."""
    descent = Descent(stages, noise=1.0, every=every)
    descent.go(range(1, 1500), 0.08)
    assert 1.2 < every * descent.curvature < 3.2


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_late_gradients_agree_with_fresh_ones_as_the_weights_of_both_do(stages: int, factor: float) -> None:
    """Each late gradient with that of the weights right before it was applied, one update before it came."""
    for lr in (0.01, 0.4):
        descent, places, found = Descent(stages, factor=factor), list[torch.Tensor](), list[float]()
        assert descent.stage.fresh() is None
        for batch in range(1, 40):
            descent.go(range(batch, batch + 1), lr)
            places.append(BENDS * descent._at[batch])
            if batch > 2 * descent.stage.delay:
                late, fresh = places[-2 * descent.stage.delay], places[-descent.stage.delay - 1]
                known = descent.stage.fresh()
                assert known == pytest.approx(float(torch.cosine_similarity(late, fresh, 0)), abs=1e-4)
                found.append(known)
        if factor == 1:
            assert min(found) > 0.9 if lr == 0.01 else min(found) < 0


def test_who_asks_late_is_told_of_what_went_forward_afterwards() -> None:
    descent = Descent(3)
    descent.stage._curvature = None
    descent.go(range(1, 6), 0.05)
    assert descent.stage.fresh() is None
    descent.go(range(6, 13), 0.05)
    assert descent.stage.fresh() is None
    descent.go(range(13, 14), 0.05)
    assert descent.stage.fresh() == pytest.approx(1, abs=0.3)


def test_behind_a_drain_nothing_is_compared_with_before() -> None:
    descent = Descent(3)
    descent.go(range(1, 20), 0.05)
    known = len(descent.told)
    for batch in range(16, 20):
        descent._back(batch, 0.05)
    descent.stage.drained()
    known = len(descent.told)
    first = 20 + descent.stage.delay
    for batch in range(20, first + 2):
        if batch >= first:
            descent._back(batch - descent.stage.delay, 0.05)
        descent._at[batch] = descent.weight.detach().clone()
        descent.stage.forward(batch, torch.ones(2), lambda x: x * descent.weight)
    assert len(descent.told) == known


def test_the_last_stage_and_other_semantics_do_not_show_it() -> None:
    assert not Stage(1, 2, []).watch_curvature(lambda turned, went: None)
    assert not Stage(0, 2, [], semantics="recompute").watch_curvature(lambda turned, went: None)
    assert Stage(1, 2, []).fresh is Stage(0, 2, [], semantics="recompute").fresh is nothing_fresh


def test_of_many_weights_some_are_looked_at_and_none_is_changed() -> None:
    weights = [torch.randn(SEEN), torch.randn(3, SEEN), torch.randn(7)]
    before = [w.clone() for w in weights]
    watched = Curvature(weights, 1, lambda turned, went: None)
    some = watched.look([None, weights[1], None])
    assert SEEN // 2 < len(some) <= SEEN + len(weights)
    assert int((some != 0).sum()) == len(weights[1].reshape(-1)[::5])
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
