"""The AdamW of a few lines is torch's, but for what its second moment sees."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import ddp
from benchmarks.adam import handwritten, variants
from benchmarks.tasks import characters


def test_the_handwritten_one_is_torchs() -> None:
    task = characters(64)
    mine, torchs = handwritten(task, 0, noisy=False).score, ddp(task, 0).score
    assert mine.loss == pytest.approx(torchs.loss, rel=1e-5)
    assert handwritten(task, 0, noisy=True).score.loss != pytest.approx(torchs.loss, rel=1e-4)


def test_variants_differ_in_their_correction_alone() -> None:
    found = variants(characters(64))
    losses = {name: found[name](0).score.loss for name in ("none", "m^2", "shipped")}
    assert len(set(losses.values())) == 3
