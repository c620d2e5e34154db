"""One program is on at a time, with random generators of its own; who needs others gives the turn away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightning_async.transport.hall import Hall, Seat
from lightning_async.transport.log import Divergence
from lightning_async.transport.mail import Message, Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.stage import Program, Stage, Stop

N = 3
KIND = 16


def run(life: Callable[[Stage, Seat], Program], wanted: list[int] | None = None) -> dict[int, object]:
    stage = Stage()
    hall = Hall(stage, set(range(N)))
    programs = {rank: life(stage, Seat(hall, rank, N)) for rank in range(N)}
    return {actor.member: actor.result for actor in stage.run(programs, wanted) if actor.complete}


def drive(stage: Stage, waiting: Wait[object]) -> object:
    while True:
        try:
            stage.rest(next(waiting))
        except StopIteration as end:
            return end.value


def test_rounds_in_a_hall_have_the_outcome_of_rounds() -> None:
    def life(stage: Stage, seat: Seat) -> Program:
        yield "begin"
        rounds = Rounds(seat)
        (mean,), members = drive(stage, rounds.exchange(torch.arange(5.0) * seat.me, "mean", weight=seat.me))  # type: ignore[misc]
        words = drive(stage, rounds.agree(b"%d" % seat.me))
        return mean.tolist(), members, words

    mean = ((0 + 1 + 4) / 3 * torch.arange(5.0)).tolist()
    words = {0: b"0", 1: b"1", 2: b"2"}
    assert run(life) == dict.fromkeys(range(N), (mean, (0, 1, 2), words))


def test_who_left_a_hall_is_not_waited_for() -> None:
    def life(stage: Stage, seat: Seat) -> Program:
        yield "begin"
        rounds = Rounds(seat)
        if seat.me == 1:
            seat.leave()
            raise Stop
        return drive(stage, rounds.barrier())

    assert run(life) == {0: (0, 2), 2: (0, 2)}


def test_those_who_wait_for_each_other_are_told_apart_from_those_who_wait() -> None:
    def life(stage: Stage, seat: Seat) -> Program:
        yield "begin"
        if seat.me < 2:
            drive(stage, Rounds(seat).barrier())

    told = r"do not fit together: member 0 waits for rank 2 to come to 'barrier' \(round0/1\); member 1 waits"
    with pytest.raises(Divergence, match=told):
        run(life)


@pytest.mark.parametrize(("whom", "short"), [({0: 1, 1: 2}, [0, 1]), ({1: 2}, [1]), ({0: 1, 1: 0}, None)])
def test_a_log_that_was_cut_excuses_only_those_who_wait_for_its_member(
    whom: dict[int, int], short: list[int] | None
) -> None:
    """Member 2 was killed, and its program is over: its log ends, and what came behind that was never posted."""

    def life(me: int) -> Program:
        yield "begin"
        if me in whom:
            stage.wait_for((whom[me], me, KIND, 1))

    stage = Stage()
    stage.is_cut = lambda member: member == 2
    programs = {rank: life(rank) for rank in range(N)}
    if short is None:
        told = f"do not fit together: member 0 took message 1 of kind {KIND} of member 1, which no replay has posted"
        with pytest.raises(Divergence, match=told):
            stage.run(programs)
    else:
        stage.run(programs)
        assert stage.short == short


def test_mail_in_a_hall_has_one_slot_a_kind() -> None:
    def life(stage: Stage, seat: Seat) -> Program:
        yield "begin"
        if seat.me == 0:
            body = torch.ones(2)
            first, second = seat.post(1, Message(KIND, body)), seat.post(1, Message(KIND, body))
            body.zero_()
            while not seat.free(1, KIND):
                stage.rest("the slot")
            return first, second, seat.post(1, Message(KIND))
        if seat.me == 1:
            while not (letters := seat.take(KIND)):
                stage.rest("a letter")
            assert seat.take(KIND) == []
            seat.folded(letters[0])
            return letters[0].number, letters[0].message.body.tolist()
        return None

    assert run(life) == {0: (True, False, True), 1: (1, [1.0, 1.0]), 2: None}


def test_each_program_has_random_generators_of_its_own() -> None:
    def life(stage: Stage, seat: Seat) -> Program:
        yield "begin"
        torch.manual_seed(5)
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand(1).item())
            drive(stage, Rounds(seat, channel=len(drawn)).barrier())
        return drawn

    before = torch.get_rng_state()
    results = run(life)
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == 3  # type: ignore[call-overload]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parked_program_goes_on_only_where_it_is_needed() -> None:
    steps = dict.fromkeys(range(N), 0)

    def life(stage: Stage, seat: Seat) -> Program:
        yield "begin"
        rounds = Rounds(seat)
        for step in range(1, 100):
            steps[seat.me] = step
            if step == 10:
                drive(stage, rounds.barrier())
            if step == (20 if seat.me else 5):
                stage.park()

    run(life)
    assert steps == {0: 10, 1: 20, 2: 20}
    steps.update(dict.fromkeys(range(N), 0))
    run(life, wanted=[0])
    assert steps == {0: 5, 1: 0, 2: 0}
