"""The hook for plain ddp: what it sends and what stays add up to the gradients, and all ranks get the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_async.callbacks import SignGradients
from lightning_async.hooks import SignState, sign_hook
from tests.strategies.lit import ByHand, Lit, loader, trainer, weights
from tests.strategies.ranks import run

KNOBS: dict[str, Any] = {"block": 32, "min_size": 20}


class Noted(SignState):
    """Knows where in a bucket each parameter lies."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        self.places: dict[int, list[tuple[nn.Parameter, int]]] = {}

    def bucket(self, bucket: Any) -> Any:
        first = bucket.buffer().storage_offset()
        starts = [int(gradient.storage_offset() - first) for gradient in bucket.gradients()]
        self.places[bucket.index()] = list(zip(bucket.parameters(), starts, strict=True))
        return super().bucket(bucket)

    def held(self, parameters: list[nn.Parameter]) -> tuple[list[float], list[float]]:
        """What is held back of each number of these parameters, in their order, here and at this rank's server."""
        found: dict[int, torch.Tensor] = {}
        for i, rests in self.state_dict()["rests"].items():
            served = torch.zeros_like(rests["rest"])
            base = self._buckets[i]._served.base
            served[base : base + rests["served"].numel()] = rests["served"]
            for p, at in self.places[i]:
                found[id(p)] = torch.stack([rests["rest"], served])[:, at : at + p.numel()]
        here, there = torch.cat([found[id(p)] for p in parameters], 1).tolist()
        return here, there


