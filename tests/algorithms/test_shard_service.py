"""What a member serves: each arrival is a version, its answer goes to its sender, and nobody waits for who sleeps."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.outer import outer_rule
from lightning_async.algorithms.shard_server import Rules
from lightning_async.algorithms.shard_service import ShardService
from lightning_async.algorithms.shards import ANSWER, MIRROR, MIRRORED, NOT_HERE, PULL, PUSH, PUT, SOUGHT, TAKE, place
from lightning_async.algorithms.weighting import law
from lightning_async.algorithms.wire import EXACT
from lightning_async.transport.mail import Letter, Message

SIZE, HERE, ELSEWHERE = 32, place(0, 1), place(1, 1)


def service(me: int = 0, n: int = 4, *, mirror_every: int = 100) -> ShardService:
    rules = Rules("none", law("none"), None, "shrink", outer_rule(None, lr=1.0, momentum=0.0))
    return ShardService(
        me,
        tuple(range(n)),
        {HERE: torch.zeros(SIZE)},
        {},
        blank=lambda number: torch.zeros(SIZE),
        rules=rules,
        codec=EXACT,
        mirror_every=mirror_every,
    )


def heir(version: int, *, most: int) -> ShardService:
    """A service that has a mirror of this version, of shard 1."""
    one, image = service(2, mirror_every=most), service()._new(torch.zeros(SIZE), 1)
    image.version = version
    list(one(Letter(1, 0, Message(MIRROR, image.image(), version=version, reference=ELSEWHERE), 0.0)))
    return one


def letter(peer: int, step: int, kind: int = PUSH, at: int = HERE, version: int = 0) -> Letter:
    body = torch.ones(SIZE) if kind == PUSH else None
    return Letter(peer, step, Message(kind, body, step=step, version=version, weight=UNIT, reference=at), 0.0)


def test_versions_count_arrivals_and_an_answer_goes_to_its_sender_alone() -> None:
    chance, one = random.Random(0), service()
    for version in range(1, 50):
        peer = chance.randrange(3)  # member 3 sleeps: nobody waits for it
        ((whom, answer),) = one(letter(peer, version, version=version - 1))
        assert (whom, answer.kind, answer.version, answer.echo) == (peer, ANSWER, version, version)


def test_a_pull_is_no_arrival() -> None:
    one = service()
    list(one(letter(1, 1)))
    ((whom, answer),) = one(letter(2, 1, PULL))
    assert (whom, answer.kind, answer.version) == (2, ANSWER, 1)


def test_who_does_not_own_a_shard_says_so() -> None:
    ((whom, answer),) = service()(letter(2, 5, at=ELSEWHERE))
    assert (whom, answer.weight, answer.echo, answer.body) == (2, NOT_HERE, 5, None)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_what_would_be_too_much_in_no_mirror_is_held_and_answered_when_the_mirror_is_there(most: int) -> None:
    one, answered, travelling = service(mirror_every=most), list[int](), list[Message]()
    for step in range(1, 20):
        for whom, message in one(letter(1 + step % 3, step)):
            if message.kind == MIRROR:
                assert whom == 1, "the next member"
                travelling.append(message)
            else:
                answered.append(message.echo)
    assert answered == list(range(1, most + 1)), "no more than so many are merged"
    while travelling:
        told = travelling.pop(0)
        back = Message(MIRRORED, version=told.version, reference=HERE)
        for _, message in one(Letter(1, 0, back, 0.0)):
            if message.kind == MIRROR:
                travelling.append(message)
                continue
            answered.append(message.echo)
            assert message.body is not None
            assert message.body.unique().tolist() == [message.version / 4], "the weights are those of the version"
    assert answered == list(range(1, 20)), "in the order in which they came"


@pytest.mark.parametrize("later", [10, 11])
def test_a_mirror_that_is_older_than_any_may_be_is_none(later: int) -> None:
    """It is of a time when mirrors went to this member, and then went to another."""
    one, now = heir(100, most=10), place(1, 2)
    (_, answer), *told = one(letter(3, 1, PULL, now, version=100 + later))
    assert (answer.weight == NOT_HERE) == (later > 10)
    assert [(whom, word.weight) for whom, word in told] == ([(2, SOUGHT)] if later > 10 else [])
    if later > 10:  # its own member knows better, or does not
        list(one(Letter(2, 2, Message(TAKE, torch.ones(SIZE), version=105 + later, reference=now), 0.0)))
        ((_, answer),) = one(letter(3, 3, PULL, now, version=100 + later))
        assert answer.version == 105 + later
    else:
        assert answer.version == 100


def test_an_heir_without_a_mirror_hears_once_that_it_is_sought() -> None:
    one, now = service(2), place(1, 2)
    first, second = [[*one(letter(3, step, PULL, now, version=9))] for step in (1, 2)]
    assert [(whom, answer.weight) for whom, answer in first] == [(3, NOT_HERE), (2, SOUGHT)]
    assert [(whom, answer.weight) for whom, answer in second] == [(3, NOT_HERE)]
    list(one(Letter(2, 1, Message(TAKE, torch.ones(SIZE), version=9, reference=now), 0.0)))
    ((whom, answer),) = one(letter(3, 3, PULL, now, version=9))
    assert (whom, answer.version) == (3, 9)


def test_an_old_mirror_is_better_than_the_older_weights_of_the_own_member() -> None:
    one, now = heir(100, most=10), place(1, 2)
    list(one(letter(3, 1, PULL, now, version=1000)))
    list(one(Letter(2, 2, Message(TAKE, torch.ones(SIZE), version=5, reference=now), 0.0)))
    ((_, answer),) = one(letter(3, 3, PULL, now, version=1000))
    assert answer.version == 100


def test_a_run_that_goes_on_keeps_no_mirror_of_its_beginning() -> None:
    one, now = heir(0, most=10), place(1, 2)
    list(one(Letter(2, 1, Message(PUT, torch.empty(0, dtype=torch.uint8), reference=place(0, 1)), 0.0)))
    (_, answer), (whom, word) = one(letter(3, 2, PULL, now, version=7))
    assert answer.weight == NOT_HERE
    assert (whom, word.weight) == (2, SOUGHT)
