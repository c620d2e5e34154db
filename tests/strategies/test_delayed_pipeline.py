"""A pipelined run in the Trainer is the simulator's, to the bit; with one stage it is plain training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.pipeline import draws
from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Stage
from tests.strategies.piped import Piped, loader, trainer, weights
from tests.strategies.ranks import run

PLAIN = {"strategy": "auto"}


def _fit(devices: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    lit = Piped(**module)
    t = trainer(devices, knobs=knobs, **options)
    t.fit(lit, loader(), loader(20))
    return {
        "weights": weights(lit),
        "losses": lit.losses,
        "metrics": {key: float(value) for key, value in t.callback_metrics.items()},
        "step": t.global_step,
        "delays": [a.delay for a in getattr(t.strategy, "arrivals", list)()],
    }


def _simulated(stages: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same run by hand: two epochs of 8 batches, nothing drained between them."""
    lit, seed = Piped(**module), 5
    lit.log = lambda *a, **k: None  # type: ignore[method-assign]
    chains = [nn.Sequential(*(lit.net[i] for i in span)) for span in spans(even(4, stages), 4)]
    parts: list[list[nn.Module]] = [[chain] for chain in chains]
    parts[0] += [lit.embed, lit.norm]
    parts[-1].append(lit.head)
    batches = list(loader()) * 2
    every, clip = options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val")
    chosen = {k: v for k, v in knobs.items() if k in ("order", "wire", "shrink")}

    def own(stage: int) -> list[nn.Parameter]:
        return [p for part in parts[stage] for p in part.parameters()]

    def compute(stage: int, x: Tensor) -> Tensor:
        if stage == 0:
            draws.reseed(seed, number[stage], 0)
            x = lit.prepare(x)
        draws.reseed(seed, number[stage], stage + 1)
        return chains[stage](x)  # type: ignore[no-any-return]

    def update(stage: int) -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(own(stage), clip)
        optimizers[stage].step()

    number = dict.fromkeys(range(stages), 0)
    optimizers = [_only(lit.configure_optimizers(), own(s)) for s in range(stages)]
    places = [
        Stage(
            s,
            stages,
            own(s),
            buffers=[b for part in parts[s] for b in part.buffers()],
            semantics=knobs.get("semantics", "stash"),
            reseed=lambda batch, s=s: number.update({s: batch}),
        )
        for s in range(stages)
    ]
    losses = simulate(
        places,
        [lambda x, s=s: compute(s, x) for s in range(stages)],
        [x for x, _ in batches],
        lambda batch, out: (lit.head(out) - batches[batch - 1][1]).square().mean(),
        update,
        every=every,
        ends=lambda batch: ((batch - 1) % 8 + 1) % every == 0 or batch % 8 == 0,
        **chosen,
    )
    return {"weights": weights(lit), "losses": losses}


def _only(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    here = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in here]
    return optimizer


CASES: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (2, {}, {}, {}),
    (3, {}, {}, {}),
    (4, {"shrink": 0.5}, {}, {"gradient_clip_val": 0.1}),
    (3, {"order": "forward_first", "wire": "bf16"}, {"optimizer": "adam"}, {}),
    (3, {"shrink": 0.5}, {}, {"accumulate_grad_batches": 3}),
    (3, {"semantics": "hybrid"}, {"optimizer": "adam"}, {}),
]


@pytest.mark.parametrize(("devices", "knobs", "module", "options"), CASES)
def test_many_processes_are_the_simulator_to_the_bit(
    devices: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]
) -> None:
    ends = run(devices, _fit, devices, knobs, module, options)
    expected = _simulated(devices, knobs, module, options)
    assert ends[0]["losses"] == expected["losses"]
    assert ends[0]["weights"] == expected["weights"]
    for end in ends[1:]:
        assert end["weights"] == ends[0]["weights"]
        assert end["metrics"] == ends[0]["metrics"]
        assert end["step"] == ends[0]["step"] == len(expected["losses"]) - 10 * (len(options) and "acc" in str(options))
    assert ends[-1]["losses"] == []


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_stage_is_plain_training_to_the_bit(optimizer: str) -> None:
    (one,) = run(1, _fit, 1, {}, {"optimizer": optimizer}, {})
    (plain,) = run(1, _fit, 1, {}, {"optimizer": optimizer}, PLAIN)
    assert one["losses"] == plain["losses"]
    assert one["weights"] == plain["weights"]
    assert one["metrics"] == plain["metrics"]
