"""Why AdamW's steps are stretched: its second moment on one rank of four, and what that costs at equal samples.

    ddp         one model, the mean gradient of four batches
    noisy ddp   the same, but the second moment sees single ranks' gradients: the cause, without any asynchrony
    none        the control: `pairwise` without the correction; "x 1.5": with a longer learning rate in its place
    m^2         the correction with m^2 in the place of its slow mean, which saves a buffer
    shipped     `pairwise` as users run it

Characters, one rank 4x slow, paired seeds, as in `accuracy`; virtual time, so the machine's speed does not matter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.accuracy import NOTES, Compared, Run, asynchronous, ddp, deal, factors
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import Task, characters
from lightning_async.algorithms.adam import SecondMoment

N = 4
LONGER = 1.5
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01
"""AdamW's defaults in torch."""


class Left(SecondMoment):
    """No correction."""

    def stretch(self, n: int) -> None:
        """Leave the step as it is."""


class Square(SecondMoment):
    """No buffer: m^2 itself is taken for its mean."""

    def _mean_square(self, parameter: Tensor, m: Tensor, beta2: float) -> Tensor:
        return m * m


def run(quick: bool) -> Table:
    """All variants, seed by seed."""
    torch.set_num_threads(1)
    task, seeds = characters(800 if quick else 6400), range(2 if quick else 6)
    runs: dict[str, list[Run]] = {name: [] for name in variants(task)}
    for seed in seeds:
        print(f"  seed {seed}", file=sys.stderr, flush=True)
        for name, one in variants(task).items():
            runs[name].append(one(seed))
    return Table(f"AdamW at equal samples, {N} ranks, one 4x slow", _rows(runs), _claims(runs, quick), NOTES[:1])


def variants(task: Task) -> Mapping[str, Callable[[int], Run]]:
    """What is compared, by name: each makes a run of a seed."""
    slow, pairwise = factors(N, 4.0), {"mode": "pairwise"}
    longer = replace(task, lr=LONGER * task.lr)
    return {
        "ddp": lambda seed: ddp(task, seed, N),
        "noisy ddp": lambda seed: handwritten(task, seed, N, noisy=True),
        "none": lambda seed: asynchronous(task, seed, pairwise, slow, moment=Left),
        f"none, learning rate x {LONGER}": lambda seed: asynchronous(longer, seed, pairwise, slow, moment=Left),
        "m^2": lambda seed: asynchronous(task, seed, pairwise, slow, moment=Square),
        "shipped": lambda seed: asynchronous(task, seed, pairwise, slow),
    }


def handwritten(task: Task, seed: int, n: int = N, *, noisy: bool) -> Run:
    """`ddp` with an AdamW of a few lines, whose second moment sees the mean gradient, or each of the `n`."""
    model = task.model(seed)
    weights = list(model.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for k, batches in enumerate(zip(*deal(task.batches(seed, n), [1.0] * n, seed).batches, strict=True), 1):
        own = [torch.autograd.grad(task.loss(model, batch), weights) for batch in batches]
        for w, m, v, *gradients in zip(weights, first, second, *own, strict=True):
            g = torch.stack(gradients).mean(0)
            square = torch.stack(gradients).square().mean(0) if noisy else g.square()
            _step(w, m.lerp_(g, 1 - BETAS[0]), v.lerp_(square, 1 - BETAS[1]), k, task.lr)
    return Run(task.score(model))


@torch.no_grad()
def _step(w: Tensor, m: Tensor, v: Tensor, k: int, lr: float) -> None:
    root = (v / (1 - BETAS[1] ** k)).sqrt_().add_(EPS)
    w.mul_(1 - lr * DECAY).addcdiv_(m / (1 - BETAS[0] ** k), root, value=-lr)


ROLES = {"ddp": Role.LIMIT, "none": Role.CONTROL, "shipped": Role.RESULT}


def _rows(runs: Mapping[str, list[Run]]) -> list[Row]:
    rows = []
    for name, found in runs.items():
        losses = [run.score.loss for run in found]
        cells: dict[str, float | str] = {"loss": sum(losses) / len(losses)}
        if name != "ddp":
            cells["loss %"] = str(Compared.of(found, runs["ddp"]).loss)
        rows.append(Row(name, ROLES.get(name, Role.OTHER), cells))
    return rows


def _claims(runs: Mapping[str, list[Run]], quick: bool) -> list[Claim]:
    if quick:
        return []
    others = [name for name in runs if name not in ("ddp", "noisy ddp", "shipped")]
    gains = {name: Compared.of(runs["shipped"], runs[name]).loss for name in others}
    return [Claim(f"shipped has a lower loss than {name!r}: {gain} %", gain.high < 0) for name, gain in gains.items()]
