"""What is sent and what stays add up to what there was, whatever the numbers, in all ways to compute it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_async.algorithms import signs_numba
from lightning_async.algorithms.press import Press, Rest, Sum, Values
from lightning_async.algorithms.sheets import Span, cuts
from lightning_async.algorithms.signs import Flat, NotFinite, NumpySigns, Signs, TorchSigns, flat, nbytes, signs_for
from lightning_async.algorithms.signs_numba import NumbaSigns

SIZES = [0, 1, 7, 8, 9, 255, 256, 1000, 4096]
WAYS = ["numpy", "torch", "numba"]


def numbers(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def signs(way: str, dtype: torch.dtype = torch.float32, block: int = 4096) -> Signs[Flat]:
    if way == "numba":
        pytest.importorskip("numba", reason="Numba is not installed")
        return NumbaSigns(block, dtype)
    return TorchSigns() if way == "torch" else NumpySigns(block, dtype)


def seen(way: str, tensor: Tensor) -> Flat:
    """A tensor as this way takes it."""
    return tensor if way == "torch" else flat(tensor)


def send(way: str, p: Tensor) -> tuple[Tensor, Tensor, float]:
    """(what is sent, what stays, scale)"""
    by, bits = signs(way, p.dtype), torch.zeros(nbytes(p.numel()), dtype=torch.uint8)
    scale = float(torch.tensor(by.mean(seen(way, p)), dtype=p.dtype))
    by.pack(seen(way, p), seen(way, bits))
    sent, left = torch.zeros_like(p), p.clone()
    by.shift(seen(way, sent), seen(way, bits), scale, seen(way, sent))
    by.shift(seen(way, left), seen(way, bits), -scale, seen(way, left))
    return sent, left, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("stretch", [1.0, 1.5])
def test_all_at_once_is_one_after_the_other(n: int, way: str, dtype: torch.dtype, tracks: bool, stretch: float) -> None:
    p, kept, bits = numbers(n, dtype=dtype), numbers(n, 1, dtype=dtype), torch.zeros(nbytes(n), dtype=torch.uint8)
    source = kept.clone() if tracks else p.clone()
    by = signs(way, dtype)
    scale = by.press(*(seen(way, tensor) for tensor in (p, bits, kept if tracks else p, kept)), stretch=stretch)
    assert scale == pytest.approx(stretch * float(p.abs().mean()) if n else 0.0, rel=1e-6)
    assert scale == float(torch.tensor(scale, dtype=dtype))
    assert bits.tolist() == np.packbits(p.numpy() >= 0, bitorder="little").tolist()
    assert torch.equal(kept, source - scale * torch.where(p >= 0, 1.0, -1.0).to(dtype))


@pytest.mark.parametrize("way", WAYS)
def test_all_at_once_refuses_what_is_not_finite_and_takes_what_only_adds_up_to_it(way: str) -> None:
    bits, kept = torch.zeros(125, dtype=torch.uint8), numbers(1000)
    for bad in (math.nan, math.inf, -math.inf):
        p = torch.where(torch.arange(1000) == 57, bad, numbers(1000))
        with pytest.raises(NotFinite):
            signs(way).press(*(seen(way, tensor) for tensor in (p, bits, p, kept)))
        assert torch.equal(kept, numbers(1000))
    large = torch.full((1000,), 3e38)
    assert signs(way).press(*(seen(way, tensor) for tensor in (large, bits, large, kept))) == pytest.approx(3e38)
    assert float(kept.abs().max()) < 1e33


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 1000])
def test_a_scale_that_is_infinite_where_it_travels_is_refused(way: str, n: int) -> None:
    """1.6 times the mean of numbers that float32 has just room for."""
    large, bits, kept = torch.full((n,), 3e38), torch.zeros(nbytes(n), dtype=torch.uint8), numbers(n)
    with pytest.raises(NotFinite):
        signs(way).press(*(seen(way, tensor) for tensor in (large, bits, large, kept)), stretch=1.6)
    assert torch.equal(kept, numbers(n))


@pytest.mark.parametrize("scale", ["block", "tensor", "global"])
def test_no_sheet_has_a_scale_that_is_infinite(scale: Any) -> None:
    (cut,) = cuts([Span(0, 100, 0)], parts=1, dtype=torch.float32, block=64, scale=scale)
    large, rest = torch.full((100,), 3e38), Rest(torch.zeros(100))
    with pytest.raises(NotFinite):
        Press(large, stretch=1.6).pack(Values(large), rest, cut.sheet())
    assert not rest.vector.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", SIZES)
def test_sent_plus_rest_is_all_there_was(n: int, way: str, dtype: torch.dtype) -> None:
    p = numbers(n, dtype=dtype)
    sent, left, _ = send(way, p)
    torch.testing.assert_close(sent + left, p, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(left, p - sent, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["normal", "heavy tail", "one in a hundred", "all alike"])
@pytest.mark.parametrize("stretch", [1.0, 1.5, 1.99])
def test_what_is_missed_never_grows_by_being_sent(kind: str, stretch: float) -> None:
    """1 - stretch (2 - stretch) phi of the square: with stretch 1 it is the least, below 2 it is less than all."""
    p = numbers(5000, dtype=torch.float64)
    if kind == "heavy tail":
        p = p**5
    if kind == "one in a hundred":
        p = torch.where(torch.arange(5000) % 100 == 0, p, 0.0)
    if kind == "all alike":
        p = p.sign()
    left, bits = p.clone(), torch.zeros(625, dtype=torch.uint8)
    TorchSigns().press(p, bits, p, left, stretch)
    phi = p.abs().sum() ** 2 / (5000 * p.square().sum())
    assert 1 / 5000 <= phi <= 1 + 1e-12
    torch.testing.assert_close(left.square().sum(), (1 - stretch * (2 - stretch) * phi) * p.square().sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", SIZES)
def test_signs_come_back_as_they_were(n: int, way: str) -> None:
    p = numbers(n)
    p[: n // 3] = 0.0
    p[: n // 5] = -0.0
    sent, _, scale = send(way, p)
    assert torch.equal(sent, torch.where(p >= 0, scale, -scale))


@pytest.mark.parametrize("n", SIZES)
def test_all_ways_write_the_same_bytes(n: int) -> None:
    p, bits = numbers(n), {way: torch.zeros(nbytes(n), dtype=torch.uint8) for way in WAYS}
    for way in WAYS:
        signs(way).pack(seen(way, p), seen(way, bits[way]))
    expected = np.packbits(p.numpy() >= 0, bitorder="little").tolist()
    assert all(written.tolist() == expected for written in bits.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(way: str, bad: float) -> None:
    p = numbers(100)
    p[57] = bad
    with pytest.raises(NotFinite):
        signs(way).mean(seen(way, p))


@pytest.mark.parametrize("way", WAYS)
def test_a_sum_may_be_too_large_where_no_number_is(way: str) -> None:
    assert signs(way).mean(seen(way, torch.full((1000,), 3e38))) == pytest.approx(3e38)


@pytest.mark.parametrize("way", WAYS)
def test_zeros_send_nothing_and_denormals_survive(way: str) -> None:
    sent, left, scale = send(way, torch.zeros(100))
    assert scale == 0
    assert not sent.any()
    assert not left.any()
    tiny = torch.full((100,), 1e-44)
    sent, left, _ = send(way, tiny)
    assert torch.equal(sent, tiny)
    assert not left.any()


@pytest.mark.parametrize("way", WAYS)
def test_the_scale_of_many_numbers_is_right(way: str) -> None:
    p = numbers(1 << 22)
    by = signs(way, block=1 << 22)
    assert by.mean(seen(way, p)) == pytest.approx(float(p.double().abs().mean()), rel=1e-6)


def test_a_disk_on_which_nothing_can_be_kept_is_no_reason_not_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba", reason="Numba is not installed")
    njit = numba.njit

    def full(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", full)
    monkeypatch.setattr(signs_numba, "_made", [])
    assert signs("numba").mean(np.full(100, -2.0, "f4")) == 2


def test_without_numba_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs_numba, "numba", None)
    assert type(signs_for(torch.zeros(8))) is NumpySigns


# -- whole sheets ------------------------------------------------------------------------------------------------------

SPANS = [Span(0, 100, 0), Span(112, 117, 1), Span(128, 1000, 2), Span(1008, 1008, 3), Span(1008, 1409, 4)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", ["block", "tensor", "global"])
def test_every_number_is_in_one_sheet_and_comes_out_again(scale: str, parts: int) -> None:
    all_cuts = cuts(SPANS, parts=parts, dtype=torch.float64, min_size=8, exact=[0], block=64, scale=scale)  # type: ignore[arg-type]
    spans = sorted(s for cut in all_cuts for s in [*cut.blocks, *cut.whole])
    covered = [i for s in spans for i in range(s.start, s.stop)]
    assert covered == [i for s in SPANS for i in range(s.start, s.stop)]
    assert all(s.tensor in (0, 1) for cut in all_cuts for s in cut.whole)
    values, old, out = numbers(1409, 1, torch.float64), numbers(1409, 2, torch.float64), torch.zeros(1409).double()
    rest, press = Rest(old.clone()), Press(values, block=64)
    means = press.means(Values(values), rest, all_cuts)
    for cut in all_cuts:
        sheet = cut.sheet()
        press.pack(Values(values), rest, sheet, means)
        press.add(Sum([sheet]), cut, Rest(out))
    torch.testing.assert_close((out + rest.vector)[covered], (values + old)[covered])
    padding = sorted(set(range(1409)) - set(covered))
    assert not out[padding].any()
    assert torch.equal(rest.vector[padding], old[padding])
    assert not rest.vector[:100].any()  # what travels whole leaves nothing
    if scale == "global":
        assert len({s.abs().item() for s in out[128:1000]}) == 1


def test_sheets_are_of_about_equal_length() -> None:
    lengths = [cut.nbytes for cut in cuts(SPANS, parts=4, dtype=torch.float32, block=64)]
    assert max(lengths) - min(lengths) < 24


def test_a_sum_of_sheets_in_several_threads() -> None:
    (cut,) = cuts([Span(0, 5000, 0)], parts=1, dtype=torch.float32, block=64)
    values = [numbers(5000, seed) for seed in range(3)]
    ends = []
    for threads in (1, 3):
        press, sheets = Press(values[0], block=64, threads=threads), []
        rests = [Rest(torch.zeros(5000)) for _ in values]
        for v, rest in zip(values, rests, strict=True):
            sheets.append(cut.sheet())
            press.pack(Values(v), rest, sheets[-1])
        out = torch.zeros(5000)
        press.add(Sum(sheets, 1 / 3), cut, Rest(out))
        ends.append((out, *(rest.vector for rest in rests)))
        torch.testing.assert_close(out + sum(r.vector for r in rests) / 3, sum(values) / 3)
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_a_rest_that_tracks_is_the_negative_of_all_that_was_sent() -> None:
    (cut,) = cuts([Span(0, 100, 0), Span(104, 107, 1)], parts=1, dtype=torch.float64, min_size=8)
    press, rest, out = Press(torch.zeros(0).double()), Rest(torch.zeros(107).double(), tracks=True), torch.zeros(107)
    out = out.double()
    for seed in range(20):
        sheet = cut.sheet()
        press.pack(Values(numbers(107, seed, torch.float64)), rest, sheet)
        press.add(Sum([sheet]), cut, Rest(out))
    torch.testing.assert_close(out, -rest.vector)


def test_a_sheet_of_another_length_is_refused() -> None:
    (cut,) = cuts([Span(0, 100, 0)], parts=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="a sheet of 17 bytes was expected and one of 5 came"):
        cut.sheet().fill(torch.zeros(5, dtype=torch.uint8))


def test_numbers_that_are_not_finite_leave_the_rest_as_it_was() -> None:
    (cut,) = cuts([Span(0, 100, 0)], parts=1, dtype=torch.float32)
    rest, bad = Rest(numbers(100)), numbers(100, 1)
    bad[3] = math.nan
    for attempt in (
        lambda: Press(bad).pack(Values(bad), rest, cut.sheet()),
        lambda: Press(bad).keep(Values(bad), rest, [cut]),
    ):
        with pytest.raises(NotFinite):
            attempt()
        assert torch.equal(rest.vector, numbers(100))
