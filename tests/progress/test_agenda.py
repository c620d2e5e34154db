"""When something is due, against a plain count."""

from __future__ import annotations

import random

import pytest

from lightning_async.progress.agenda import Agenda, Due, Item
from lightning_async.progress.tally import Tally, Unit


@pytest.mark.parametrize("seed", range(50))
def test_each_multiple_is_due_once(seed: int) -> None:
    rng = random.Random(seed)
    every, in_epoch, once = rng.randint(1, 9), rng.random() < 0.5, rng.random() < 0.3
    agenda = Agenda([Item(Due.VALIDATE, Unit.UPDATES, every, in_epoch, once)])
    epoch, now, found = Tally(updates=rng.choice([0, 5, 23])), Tally(), 0
    now = epoch
    for _ in range(100):
        after = now.plus(Tally(updates=rng.randint(0, every)))  # never more than one multiple at a time
        found += bool(agenda.due(now, after, epoch) & Due.VALIDATE)
        now = after
    base = epoch.updates if in_epoch else 0
    passed = (now.updates - base) // every - (epoch.updates - base) // every
    assert found == (min(1, passed) if once and base + every > epoch.updates else 0 if once else passed)


def test_the_next_points() -> None:
    items = [Item(Due.VALIDATE, Unit.BATCHES, 6), Item(Due.STOP, Unit.UPDATES, 20, once=True)]
    agenda = Agenda(items)
    assert list(agenda.points(Tally(6, 6), Tally())) == [(Unit.BATCHES, 12), (Unit.UPDATES, 20)]
    assert list(agenda.points(Tally(21, 21), Tally())) == [(Unit.BATCHES, 24)]


def test_an_epoch_counts_from_its_beginning() -> None:
    agenda = Agenda([Item(Due.END_EPOCH, Unit.BATCHES, 10, in_epoch=True)])
    assert list(agenda.points(Tally(7), Tally(7))) == [(Unit.BATCHES, 17)]
    assert agenda.ends_epoch(Unit.BATCHES, 17, Tally(7))
    assert not agenda.ends_epoch(Unit.BATCHES, 16, Tally(7))
    assert not agenda.ends_epoch(Unit.UPDATES, 17, Tally(7))


def test_nothing_is_due_every_0() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Item(Due.VALIDATE, Unit.BATCHES, 0)
