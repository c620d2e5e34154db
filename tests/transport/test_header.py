"""The header: fixed on the wire, the same when read back, and clear about strangers."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import torch

from lightning_async.transport.checks import DTYPES
from lightning_async.transport.header import (
    DATA,
    FOLDS,
    GOT,
    HEADER_BYTES,
    HELLO,
    MAGIC,
    NO_BODY,
    PROTOCOL,
    WIRE_BYTES,
    AnotherProtocolError,
    Header,
    dtype_code,
    dtype_of,
    pack_into,
    run_number,
    unpack,
)

LAST = 2**63 - 1
EVERY_FIELD_ANOTHER = Header(*range(101, 100 + len(dataclasses.fields(Header))), tuple(range(1, 1 + FOLDS)))


def packed(header: Header, run: int = 7) -> bytearray:
    buffer = bytearray(HEADER_BYTES)
    pack_into(memoryview(buffer), header, run=run)
    return buffer


@pytest.mark.parametrize(
    "header",
    [
        Header(HELLO, number=5, nbytes=1 << 40, reference=3),
        Header(DATA, kind=63, number=LAST, step=-LAST - 1, weight=LAST, dtype=1, nbytes=4096),
        Header(GOT, seen=9, own_step=12, own_clock=123456789, folded=(3, 1, 2)),
        Header(GOT),
        EVERY_FIELD_ANOTHER,
    ],
)
def test_what_is_packed_is_read_back(header: Header) -> None:
    assert unpack(memoryview(packed(header)), run=7) == header


def test_the_layout_is_fixed() -> None:
    words = struct.unpack("<32q", packed(EVERY_FIELD_ANOTHER, run=7))
    assert words[:3] == (MAGIC, PROTOCOL, 7)
    assert words[3:19] == tuple(range(101, 117))
    assert words[19:] == tuple(range(1, 14))
    assert (HEADER_BYTES, WIRE_BYTES) == (256, 65792)


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [(0, 1, "not lightning_async"), (1, 99, "version 99 of the protocol"), (2, 8, "another run")],
)
def test_a_stranger_is_named(word: int, value: int, says: str) -> None:
    buffer = packed(Header(HELLO))
    struct.pack_into("<q", buffer, 8 * word, value)
    with pytest.raises(AnotherProtocolError, match=says):
        unpack(memoryview(buffer), run=7)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_a_number_too_long_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        packed(Header(DATA, weight=number))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_may_be_posted_has_a_code(dtype: torch.dtype) -> None:
    assert dtype_of(dtype_code(dtype)) == dtype


def test_codes_are_distinct_and_none_is_no_body() -> None:
    assert len({dtype_code(dtype) for dtype in DTYPES} | {NO_BODY}) == len(DTYPES) + 1
    assert dtype_code(None) == NO_BODY
    assert dtype_of(NO_BODY) is None


def test_other_dtypes_and_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        dtype_code(torch.complex64)
    with pytest.raises(AnotherProtocolError, match="code 77"):
        dtype_of(77)


def test_runs_have_numbers_of_their_own() -> None:
    numbers = {run_number(f"run-{n}") for n in range(1000)}
    assert len(numbers) == 1000
    assert all(0 <= number <= LAST for number in numbers)
    assert run_number("a") == run_number("a")
