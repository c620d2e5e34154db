"""The names that callbacks have are those of whole files, whoever dies when."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies.cut_names import Names, Told, key
from lightning_async.strategies.late_files import DIED, WRITTEN
from lightning_async.strategies.saved import names_of, take_names
from lightning_async.transport.virtual import VirtualCluster


def named(name: str) -> dict[str, Any]:
    """A callback's names when it has saved there."""
    callback = ModelCheckpoint(every_n_train_steps=1)
    callback.best_model_path = callback.last_model_path = name
    return names_of(callback)


class Ranks:
    """Three ranks of a virtual cluster, each with two callbacks that have saved `old`."""

    def __init__(self) -> None:
        self.cluster = VirtualCluster(3, silence=0.1)
        self.callbacks = [[ModelCheckpoint(every_n_train_steps=1) for _ in range(2)] for _ in range(3)]
        for callback in (callback for mine in self.callbacks for callback in mine):
            take_names(callback, named("old"))
        pairs = zip(self.callbacks, self.cluster.carriers, strict=True)
        self.names = [Names(callbacks, carrier) for callbacks, carrier in pairs]

    def ask(self, name: str) -> None:
        """Rank 0 asks its callbacks."""
        for callback in self.callbacks[0]:
            before = names_of(callback)
            take_names(callback, named(name))
            self.names[0].asked(callback, before)

    def tell(self, number: int, name: str) -> None:
        """And tells the others."""
        self.ask(name)
        for names in self.names:
            names.told(Told(number, 0, [named(name)] * 2))

    def says(self, number: int, word: bytes) -> None:
        """Rank 0's writer is done."""
        self.cluster.carriers[0].propose(key(number), word)

    def look(self) -> list[bool | None]:
        """What those who live find: they ask, and are answered."""
        living = self.cluster.carriers[1].members()
        found: dict[int, bool | None] = dict.fromkeys(living)
        for _ in range(4):
            for rank in living:
                found[rank] = self.names[rank].look() if found[rank] is None else found[rank]
            self.cluster.advance(0.5)
        return list(found.values())

    def have(self) -> list[list[str]]:
        """The names of all."""
        return [[callback.best_model_path for callback in mine] for mine in self.callbacks]


def test_the_others_have_a_name_when_the_file_is_whole() -> None:
    ranks = Ranks()
    ranks.tell(1, "new")
    assert ranks.look() == [None, None, None]
    assert ranks.have() == [["new"] * 2, ["old"] * 2, ["old"] * 2]
    ranks.says(1, WRITTEN)
    assert ranks.look() == [True, True, True]
    assert ranks.have() == [["new"] * 2] * 3
    assert ranks.look() == [None, None, None], "each once"


def test_what_did_not_come_has_no_name() -> None:
    """Also where all had taken it at a meeting; but for a callback that has saved there itself."""
    ranks = Ranks()
    ranks.tell(1, "new")
    for callback in ranks.callbacks[2]:
        take_names(callback, named("new"))
    take_names(ranks.callbacks[1][0], named("of a meeting"))
    ranks.cluster.kill(0)
    ranks.cluster.advance(1.0)
    assert ranks.look() == [False, False]
    assert ranks.have()[1:] == [["of a meeting", "old"], ["old"] * 2]


def test_what_was_whole_before_its_first_rank_died_has_its_name() -> None:
    ranks = Ranks()
    ranks.tell(1, "new")
    ranks.says(1, WRITTEN)
    ranks.cluster.advance(0.5)
    ranks.cluster.kill(0)
    ranks.cluster.advance(1.0)
    assert ranks.look() == [True, True]
    assert ranks.have()[1:] == [["new"] * 2] * 2


def test_a_later_cut_is_told_of_when_the_one_before_is_whole() -> None:
    ranks = Ranks()
    ranks.tell(1, "new")
    ranks.tell(2, "newer")
    assert ranks.have() == [["newer"] * 2, ["new"] * 2, ["new"] * 2]


@pytest.mark.parametrize(("whole", "name"), [(True, "new"), (False, "old"), (None, "old")])
def test_at_a_meeting_that_counts_which_the_first_one_knows(whole: bool | None, name: str) -> None:
    ranks = Ranks()
    ranks.tell(1, "new")
    ranks.names[1].meet({"number": 1, "whole": whole})
    assert ranks.have()[1] == [name] * 2
    assert ranks.names[1].open == (whole is None)
    ranks.tell(2, "newer")
    ranks.names[2].meet({"number": 1, "whole": True})
    assert ranks.have()[2] == ["new"] * 2, "who is the first now has not heard of the second: it is none"
    assert not ranks.names[2].open


def test_a_run_that_ends_before_its_files_are_begun_has_the_names_of_before() -> None:
    """Also those of the cut before, that is whole, or is not; but for a callback that has saved there itself."""
    ranks = Ranks()
    ranks.tell(1, "new")
    ranks.says(1, WRITTEN)
    assert ranks.look() == [True, True, True]
    ranks.ask("newer")
    take_names(ranks.callbacks[0][1], named("on its way out"))
    ranks.names[0].forget()
    assert ranks.have() == [["new", "on its way out"], ["new"] * 2, ["new"] * 2]
    ranks = Ranks()
    ranks.tell(1, "new")
    ranks.ask("newer")
    ranks.names[0].forget()
    assert ranks.have()[0] == ["old"] * 2


def test_behind_the_run_what_nobody_said_is_whole_is_not_there() -> None:
    ranks = Ranks()
    ranks.tell(1, "new")
    for names in ranks.names:
        names.forget()
    assert ranks.have() == [["old"] * 2] * 3
    ranks.tell(2, "newer")
    ranks.says(2, DIED)
    assert ranks.look() == [False, False, False]
    assert ranks.have() == [["old"] * 2] * 3
