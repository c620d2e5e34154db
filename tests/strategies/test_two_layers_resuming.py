"""A run whose members have several ranks goes on where it was saved, to the bit; other members go on, and say so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_async.algorithms.algorithm import UNIT
from tests.strategies.lit import trainer, weights
from tests.strategies.ranks import run
from tests.strategies.resumable import Draws, Saves, files_of, held_out, look_when_put_back, plain, samples, seed

TWO = {"inner_size": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with", "ignore:.*exists and is not empty")


def _look(knobs: dict[str, Any], path: str, resume: bool) -> dict[str, Any]:
    seed()
    save = Saves(path, "validation")
    t = trainer(4, knobs={**TWO, **knobs}, max_epochs=2, callbacks=[save] * (not resume))
    seen = look_when_put_back(t)
    t.fit(Draws(), samples(), held_out(), ckpt_path=path if resume else None)
    return seen[0] if resume else save.seen


@pytest.mark.few(0)
@pytest.mark.parametrize(("mode", "at_meeting"), [("push_sum", "keep"), ("pairwise", "adopt")])
def test_what_is_saved_is_restored_to_the_bit_on_every_rank(mode: str, at_meeting: str, tmp_path: Path) -> None:
    knobs, path = {"mode": mode, "at_meeting": at_meeting}, str(tmp_path / "x.ckpt")
    saved, restored = run(4, _look, knobs, path, False), run(4, _look, knobs, path, True)
    for before, after in zip(saved, restored, strict=True):
        for key in before:
            assert after[key] == before[key], key
    assert saved[2]["own"] == saved[3]["own"]
    assert saved[2]["optimizers"] == saved[3]["optimizers"]
    assert (saved[0]["own"] != saved[2]["own"]) is (at_meeting == "keep")
    assert saved[2]["random"] != saved[3]["random"]
    parts = [own["parts"]["algorithm"] for own in files_of(Path(path)).values()]
    assert [bool(part) for part in parts] == [True, False, True, False]  # the speakers have it
    assert mode != "push_sum" or parts[0]["mass"] + parts[2]["mass"] == 2 * 2 * 4 * UNIT  # members, ranks, samples


def _through(path: str, resume: bool) -> Any:
    """The losses from the save on, and the end, of a run that goes through or of one that begins there."""
    seed()
    lit, save = Draws(), Saves(path, "validation", epoch=0)
    t = trainer(4, knobs={**TWO, "mode": "none", "balance": "equal"}, max_epochs=3, callbacks=[save])
    t.fit(lit, samples(), held_out(), ckpt_path=path if resume else None)
    losses = lit.losses if resume else lit.losses[save.losses :]
    return losses, weights(lit), plain([o.state_dict() for o in t.optimizers]), t.global_step, t.strategy.steps


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert run(4, _through, path, False) == run(4, _through, path, True)


def _others(path: str, knobs: dict[str, Any]) -> tuple[list[float], list[str]]:
    seed()
    t = trainer(4, knobs=knobs, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(lit := Draws(), samples(), held_out(), ckpt_path=path)
    return weights(lit), [str(w.message) for w in caught if "does not go on to the bit" in str(w.message)]


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (TWO, {}, "its 4 ranks were 2 members, and here they are 4"),
        ({}, TWO, "its 4 ranks were 4 members, and here they are 2"),
    ],
)
def test_other_members_go_on_from_the_consensus_and_say_so(
    before: dict[str, Any], after: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "x.ckpt")
    run(4, _look, {**before, "inner_size": before.get("inner_size")}, path, False)
    ends = run(4, _others, path, after)
    assert len({tuple(end) for end, _ in ends}) == 1
    assert sentence in ends[0][1][0]
