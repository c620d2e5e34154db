"""A line a stage, a character a slice of time."""

from __future__ import annotations

from lightning_async.pipeline.picture import draw


def test_two_stages_of_one_second() -> None:
    first = [("F", b, float(b - 1), float(b)) for b in (1, 2, 3)] + [("B", 1, 3.0, 5.0)]
    last = [("F", 1, 1.0, 2.0), ("B", 1, 2.0, 3.0)]
    assert draw({1: last, 0: first}, width=10).splitlines() == ["stage 0   001122aaaa", "stage 1   ..00aa...."]


def test_only_the_batches_that_were_asked_for() -> None:
    line = [("F", b, float(b - 1), float(b)) for b in range(1, 20)]
    assert draw({0: line}, first=11, last=12, width=4) == "stage 0   0011"
    assert draw({0: line}, first=50, last=60) == ""


def test_a_short_pass_is_seen() -> None:
    assert draw({0: [("F", 1, 0.0, 1.0), ("B", 1, 1.0, 1.0)]}, width=4) == "stage 0   000a"
    assert draw({0: [("F", 1, 0.0, 1.0), ("B", 1, 0.5, 0.51), ("F", 2, 2.0, 4.0)]}, width=4) == "stage 0   a.11"
