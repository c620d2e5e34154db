"""What shrinking by an adaptive law is worth, without tuning it: beside the best of a grid of constant factors.

    pipeline       K = 4 stages (simulated to the bit), digits, 10 paired seeds; a learning rate 3x too large, and
                   beside it the best one without shrinking, and one 10x too large
    async_global   4 ranks on the virtual cluster, one 8x slower, digits; beside its own attenuations

    limit     the loss without any delay: plain training at the best learning rate; DDP
    control   no shrinking at all

The grid of constants was looked at, the laws have their defaults. In the pipeline only the last stage has a loss: the
others know of it `LAG` batches later; how the loss bends each sees for itself. A run that diverges counts with a loss
of `WORST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.accuracy import asynchronous, ddp
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import digits
from lightning_async.algorithms.algorithm import Shrink, no_shrink
from lightning_async.algorithms.shrink import Law, LawName, Stability, law
from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Compute, Stage

K, BATCH, STEPS, WIDTH, MOMENTUM = 4, 16, 500, 64, 0.9
BEST, TIMES = 0.01, (3, 1, 10)
"""The best of 0.003, 0.01 and 0.03 for the pipeline without shrinking; how many times as large the rate is."""
LAG = 10
BETAS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1)
LAWS: tuple[LawName, ...] = ("stability", "relative")
WORST = 20.0
SLOW = [1.0, 1.0, 1.0, 8.0]
ATTENUATIONS: Mapping[str, Mapping[str, object]] = {
    "none": {"attenuation": "none"},
    "poly": {},
    "exp": {"attenuation": "exp"},
    "hinge": {"attenuation": "hinge"},
}


def run(quick: bool) -> Table:
    """Both comparisons."""
    torch.set_num_threads(1)
    seeds = range(2 if quick else 10)
    plain = [pipeline(seed, BEST, plain=True) for seed in seeds]
    rows, claims = [Row("pipeline: no delay, best rate", Role.LIMIT, _cells(plain))], []
    for found, claim in [*(_pipelines(seeds, times) for times in TIMES[: 1 if quick else None]), _servers(seeds)]:
        rows += found
        claims.append(claim)
    return Table("Adaptive shrinking, untuned, beside the best constants", rows, claims)


# -- the pipeline -----------------------------------------------------------------------------------------------------


class Shrinking(Stage):
    """A stage that asks a law in the place of a constant."""

    law: Law | None = None
    steps = 0

    def forward(self, batch: int, x: Tensor, compute: Compute, *, step: int = 0) -> Tensor:
        """Remember when it was."""
        return super().forward(batch, x, compute, step=self.steps)

    def backward(self, batch: int, gradient: Tensor, factor: float = 1.0) -> Tensor | None:
        """The delay is that of this stage; what the stage behind has shrunk already is left out."""
        delay = self.steps - self.launched(batch)
        if self.law is not None:
            factor = self.law.factor(delay, self.fresh)
            if self.delay > 2:
                factor = self.law.further(delay * (self.delay - 3) / (self.delay - 1), delay)
        return super().backward(batch, gradient, factor)

    def after_step(self) -> None:
        """One more."""
        super().after_step()
        self.steps += 1


def pipeline(seed: int, lr: float, *, beta: float = 1.0, name: LawName | None = None, plain: bool = False) -> float:
    """The loss on all training samples after the run."""
    x, y = digits().train
    torch.manual_seed(seed)
    sizes = [x.shape[1], *[WIDTH] * (K - 1), 10]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU() if b != 10 else nn.Identity()) for a, b in pairwise(sizes)]
    blocks: list[nn.Module] = [nn.Sequential(*layers)] if plain else list(layers)
    picks = torch.randint(0, len(x), (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
    optimizers = [torch.optim.SGD(block.parameters(), lr, momentum=MOMENTUM) for block in blocks]
    stages = [Shrinking(k, len(blocks), block.parameters()) for k, block in enumerate(blocks)]
    laws = [law(name) for _ in stages[:-1]] if name is not None else []
    for stage, made in zip(stages, laws, strict=False):
        stage.law = made
        if isinstance(made, Stability):
            stage.watch_curvature(partial(made.look, lr=lr, momentum=MOMENTUM))
    losses: list[float] = []

    def update(k: int) -> None:
        optimizers[k].step()
        if stages[k].last:
            optimizers[k].zero_grad()

    def loss(batch: int, out: Tensor) -> Tensor:
        found = F.cross_entropy(out, y[picks[batch - 1]])
        losses.append(float(found.detach()))
        for made in laws if len(losses) > LAG else ():
            made.observe(losses[-1 - LAG])
        return found

    inputs = [x[pick] for pick in picks]
    simulate(stages, [block.forward for block in blocks], inputs, loss, update, shrink=beta)
    with torch.no_grad():
        out = x
        for block in blocks:
            out = block(out)
        value = float(F.cross_entropy(out, y))
    return min(WORST, value) if math.isfinite(value) else WORST


def _pipelines(seeds: Sequence[int], times: int) -> tuple[list[Row], Claim]:
    lr, name = times * BEST, f"pipeline, {times}x"
    constants = {beta: [pipeline(seed, lr, beta=beta) for seed in seeds] for beta in BETAS}
    laws = {law: [pipeline(seed, lr, name=law) for seed in seeds] for law in LAWS}
    best = min(constants, key=lambda beta: fmean(constants[beta]))
    rows = [Row(f"{name}: not shrunk", Role.CONTROL, _cells(constants[1.0]))]
    rows += [Row(f"{name}: beta {b}", Role.OTHER, _cells(found)) for b, found in constants.items() if b != 1.0]
    rows += [Row(f"{name}: {law}", Role.RESULT, _cells(found, constants[best])) for law, found in laws.items()]
    ahead = fmean(laws["stability"]) - fmean(constants[best])
    sentence = f"{name}: `stability` ends at least as low as the best constant (beta {best}): {ahead:+.3f}"
    return rows, Claim(sentence, ahead <= 0)


# -- async_global -----------------------------------------------------------------------------------------------------


def shrink_by(name: LawName, n: int) -> Callable[[], Shrink]:
    """Makes what one member asks: a law for each peer, of the excess over a healthy run's delay."""

    def make() -> Shrink:
        laws: dict[int, Law] = {}

        def factor(arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
            return laws.setdefault(arrival.peer, law(name)).factor(max(0, arrival.delay - (n - 1)), fresh)

        return factor

    return make


def _servers(seeds: Sequence[int]) -> tuple[list[Row], Claim]:
    task = digits()
    fixed = {name: [_global(seed, knobs) for seed in seeds] for name, knobs in ATTENUATIONS.items()}
    found = [_global(seed, {"attenuation": "none"}, shrink_by("relative", len(SLOW))) for seed in seeds]
    best = min(fixed, key=lambda name: fmean(fixed[name]))
    rows = [Row("async_global: ddp", Role.LIMIT, _cells([ddp(task, seed).score.loss for seed in seeds]))]
    rows += [
        Row(f"async_global: attenuation {name}", Role.CONTROL if name == "none" else Role.OTHER, _cells(losses))
        for name, losses in fixed.items()
    ]
    rows.append(Row("async_global: relative", Role.RESULT, _cells(found, fixed[best])))
    behind = [mine - theirs for mine, theirs in zip(found, fixed[best], strict=True)]
    noise = 1.96 * stdev(behind) / math.sqrt(len(behind))
    sentence = f"async_global: `relative` is no worse than {best!r}: {fmean(behind):+.4f} (95 %: +-{noise:.4f})"
    return rows, Claim(sentence, fmean(behind) - noise <= 0)


def _global(seed: int, knobs: Mapping[str, object], shrink: Callable[[], Shrink] = lambda: no_shrink) -> float:
    return asynchronous(digits(), seed, {"strategy": "async_global", **knobs}, SLOW, shrink=shrink).score.loss


def _cells(losses: Sequence[float], beside: Sequence[float] = ()) -> dict[str, Cell]:
    paired = [a - b for a, b in zip(losses, beside, strict=True)] if beside else []
    better = f"{sum(d <= 0 for d in paired)} of {len(paired)}" if paired else None
    return {"loss": fmean(losses), "worst": max(losses), "seeds at least as good": better}
