"""The networks of several seeds go through a block at once, and each is what it would be alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.pipeline_learning import Arm, train, within
from benchmarks.pipeline_nets import Draws, Job, convolutional, deep, transformer

PICTURES = torch.linspace(-1, 1, 24 * 64).view(24, 64).sin(), torch.arange(24) % 10
TEXT = (torch.arange(24 * 8) % 7).view(24, 8), (torch.arange(24 * 8) % 5).view(24, 8)
JOBS = [
    Job("convolutional", PICTURES, PICTURES, lambda draws: convolutional(draws, 2), 0.01, 1e-3, passes=1, batch=12),
    Job("transformer", TEXT, TEXT, lambda draws: transformer(draws, 8), 0.01, 1e-3, passes=1, batch=12),
    Job("deep", PICTURES, PICTURES, lambda draws: deep(draws, 3, 8), 0.01, 1e-3, passes=1, batch=12),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_network_among_others_is_the_network_alone(job: Job) -> None:
    arm = Arm("SGD", job.sgd, stages=2, beta=0.5, every=2, predict=True)
    among, alone = train(job, range(3), arm)[1], train(job, range(1, 2), arm)[0]
    assert among.loss == pytest.approx(alone.loss, abs=1e-5)


def test_seeds_differ() -> None:
    one, other = train(JOBS[2], range(2), Arm("SGD", 0.01))
    assert one.loss != other.loss
    assert not torch.equal(*Draws(range(2)).orders(24, 1))


def test_what_is_frozen_stays_and_the_rest_learns() -> None:
    still = replace(JOBS[2], sgd=0.0)
    assert train(still, range(1), Arm("SGD", 0.0)) == train(still, range(1), Arm("SGD", 0.0, trained=1))
    assert train(JOBS[2], range(1), Arm("SGD", 0.1)) != train(JOBS[2], range(1), Arm("SGD", 0.1, trained=1))


def test_ten_pairs_decide_or_do_not() -> None:
    assert within("a", [0.0, 0.001] * 5).met
    assert not within("a", [-0.02, -0.021] * 5).met
    assert within("a", [-0.05, 0.05] * 5).sentence.endswith("open")
    assert not within("a", [-0.02, -0.021] * 5).sentence.endswith("open")
