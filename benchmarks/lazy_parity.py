"""Signs at every step against `ddp` with momentum and with Adam: 4 ranks in step, 10 paired seeds, `ddp`'s rate.

    limit      ddp: one model, the mean gradient of four batches, computed exactly
    control    periodic: one step in four is sent, at the same learning rate

What is sent is the optimizer's update, by slices or gathered, or the gradient. Seeds are shared out among the cores;
results depend on seeds alone. More variants, silence and label skew are in `lazy_accuracy`. With `--seeds N` it is
signs by slices with momentum alone, beside the control, on so many seeds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import fmean

import torch

from benchmarks.accuracy import Compared, Run, ddp
from benchmarks.lazy_accuracy import NOTES, VARIANTS, N, Setting, Signed, _parity, _row, cnn, signed
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import characters

NAMES = ("always", "always, gather", "always, stretch 1", "always, gather, stretch 1", "always, gradient", "periodic")
SAMPLES = 3200
"""Of the characters: 200 steps."""


def settings(quick: bool, seeds: int | None = None) -> list[Setting]:
    """What the table is made of."""
    if seeds is not None:
        return [Setting("digits, CNN", cnn(), range(seeds), (NAMES[0], NAMES[-1]))]
    if quick:
        return [Setting("digits, CNN", cnn(), range(2), NAMES)]
    return [
        Setting("digits, CNN", cnn(), range(10), NAMES),
        Setting("characters", characters(SAMPLES), range(10), NAMES),
    ]


def run(quick: bool, seeds: int | None = None) -> Table:
    """Both tasks, or signs by slices with momentum on so many seeds."""
    rows: list[Row] = []
    claims: list[Claim] = []
    for place, setting in enumerate(settings(quick, seeds)):
        found = _all(partial(one, quick, seeds, place), setting.seeds)
        exact = [first for first, _ in found]
        mine = {name: [signs[i] for _, signs in found] for i, name in enumerate(setting.variants)}
        rows.append(Row(f"{setting.name}: ddp", Role.LIMIT, {"loss": fmean(r.score.loss for r in exact)}))
        rows += [_row(setting, name, mine, exact) for name in setting.variants]
        for name in () if quick else [name for name in NAMES[:2] if name in setting.variants]:
            ended = [s.run for s in mine[name] if s.run is not None]
            claims.append(_parity(_called(setting, name), Compared.of(ended, exact)))
    return Table(f"Equal samples, {N} ranks in step, signs at every step", rows, claims, NOTES)


def _called(setting: Setting, name: str) -> Setting:
    """The same setting, called by its variant too."""
    return Setting(f"{setting.name}: {name}", setting.task, setting.seeds, setting.variants)


def one(quick: bool, seeds: int | None, place: int, seed: int) -> tuple[Run, list[Signed]]:
    """One seed of one setting, in a process of its own."""
    torch.set_num_threads(1)
    setting = settings(quick, seeds)[place]
    return ddp(setting.task, seed, N), [signed(setting.task, seed, VARIANTS[name]) for name in setting.variants]


def _all(work: partial[tuple[Run, list[Signed]]], seeds: Sequence[int]) -> list[tuple[Run, list[Signed]]]:
    with ProcessPoolExecutor(min(len(seeds), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(work, seeds))
