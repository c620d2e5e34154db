"""A run whose members have several ranks goes on where it was saved, to the bit; other members go on, and say so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import Callback

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.strategies.whole_files import WholeFiles
from tests.strategies.lit import trainer, weights
from tests.strategies.ranks import run
from tests.strategies.resumable import (
    Draws,
    Saves,
    files_of,
    held_out,
    look_when_put_back,
    plain,
    rank,
    samples,
    seed,
)
from tests.strategies.test_two_layers import KINDS, TWO, Watches

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


@pytest.mark.few(0)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    assert run(4, _through, path, False) == run(4, _through, path, True)


class Unread(WholeFiles):
    """A disk that does not give these files to this rank."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ends = tuple(f".rank{rank}.ckpt" for rank in ranks)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if self.ends and str(path).endswith(self.ends):
            raise OSError("it is gone")
        return super().load_checkpoint(path, *arguments, **options)


class Holds(Callback):
    """What of the saved run is still in memory when a batch is over."""

    def __init__(self) -> None:
        self.heritage: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.heritage.append(len(getattr(trainer.strategy.algorithm, "heritage", ())))  # type: ignore[attr-defined]


def _saves(of: str, knobs: dict[str, Any], path: str) -> list[Any]:
    seed()
    save = Saves(path, "validation")
    trainer(4, strategy=KINDS[of](**knobs), max_epochs=2, callbacks=[save]).fit(Draws(), samples(), held_out())
    return [optimizer["state"] for optimizer in save.seen["optimizers"]]


def _others(of: str, knobs: dict[str, Any], path: str, unread: dict[int, tuple[int, ...]]) -> dict[str, Any]:
    seed()
    watches, holds = Watches(), Holds()
    strategy = KINDS[of](checkpoint_io=Unread(unread.get(rank(), ())), **knobs)
    t = trainer(4, strategy=strategy, max_epochs=3, callbacks=[watches, holds])
    seen = look_when_put_back(t, lambda t: plain([o.state_dict()["state"] for o in t.strategy.optimizers]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(lit := Draws(), samples(), held_out(), ckpt_path=path)
    return {
        "weights": weights(lit),
        "prints": watches.prints,
        "heritage": set(holds.heritage),
        "optimizers": seen[0],
        "warnings": [str(w.message) for w in caught if "does not go on to the bit" in str(w.message)],
    }


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("of", "before", "after", "unread", "whose", "sentence"),
    [
        ("async_global", {}, TWO, {}, [0, 0, 2, 2], "its 4 ranks were 4 members, and here they are 2"),
        ("cyclic_delay", {}, TWO, {}, [0, 0, 2, 2], "its 4 ranks were 4 members, and here they are 2"),
        ("gossip_ring", {}, TWO, {}, [0, 0, 2, 2], "its 4 ranks were 4 members, and here they are 2"),
        ("gossip_ring", TWO, {}, {}, [0, 1, 2, 3], "its 4 ranks were 2 members, and here they are 4"),
        ("gossip_ring", TWO, {"inner_size": 4}, {}, [0, 0, 0, 0], "its 4 ranks were 2 members, and here they are 1"),
        ("gossip_ring", TWO, TWO, {3: (3,)}, [0, 0, 2, 2], "rank3.ckpt cannot be read (OSError: it is gone)"),
        ("gossip_ring", TWO, TWO, {3: (2, 3)}, [0, 0, 0, 0], "rank3.ckpt cannot be read (OSError: it is gone)"),
    ],
    ids=str,
)
def test_other_members_go_on_from_the_consensus_and_say_so(
    of: str,
    before: dict[str, Any],
    after: dict[str, Any],
    unread: dict[int, tuple[int, ...]],
    whose: list[int],
    sentence: str,
    tmp_path: Path,
) -> None:
    """Siblings are equal from the first batch on: they have one optimizer state, their speaker's."""
    path = str(tmp_path / "x.ckpt")
    saved = run(4, _saves, of, before, path)
    assert saved[0] != saved[2]
    ends = run(4, _others, of, after, path, unread)
    assert len({tuple(end["weights"]) for end in ends}) == 1
    assert [end["optimizers"] for end in ends] == [saved[r] for r in whose]
    size = after.get("inner_size", 1)
    for number, end in enumerate(ends):
        assert end["prints"] == ends[number - number % size]["prints"]
    assert [end["heritage"] for end in ends] == [{0}] * 4, "what others served is taken up, and not kept"
    (said,) = ends[0]["warnings"]
    assert sentence in said
    who = "A rank whose member's first rank is r" if size > 1 else "Rank r"
    assert f"{who} has the optimizer state of the saved rank number r modulo 4 (of rank 0 where" in said
