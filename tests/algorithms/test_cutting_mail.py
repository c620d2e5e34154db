"""Rule by rule, what a `CuttingMail` hands out, holds back and records; and what becomes of a cut when members die."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async.algorithms.cut import Part, put_together
from lightning_async.algorithms.cutting_mail import CuttingMail
from lightning_async.transport.mail import CUT, Letter, Message
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Deadlock, VirtualCluster

KIND = 20


class Members:
    """A few members whose state is what they folded so far."""

    def __init__(self, n: int = 2, **network: float) -> None:
        self.cluster = VirtualCluster(n, **{"latency": 0.01, "jitter": 0.0, **network})  # type: ignore[arg-type]
        self.folded: list[list[int]] = [[] for _ in range(n)]
        self.mails = [CuttingMail(c, lambda c=c: list(self.folded[c.me])) for c in self.cluster.carriers]  # type: ignore[misc]

    def post(self, sender: int, receiver: int, word: int, kind: int = KIND) -> bool:
        return self.mails[sender].post(receiver, Message(kind, torch.tensor([word]), reference=word))

    def fold(self, r: int, kind: int = KIND) -> list[int]:
        """Take and fold all that is there; what it was."""
        letters = self.mails[r].take(kind)
        for letter in letters:
            self.folded[r].append(letter.message.reference)
            self.mails[r].folded(letter)
        return [letter.message.reference for letter in letters]

    def later(self, seconds: float = 0.02) -> None:
        self.cluster.advance(seconds)

    def steps(self, *ranks: int) -> None:
        """Let these members take a few steps, by turns."""
        for _ in range(4):
            for r in ranks:
                self.mails[r].between_steps()
            self.later()


def words(part: Part[Any] | None) -> tuple[Any, list[int]]:
    """What a part recorded, and what was under way."""
    assert part is not None
    bodies = [letter.message.body for letter in part.letters]
    assert [int(body) for body in bodies if body is not None] == [x.message.reference for x in part.letters]
    return part.state, [letter.message.reference for letter in part.letters]


def test_what_is_behind_a_marker_is_handed_out_after_the_own_record() -> None:
    m = Members()
    m.post(0, 1, 10)
    m.mails[0].begin_cut(1)
    m.post(0, 1, 11, KIND + 1)
    m.later()
    assert m.fold(1, KIND + 1) == []
    assert m.fold(1) == [10]
    m.later(0.5)
    m.mails[1].between_steps()
    (late,) = m.mails[1].take(KIND + 1)
    assert late.message.reference == 11
    assert late.seconds > 0.5  # it is older by as long as it had to stay
    m.mails[1].folded(late)
    m.later()
    m.mails[0].between_steps()
    assert words(m.mails[1].taken()) == ([10], [])
    assert words(m.mails[0].taken()) == ([], [])
    assert m.mails[0].taken() is None


def test_what_arrives_between_the_record_and_the_marker_is_under_way_and_is_folded_as_ever() -> None:
    m = Members()
    m.post(1, 0, 10)
    m.mails[0].begin_cut(1)
    m.later()
    assert m.fold(0) == [10]
    assert m.mails[0].open == 1
    m.mails[1].between_steps()
    m.later()
    m.post(1, 0, 11)
    m.later()
    assert m.fold(0) == [11]
    assert m.mails[0].open is None
    assert words(m.mails[0].taken()) == ([], [10])
    assert words(m.mails[1].taken()) == ([], [])


def test_what_is_taken_and_not_folded_is_under_way() -> None:
    m = Members()
    m.post(1, 0, 10)
    m.later()
    (held,) = m.mails[0].take(KIND)
    m.mails[0].begin_cut(1)
    m.mails[0].folded(held)
    m.later()
    m.mails[1].between_steps()
    m.later()
    m.mails[0].between_steps()
    assert words(m.mails[0].taken()) == ([], [10])


def test_nothing_is_posted_before_the_marker() -> None:
    m = Members()
    carrier = m.cluster.carriers[0]
    assert carrier.post(1, Message(CUT, reference=1))  # the marker's slot is taken
    m.mails[0].begin_cut(1)
    assert carrier.free(1, KIND)
    assert not m.mails[0].free(1, KIND)
    assert not m.post(0, 1, 10)
    m.later()
    m.mails[1].between_steps()
    m.later()
    assert m.post(0, 1, 10)
    assert not carrier.free(1, CUT)


@pytest.mark.parametrize("away", ["frozen", "still to come"])
def test_a_member_that_is_away_delays_a_cut_and_nobody_waits(away: str) -> None:
    m = Members(3, silence=0.1)
    if away == "frozen":
        m.cluster.freeze(2, 1.3)
    else:
        m.cluster.join(2, at=1.3)
    m.later(0.2)
    m.mails[0].begin_cut(1)
    m.later()
    m.mails[1].between_steps()
    for k in range(30):
        assert m.post(0, 1, k)
        m.later()
        assert m.fold(1) == [k]
        m.later()
    assert m.mails[0].open == m.mails[1].open == 1
    m.steps(0, 1, 2)
    assert [words(mail.taken()) for mail in m.mails] == [([], []), ([], []), ([], [])]


def test_the_next_cut_is_recorded_when_the_last_has_ended_here() -> None:
    m = Members(3)
    for mail in m.mails[:2]:
        mail.begin_cut(1)
    m.cluster.cut(1, 2, seconds=0.5)  # 2's marker is late at 1
    m.later()
    for r in (2, 1):
        m.mails[r].between_steps()
    m.later()
    m.mails[0].between_steps()
    assert m.mails[0].open is None
    m.mails[0].begin_cut(2)
    m.post(0, 1, 10)
    m.later()
    m.mails[1].between_steps()
    assert m.mails[1].open == 1
    assert m.fold(1) == []
    m.later(0.5)
    m.steps(0, 1, 2)
    assert m.fold(1) == [10]
    parts = [[mail.taken(), mail.taken()] for mail in m.mails]
    assert [[part.number for part in both if part] for both in parts] == [[1, 2]] * 3
    assert all(words(part) == ([], []) for both in parts for part in both)


def test_several_initiators_of_one_number_make_one_cut_and_an_old_number_makes_none() -> None:
    m = Members(4)
    for mail in m.mails:
        mail.begin_cut(3)
        mail.begin_cut(3)
    m.later()
    for mail in m.mails:
        mail.between_steps()
        mail.begin_cut(2)
        assert mail.open is None
    assert set(put_together([part for mail in m.mails if (part := mail.taken())])) == {0, 1, 2, 3}
    assert [mail.taken() for mail in m.mails] == [None] * 4


def test_one_member_is_a_cut_at_once() -> None:
    m = Members(1)
    m.mails[0].begin_cut(1)
    assert words(m.mails[0].taken()) == ([], [])


# -- deaths ------------------------------------------------------------------------------------------------------------


def dying(at: float) -> Members:
    """Three members; 2 posts to 1 and is killed; only its marker to 0 arrived."""
    m = Members(3, silence=0.1)
    m.mails[0].begin_cut(1)
    m.later()
    m.mails[1].between_steps()
    m.post(2, 1, 10)
    m.cluster.cut(1, 2, seconds=9.0)
    m.mails[2].between_steps()
    m.later()
    m.cluster.kill(2)
    m.later(at)
    for r in (0, 1):
        m.mails[r].between_steps()
    return m


def test_a_cut_is_given_up_when_a_member_dies_before_its_marker() -> None:
    m = dying(0.5)
    parts = [m.mails[r].taken() for r in (0, 1)]
    assert [part.deaths for part in parts if part] == [(), (2,)]
    assert parts[1] is not None
    assert parts[1].letters == []
    with pytest.raises(ValueError, match=r"cut 1 was given up: rank 2 died before its marker reached rank 1; begin"):
        put_together([part for part in parts if part])
    m.mails[1].begin_cut(2)
    m.steps(0, 1)
    assert set(put_together([part for r in (0, 1) if (part := m.mails[r].taken())])) == {0, 1}


def test_a_cut_that_a_death_came_between_is_none() -> None:
    m = Members(3, silence=0.1)
    m.mails[0].begin_cut(1)
    m.later()
    m.mails[2].between_steps()
    m.later()
    m.cluster.kill(2)
    m.later(0.5)
    for r in (1, 0):
        m.mails[r].between_steps()
        m.later()
    parts = [part for r in (0, 1) if (part := m.mails[r].taken())]
    assert [part.members for part in parts] == [(0, 1, 2), (0, 1)]
    with pytest.raises(
        ValueError, match=r"rank 0 recorded cut 1 among ranks \(0, 1, 2\), but these are parts of cut 1 by"
    ):
        put_together(parts)


def test_the_dead_ask_for_nothing_and_hold_nothing_back() -> None:
    """The marker of a member that died is forgotten with it, and what it had posted behind it is handed out."""
    m = Members(3, silence=0.1)
    m.mails[2].begin_cut(9)
    m.post(2, 0, 10)
    m.later()
    assert m.fold(0) == []
    m.cluster.kill(2)
    m.later(0.5)
    m.mails[0].between_steps()
    assert m.mails[0].open is None
    assert m.fold(0) == [10]


def test_what_the_dead_had_posted_is_under_way_until_it_is_folded() -> None:
    m = Members(2, silence=0.1)
    m.post(1, 0, 10)
    m.later()
    m.cluster.kill(1)
    m.later(0.5)
    m.mails[0].begin_cut(1)
    assert words(m.mails[0].taken()) == ([], [10])
    assert m.fold(0) == [10]


def test_what_was_lost_unheard_of_is_in_the_part_and_told_again() -> None:
    m = Members(3, silence=0.1)
    m.post(0, 2, 10)
    m.cluster.kill(2)
    m.later(0.5)
    m.mails[0].begin_cut(1)
    assert [loss.message.reference for loss in m.mails[0].lost()] == [10]
    m.later()
    m.mails[1].between_steps()
    m.later()
    m.mails[0].between_steps()
    part = m.mails[0].taken()
    assert part is not None
    restored = CuttingMail(Members(2).cluster.carriers[0], list, letters=part.letters, losses=part.losses)
    assert [loss.message.reference for loss in restored.lost()] == [10]
    assert restored.lost() == []


# -- meetings, restoring -----------------------------------------------------------------------------------------------


def test_before_a_meeting_the_newest_cut_is_ended() -> None:
    m = Members(3)
    m.post(1, 2, 10)
    m.mails[0].begin_cut(4)
    programs = {r: mail.finish(Rounds(m.cluster.carriers[r])) for r, mail in enumerate(m.mails)}
    m.cluster.run(programs)
    cut = put_together([part for mail in m.mails if (part := mail.taken())])
    assert {part.number for part in cut.values()} == {4}
    assert [words(part)[1] for part in cut.values()] == [[], [], [10]]


def test_finishing_says_for_whom_it_waits() -> None:
    m = Members()
    m.mails[0].begin_cut(1)
    absent = Rounds(m.cluster.carriers[1]).agree(b"0", what="cut")
    with pytest.raises(Deadlock, match="member 0 waits for rank 1 to take part in cut 1"):
        m.cluster.run({0: m.mails[0].finish(Rounds(m.cluster.carriers[0])), 1: absent})


def test_a_restored_letter_is_delivered_first_and_has_a_number_of_its_own() -> None:
    letters = [Letter(1, k, Message(KIND, reference=k), 0.0) for k in (7, 9)]
    cluster = VirtualCluster(2)
    mail = CuttingMail(cluster.carriers[0], list, letters=letters)
    cluster.carriers[1].post(0, Message(KIND, reference=1))
    cluster.advance(0.1)
    taken = mail.take(KIND)
    assert [(x.message.reference, x.number) for x in taken] == [(7, -2), (9, 0), (1, 1)]
    for letter in taken:
        mail.folded(letter)
    cluster.advance(0.1)
    assert cluster.carriers[1].free(0, KIND)


def test_a_number_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="the `number` of a cut must be at least 1, got 0"):
        Members(1).mails[0].begin_cut(0)
