"""Adam on one of n ranks moves as on the mean of n gradients; one rank, no noise: nothing changes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_async.algorithms.adam import SecondMoment, further


def moved(optimizer: type[torch.optim.Adam], n: int, members: int, noise: float, steps: int = 4000) -> float:
    """How far one parameter moves under gradients of 1 plus noise, averaged over `members`."""
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(64))
    opt = optimizer([p], lr=1e-3, weight_decay=0.0)
    stretch = SecondMoment(opt)
    for _ in range(steps):
        p.grad = 1 + noise * torch.randn(members, 64, generator=generator).mean(0)
        opt.step()
        stretch.stretch(n)
    return -float(p.detach().mean())


@pytest.mark.few(1)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_one_of_n_ranks_moves_like_the_mean_of_n(optimizer: Any, noise: float) -> None:
    ddp = moved(optimizer, 1, 4, noise)
    alone = moved(optimizer, 1, 1, noise)
    stretched = moved(optimizer, 4, 1, noise)
    assert alone < 0.95 * ddp if noise < 1 else alone < 0.7 * ddp
    assert stretched == pytest.approx(ddp, rel=0.03)


def test_against_numpy() -> None:
    n, eps = 4, 1e-8
    m, v, q = np.array([0.5, -2.0, 0.0, 1.0]), np.array([1.0, 4.0, 1e-4, 1.0]), np.array([0.2, 1.0, 1e-5, 1.0])
    rho = (1 - 0.9) / (1 + 0.9)
    noise = (v - q) / (1 - rho)
    signal = v - noise
    mean = np.clip(signal + noise / n, v / n, v)
    expected = m / (np.sqrt(mean) + eps) - m / (np.sqrt(v) + eps)
    got = further(torch.from_numpy(m), torch.from_numpy(v), torch.from_numpy(q), n, 0.9, eps)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_one_rank_and_gradients_without_noise_change_nothing() -> None:
    p = nn.Parameter(torch.zeros(8))
    opt = torch.optim.Adam([p])
    p.grad = torch.randn(8)
    opt.step()
    before = p.detach().clone()
    SecondMoment(opt).stretch(1)
    assert torch.equal(p, before)
    assert moved(torch.optim.Adam, 8, 1, 0.0, 100) == pytest.approx(moved(torch.optim.Adam, 1, 1, 0.0, 100), rel=1e-5)


def test_half_precision_means_do_not_stand_still() -> None:
    p = nn.Parameter(torch.zeros(1).bfloat16())
    opt = torch.optim.Adam([p], lr=0.0)
    stretch = SecondMoment(opt)
    p.grad = torch.ones_like(p)
    for _ in range(2000):
        opt.step()
        stretch.stretch(4)
    assert float(stretch._square[p]) == pytest.approx(1 - 0.999**2000, rel=0.05)  # in bfloat16 it stops at 0.25


def test_without_a_first_moment_no_step_is_stretched() -> None:
    """torch allows betas=(0.0, ...), and many adversarial nets are trained so."""
    m, v, q = torch.randn(3, 8)
    assert not further(m, v.square(), q.square(), 4, 0.0, 1e-8).any()


def test_a_step_is_stretched_once() -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = torch.optim.Adam([p])
    for gradient in (1.0, -0.5):
        p.grad = torch.full((3,), gradient)
        opt.step()
    stretch, before = SecondMoment(opt), p.detach().clone()
    stretch.stretch(4)
    once = p.detach().clone()
    stretch.stretch(4)
    assert torch.equal(p, once)
    assert not torch.equal(before, once)


def test_maximize_mirrors() -> None:
    ends = []
    for maximize in (False, True):
        p = nn.Parameter(torch.zeros(8))
        opt = torch.optim.Adam([p], maximize=maximize)
        stretch, generator = SecondMoment(opt), torch.Generator().manual_seed(0)
        for _ in range(50):
            p.grad = (1 + torch.randn(8, generator=generator)) * (-1 if maximize else 1)
            opt.step()
            stretch.stretch(4)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_whom_it_concerns() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    assert SecondMoment.concerns(torch.optim.AdamW(p))
    assert not SecondMoment.concerns(torch.optim.SGD(p, 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_new_object_with_the_old_ones_state_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    """Its means may be wider than the parameters."""

    def train(exchanged: bool) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        p, unused = nn.Parameter(torch.zeros(8, dtype=dtype)), nn.Parameter(torch.zeros(2, dtype=dtype))
        opt = torch.optim.Adam([{"params": [unused]}, {"params": [p], "lr": 0.1}])
        stretch = SecondMoment(opt)
        for step in range(10):
            if exchanged and step == 5:
                file = io.BytesIO()
                torch.save(stretch.state_dict(), file)
                file.seek(0)
                stretch = SecondMoment(opt)
                stretch.load_state_dict(torch.load(file, weights_only=True))
                stretch.stretch(4)  # this step was stretched before
            p.grad = torch.randn(8, generator=generator).to(dtype)
            opt.step()
            stretch.stretch(4)
        return p.detach(), stretch.state_dict()["square"][1]

    through, exchanged = train(False), train(True)
    assert torch.equal(through[0], exchanged[0])
    assert torch.equal(through[1], exchanged[1])
    assert through[1].dtype == exchanged[1].dtype == torch.promote_types(dtype, torch.float32)
