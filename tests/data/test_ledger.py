"""The law first: every position of an epoch is completed exactly once, or the audit says which was not."""

from __future__ import annotations

import random

import pytest

from lightning_async.data.ledger import NOTE_BYTES, Ledger, Note, audit


def ledger(*claims: tuple[int, int], completed: int | None = None) -> Ledger:
    made = Ledger(3)
    for claim in claims:
        made.claim(*claim)
    made.complete(made.claimed if completed is None else completed)
    return made


def test_law_holds_when_every_position_is_completed_once() -> None:
    assert audit([ledger((0, 4), (9, 3)), ledger((4, 5))], 12).holds


def test_law_names_what_is_missing() -> None:
    result = audit([ledger((0, 4), (9, 3), completed=5), ledger((4, 4))], 12)
    assert result.missing == [(8, 1), (10, 2)]
    assert not result.double
    assert "3 positions were never completed: [(8, 1), (10, 2)]" in str(result)


def test_law_names_what_is_double() -> None:
    result = audit([ledger((0, 4)), ledger((3, 5))], 8)
    assert result.double == [(3, 1)]
    assert "1 positions were completed more than once" in str(result)


def test_law_counts_a_position_past_the_end_as_wrong() -> None:
    assert not audit([ledger((0, 9))], 8).holds


def test_audit_agrees_with_counting_one_by_one() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        ledgers = [ledger(*[(rng.randrange(30), rng.randrange(1, 6)) for _ in range(4)]) for _ in range(2)]
        times = [sum(f <= p < f + n for made in ledgers for f, n in made.done()) for p in range(40)]
        result = audit(ledgers, 30)
        for p in range(40):
            inside = [any(f <= p < f + n for f, n in part) for part in result]
            assert inside == [p < 30 and times[p] == 0, times[p] > 1 or (p >= 30 and times[p] == 1)]


def test_completion_follows_the_order_of_claiming() -> None:
    made = ledger((40, 8), (80, 16), (120, 8), completed=20)
    assert made.unfinished() == [(92, 4), (120, 8)]
    assert made.done() == [(40, 8), (80, 12)]
    assert made.outstanding == 12
    assert made.ahead(2, 4) == [(94, 2), (120, 2)]


def test_adjoining_claims_become_one_even_when_the_first_is_finished() -> None:
    made = ledger((0, 4))
    made.claim(4, 4)
    assert made.claims == [(0, 8)]
    assert made.unfinished() == [(4, 4)]


def test_more_than_is_claimed_cannot_be_completed() -> None:
    with pytest.raises(ValueError, match="only 4 are claimed"):
        ledger((0, 4), completed=0).complete(5)


def test_note_survives_the_board() -> None:
    note = Note(7, 32, 0.5, True, 10**10, 10**10 + 9, 2**41, ((5, 4), (2**40, 5)))
    assert Note.unpack(note.pack()) == note


def test_note_never_outgrows_the_board() -> None:
    note = Note(0, 1, unfinished=tuple((3 * k, 1) for k in range(1000)), claimed=1000)
    assert len(note.pack()) <= NOTE_BYTES
    assert Note.unpack(note.pack()).claimed == 1000
