"""A message leaves while the training thread is busy in Python; afterwards all is as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from lightning_async.strategies.promptness import INTERVAL, Promptness
from tests.strategies.piped import Piped, loader, trainer
from tests.strategies.ranks import run


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    assert sys.getswitchinterval() == pytest.approx(before, abs=2e-6)


def test_it_is_put_back_once() -> None:
    before, promptness = sys.getswitchinterval(), Promptness()
    promptness.put_back()
    promptness.begin()
    promptness.begin()
    assert sys.getswitchinterval() == pytest.approx(INTERVAL, abs=2e-6)
    promptness.put_back()
    sys.setswitchinterval(before / 2)
    promptness.put_back()
    assert sys.getswitchinterval() == pytest.approx(before / 2, abs=2e-6)
    sys.setswitchinterval(before)


def test_who_wished_for_less_keeps_it() -> None:
    before, promptness = sys.getswitchinterval(), Promptness()
    sys.setswitchinterval(INTERVAL / 2)
    less = sys.getswitchinterval()
    promptness.begin()
    assert sys.getswitchinterval() == less
    promptness.put_back()
    assert sys.getswitchinterval() == less
    sys.setswitchinterval(before)


class Looks(Piped):
    """Notes the interval of each batch."""

    def on_train_batch_start(self, *_: object) -> None:
        self.seen = sys.getswitchinterval()


def _fit() -> tuple[float, float, float]:
    before, lit = sys.getswitchinterval(), Looks()
    trainer(2, max_epochs=1, limit_val_batches=0).fit(lit, loader())
    return before, lit.seen, sys.getswitchinterval()


def test_for_the_time_of_a_fit() -> None:
    for before, within, after in run(2, _fit):
        assert within == pytest.approx(INTERVAL, abs=2e-6)
        assert after == before
