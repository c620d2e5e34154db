"""The contract of `mail` when a peer is killed or freezes in the middle, on every carrier there is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lightning_async.transport.mail import Message
from tests.transport.far_worlds import FAR, PATIENCE, FarWorld, far_world, full, value_of
from tests.transport.worlds import KIND

__all__ = ["far_world"]
BESIDE = KIND + 1
"""What members 0 and 1 send each other."""


@dataclass
class Traffic:
    """Members 0 and 1 post 1, 2, 3, ... to member 2 whenever its slot is free, and fold all that it posts."""

    world: FarWorld
    posted: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    got: dict[int, list[float]] = field(default_factory=lambda: {0: [], 1: []})
    numbers: dict[int, list[int]] = field(default_factory=lambda: {0: [], 1: []})

    def go_on(self) -> None:
        for carrier in self.world.carriers:
            me = carrier.me
            self.posted[me] += carrier.post(FAR, Message(KIND, full(self.posted[me] + 1)))
            self.fold(me)

    def fold(self, me: int) -> None:
        for letter in self.world.carriers[me].take(KIND):
            assert letter.peer == FAR
            self.got[me].append(value_of(letter.message.body))
            self.numbers[me].append(letter.number)
            self.world.carriers[me].folded(letter)

    def until_taken(self, count: int) -> None:
        """Go on until member 2 took so many more from each, and each from it."""
        begun = {me: (len(self.taken_from(me)), len(self.got[me])) for me in self.posted}

        def enough() -> bool:
            self.go_on()
            now = {me: (len(self.taken_from(me)), len(self.got[me])) for me in self.posted}
            return all(n >= b + count for me in begun for n, b in zip(now[me], begun[me], strict=True))

        self.world.until(enough)

    def taken_from(self, me: int) -> list[float]:
        """The values that member 2 took from `me`, in its order."""
        return [value for peer, _, value in self.world.taken if peer == me]

    def beside(self, count: int) -> None:
        """Members 0 and 1 talk with each other."""
        a, b = self.world.carriers
        for number in range(count):
            self.world.until(lambda number=number: a.post(1, Message(BESIDE, full(number))))
            letters = []
            self.world.until(lambda letters=letters: letters.extend(b.take(BESIDE)) or letters)
            assert [value_of(letter.message.body) for letter in letters] == [number]
            b.folded(letters[0])


@pytest.mark.parametrize("exchanges", [1, 5])
def test_a_peer_that_is_killed(far_world: FarWorld, exchanges: int) -> None:
    """What was posted to it is acknowledged or lost, one of the two; the others go on and do not wait for it."""
    traffic, (a, b) = Traffic(far_world), far_world.carriers
    traffic.until_taken(exchanges)
    far_world.until(lambda: traffic.go_on() or not (a.free(FAR, KIND) or b.free(FAR, KIND)))
    far_world.kill()
    begin = a.now()
    traffic.beside(10)
    assert a.now() - begin < PATIENCE / 2
    far_world.until(lambda: a.members() == b.members() == (0, 1))
    assert a.now() - begin < PATIENCE, "a closed connection and silence are enough"
    for carrier in (a, b):
        me, losses = carrier.me, carrier.lost()
        assert not carrier.free(FAR, KIND)
        assert not carrier.post(FAR, Message(BESIDE))
        assert carrier.lost() == [], "told once"
        lost = [value_of(loss.message.body) for loss in losses]
        assert all(loss.peer == FAR for loss in losses)
        assert lost in ([], [traffic.posted[me]]), "the one message of its kind that may be under way"
        acknowledged = [float(n) for n in range(1, traffic.posted[me] + 1) if n not in lost]
        taken = traffic.taken_from(me)
        assert taken[: len(acknowledged)] == acknowledged, "what was acknowledged was taken, once and in order"
        assert taken[len(acknowledged) :] in ([], lost), "it may die between folding and saying so"
        traffic.fold(me)
        assert traffic.got[me] == list(range(1, len(traffic.got[me]) + 1)), "what it sent stays, whole and in order"
        assert traffic.numbers[me] == list(range(1, len(traffic.numbers[me]) + 1))
    traffic.beside(3)


def test_a_peer_that_freezes_and_thaws(far_world: FarWorld) -> None:
    """Its mail is late; nothing is lost and nothing doubled, and meanwhile nobody waits for it."""
    traffic, (a, b) = Traffic(far_world), far_world.carriers
    traffic.until_taken(3)
    far_world.until(lambda: traffic.go_on() or not (a.free(FAR, KIND) or b.free(FAR, KIND)))
    far_world.freeze()
    begin = a.now()
    traffic.beside(10)
    far_world.until(lambda: a.live() == b.live() == (0, 1))
    assert a.now() - begin < PATIENCE / 2
    assert a.members() == b.members() == (0, 1, 2)
    assert not a.post(FAR, Message(BESIDE))
    under_way = dict(traffic.posted)
    traffic.go_on()
    assert traffic.posted == under_way, "nothing is posted to one that is not live"
    traffic.beside(3)
    far_world.thaw()
    far_world.until(lambda: a.live() == b.live() == (0, 1, 2))
    traffic.until_taken(3)
    far_world.until(lambda: all(len(traffic.taken_from(me)) == traffic.posted[me] for me in (0, 1)))
    for carrier in (a, b):
        me = carrier.me
        assert traffic.taken_from(me) == list(range(1, traffic.posted[me] + 1))
        assert traffic.got[me] == list(range(1, len(traffic.got[me]) + 1))
        assert carrier.lost() == []
    for me in (0, 1):
        numbers = [number for peer, number, _ in far_world.taken if peer == me]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_peer_that_is_killed_while_it_is_frozen(far_world: FarWorld) -> None:
    """It never thaws: what is under way to it is lost."""
    traffic, (a, b) = Traffic(far_world), far_world.carriers
    traffic.until_taken(2)
    far_world.freeze()
    far_world.until(lambda: a.live() == b.live() == (0, 1))
    far_world.kill()
    far_world.until(lambda: a.members() == b.members() == (0, 1))
    for carrier in (a, b):
        lost = {value_of(loss.message.body) for loss in carrier.lost()}
        assert lost <= {traffic.posted[carrier.me]}
        acknowledged = [float(n) for n in range(1, traffic.posted[carrier.me] + 1) if n not in lost]
        assert traffic.taken_from(carrier.me)[: len(acknowledged)] == acknowledged
    traffic.beside(3)