def _steps(rank_steps: int, bad: int, anew: int = -1, **knobs: Any) -> dict[str, Any]:
    """Each step's agreed gradients, and the gradients that they stand for; perhaps another ddp goes on at a step."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 7), nn.Linear(7, 1))
    alone = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 7), nn.Linear(7, 1))
    alone.load_state_dict(net.state_dict())
    state = Noted(**{**KNOBS, **knobs})
    model = DistributedDataParallel(net, bucket_cap_mb=0.001)
    model.register_comm_hook(state, sign_hook)
    draw = torch.Generator().manual_seed(dist.get_rank())
    agreed, own = [], []
    for k in range(rank_steps):
        if k == anew:
            saved, state = state.state_dict(), Noted(**{**KNOBS, **knobs})
            state.load_state_dict(saved)
            net = copy.deepcopy(alone)
            model = DistributedDataParallel(net, bucket_cap_mb=0.001)
            model.register_comm_hook(state, sign_hook)
        x = torch.randn(16, 12, generator=draw)
        if k == bad and dist.get_rank() == 1:
            x[3] = float("nan")
        for module, grads in ((model, agreed), (alone, own)):
            module.zero_grad()
            torch.autograd.backward(module(x).square().mean())
            parameters = net.parameters() if module is model else alone.parameters()
            grads.append([float(g) for p in parameters if p.grad is not None for g in p.grad.flatten()])
    rest, served = state.held(list(net.parameters()))
    return {"agreed": agreed, "own": own, "rest": rest, "served": served, "buckets": len(state._buckets)}


@pytest.mark.parametrize(("n", "anew"), [(2, -1), (3, -1), (2, 8)])
def test_what_was_agreed_and_what_stays_is_the_sum_of_all_gradients(n: int, anew: int) -> None:
    """Of each number. Also where a run was saved and goes on, with buckets that its ddp makes anew after a step."""
    ends = run(n, _steps, 12, -1, anew)
    assert ends[0]["buckets"] > 1
    for end in ends[1:]:
        assert end["agreed"] == ends[0]["agreed"]
    exact = sum(torch.tensor(end["own"]) for end in ends) / n
    assert isinstance(exact, torch.Tensor)
    agreed = torch.tensor(ends[0]["agreed"])
    torch.testing.assert_close(agreed[:2], exact[:2], rtol=1e-5, atol=1e-6)  # the first travel whole
    assert not torch.allclose(agreed[5], exact[5], rtol=1e-2, atol=1e-3)
    held = sum(torch.tensor(end["rest"]) / n + torch.tensor(end["served"]) for end in ends)
    assert bool(torch.as_tensor(held).any())
    torch.testing.assert_close(agreed.sum(0) + held, exact.sum(0), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_reaches_all_ranks_and_is_not_fed_back() -> None:
    ends = run(2, _steps, 8, 4)
    for end in ends:
        steps = torch.tensor(end["agreed"])
        assert steps[4].isnan().any()
        assert steps[[3, 5, 6, 7]].isfinite().all()


def _goes_on_from(kinds: list[dict[str, Any]]) -> list[str]:
    """What is said where hooks of these kinds go on, each from the state of the one before."""
    dist.init_process_group("gloo")
    net, saved, said = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 7)), {"step": 0, "rests": {}}, []
    for kind in kinds:
        model, state = DistributedDataParallel(net), SignState(**{**KNOBS, **kind})
        state.load_state_dict(saved)
        model.register_comm_hook(state, sign_hook)
        try:
            for _ in range(4):
                torch.autograd.backward(model(torch.ones(4, 12)).square().mean())
        except ValueError as error:
            said.append(str(error))
        else:
            saved = state.state_dict()
    return said


def test_a_state_of_other_buckets_is_refused_in_words() -> None:
    assert run(1, _goes_on_from, [{}, {}, {"min_size": 50}]) == [
        [
            "what is held back is of other buckets: go on with the model, number of ranks, `bucket_cap_mb`, `block` "
            "and `min_size` that were saved, or without this state"
        ]
    ]


def _fit(signs: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    lit = Lit()
    lit.layer = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    callbacks = [SignGradients(**KNOBS)] if signs else []
    t = trainer(2, strategy="ddp", callbacks=callbacks, max_epochs=4)
    t.fit(lit, loader(), loader(40, shuffle=False))
    return {"weights": weights(lit), "val": float(t.callback_metrics["val"])}


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")
@pytest.mark.few(0)
def test_ddp_with_the_callback_learns_what_ddp_learns() -> None:
    signs, plain = run(2, _fit, True), run(2, _fit, False)
    assert signs[0] == signs[1]
    assert signs[0]["weights"] != plain[0]["weights"]
    assert signs[0]["val"] < 1.5 * plain[0]["val"]


def test_the_callback_needs_ddp() -> None:
    with pytest.raises(MisconfigurationException, match="`SignGradients` needs strategy='ddp'"):
        trainer(1, strategy="auto", callbacks=[SignGradients()]).fit(Lit(), loader(), loader(40, shuffle=False))


class Twice(ByHand):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.layer[0].parameters(), 0.1), torch.optim.SGD(self.layer[1:].parameters(), 0.1)]


def _refused() -> list[str]:
    said = []
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    for module, options in ((Lit(), {"plugins": [scaled]}), (Twice(), {})):
        try:
            trainer(1, strategy="ddp", callbacks=[SignGradients()], **options).fit(
                module, loader(), loader(40, shuffle=False)
            )
        except MisconfigurationException as error:
            said.append(str(error))
    return said


def test_what_is_held_back_needs_one_optimizer_and_gradients_in_units_that_last() -> None:
    """A scaler changes the units and drops steps; of two optimizers one drops what the other's backward was sent."""
    ((scaled, two),) = run(1, _refused)
    assert "`SignGradients`: with precision='16-mixed' gradients are scaled, and infinite now and then" in scaled
    assert "use strategy='lazy_sign', which sends the signs of updates, or precision='bf16-mixed'" in scaled
    assert "`SignGradients` goes by one optimizer, and there are 2; use strategy='lazy_sign'" in two


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"block": 12}, "`block` must be a multiple of 8, got 12"),
        ({"min_size": -1}, "`min_size` must be an integer of at least 0, got -1"),
        ({"first": 1}, "`first` must be an integer of at least 2"),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SignGradients(**knobs)
