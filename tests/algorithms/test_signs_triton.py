"""The kernels write the bytes and the numbers that torch does. In Triton's interpreter, or on a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs, and is not installed here")

from lightning_async.algorithms import signs_triton
from lightning_async.algorithms.signs import Signs, TorchSigns, nbytes

SIZES = [1, 7, 8, 9, 1023, 1024, 1025, 5000]


@pytest.fixture(params=["interpreter", pytest.param("device", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Signs[Tensor], str]:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(request.param == "interpreter")))
    monkeypatch.setattr(signs_triton, "_made", [])
    return signs_triton.TritonSigns(), "cuda" if request.param == "device" else "cpu"


@pytest.mark.parametrize("n", SIZES)
def test_the_same_bytes_and_the_same_numbers(n: int, kernels: tuple[Signs[Tensor], str]) -> None:
    mine, device = kernels
    p = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device)
    p[:: max(1, n // 3)] = 0.0
    found = []
    for signs in (mine, TorchSigns()):
        bits, out = torch.zeros(nbytes(n), dtype=torch.uint8, device=device), torch.zeros_like(p)
        signs.pack(p, bits)
        signs.shift(p, bits, -signs.mean(p), out)
        found.append((bits, out))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)


def test_in_place(kernels: tuple[Signs[Tensor], str]) -> None:
    mine, device = kernels
    p = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)
    bits, expected = torch.zeros(125, dtype=torch.uint8, device=device), torch.zeros_like(p)
    mine.pack(p, bits)
    mine.shift(p, bits, 0.5, expected)
    mine.shift(p, bits, 0.5, p)
    assert torch.equal(p, expected)
