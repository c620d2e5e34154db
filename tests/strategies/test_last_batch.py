"""The last batch of an epoch is told to Lightning once: as it is foretold, as all know it, or as no other comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_async.strategies import compat
from lightning_async.strategies.last_batch import LastBatch


class World:
    """A rank with a stream under a limit; its stream may end with the batch under way."""

    def __init__(self, *, stream: bool = True, ends: bool = False, dry: bool = False) -> None:
        self.did: list[str] = []
        self.progress = SimpleNamespace(is_last_batch=False)
        self.ends = ends
        loop = SimpleNamespace(batch_progress=self.progress, update_lr_schedulers=self.schedules)
        self.trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop))
        feeding = SimpleNamespace(cut=lambda: self.did.append("cut"), share=None if stream else 1, dry=dry)
        office = SimpleNamespace(recording=SimpleNamespace(mark=lambda mark: self.did.append(f"mark {mark}")))
        strategy: Any = SimpleNamespace(feeding=feeding, office=office)
        counts: Any = SimpleNamespace(cuts=lambda feeding: stream)
        self.last = LastBatch(strategy, counts)

    def schedules(self, interval: str, update_plateau_schedulers: bool) -> None:
        if not self.last.foretold:  # the clock's guard
            self.did.append(interval)

    def look_ahead(self, trainer: Any) -> None:
        self.progress.is_last_batch = self.ends


def world(monkeypatch: pytest.MonkeyPatch, **how: bool) -> World:
    made = World(**how)
    monkeypatch.setattr(compat, "look_ahead", made.look_ahead)
    return made


def test_what_the_agenda_foretells_and_all_confirm_ends_the_epoch_there(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world(monkeypatch)
    one.last.started(one.trainer, by_agenda=True)
    assert one.progress.is_last_batch
    assert not one.last.ended(one.trainer), "its data have not ended"
    assert not one.last.met(one.trainer, by_agenda=True)
    assert one.progress.is_last_batch
    assert one.did == ["mark cut", "cut", "epoch"]


def test_a_run_that_failed_within_it_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world(monkeypatch)
    one.last.started(one.trainer, by_agenda=True)
    one.last.forget()
    assert not one.last.foretold
    assert not one.last.met(one.trainer, by_agenda=False)
    assert one.did == []


@pytest.mark.parametrize("ends", [False, True])
def test_where_another_stream_ended_before_its_part_it_is_taken_back(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank's own stream may have ended there too: then that is why it has no more."""
    one = world(monkeypatch, ends=ends)
    one.last.started(one.trainer, by_agenda=True)
    assert one.last.met(one.trainer, by_agenda=False) == ends
    assert one.progress.is_last_batch == ends
    assert one.did == ["mark further", *(["epoch"] if ends else [])]


@pytest.mark.parametrize("stream", [True, False])
def test_before_any_other_batch_a_stream_under_a_limit_is_looked_into(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = world(monkeypatch, stream=stream, ends=True)
    one.last.started(one.trainer, by_agenda=False)
    assert one.last.ended(one.trainer) == stream
    assert one.did == (["mark ahead"] if stream else [])
    assert not one.last.met(one.trainer, by_agenda=False)


def test_nobody_foretold_it_and_all_met_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world(monkeypatch)
    assert not one.last.met(one.trainer, by_agenda=True)
    assert one.progress.is_last_batch
    assert one.did == ["mark cut", "cut", "epoch"]


@pytest.mark.parametrize(
    ("dry", "foretold", "was_last"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_where_no_batch_comes_the_one_before_was_the_last(
    dry: bool, foretold: bool, was_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that has less than its length, or a -1 of a hook behind what was foretold; not a -1 alone."""
    one = world(monkeypatch, dry=dry)
    if foretold:
        one.last.started(one.trainer, by_agenda=True)
    one.last.ran_dry(one.trainer)
    assert one.progress.is_last_batch == was_last
    assert one.did == (["epoch"] if was_last else [])
    assert not one.last.foretold
