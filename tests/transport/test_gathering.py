"""Short mail of a block is told once, at its end or before a wait; long mail and other threads' at once."""

import threading
from contextlib import suppress

import pytest
import torch

from lightning_async.transport import link
from lightning_async.transport.gathering import SHORT, Gathering
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Message
from tests.transport.cluster_world import ClusterWorld
from tests.transport.worlds import BUSY


class Told(threading.Condition):
    """Counts how often it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def notify_all(self) -> None:
        """Once more."""
        self.times += 1
        super().notify_all()


def stir(gathering: Gathering, changed: Told, nbytes: int = 0) -> None:
    """As slots do."""
    with changed:
        gathering.stir(changed, nbytes)


def test_a_block_tells_each_link_once_at_its_end_and_no_other() -> None:
    """However often it was stirred."""
    gathering, one, another, third = Gathering(), Told(), Told(), Told()
    with gathering.gathered():
        for _ in range(3):
            stir(gathering, one)
        stir(gathering, another)
        assert (one.times, another.times) == (0, 0)
    assert (one.times, another.times, third.times) == (1, 1, 0)
    gathering.send()
    assert one.times == 1


def test_outside_of_a_block_and_behind_an_exception_nothing_is_kept_back() -> None:
    """What an exception leaves behind is sent as well."""
    gathering, told = Gathering(), Told()
    stir(gathering, told)
    assert told.times == 1
    with suppress(RuntimeError), gathering.gathered():
        stir(gathering, told)
        raise RuntimeError
    assert told.times == 2
    stir(gathering, told)
    assert told.times == 3


def test_long_mail_and_that_of_other_threads_goes_at_once() -> None:
    """A service's answer does not wait for this member's step."""
    gathering, long, other = Gathering(), Told(), Told()
    with gathering.gathered():
        stir(gathering, long, SHORT + 1)
        thread = threading.Thread(target=stir, args=(gathering, other))
        thread.start()
        thread.join(5)
        assert (long.times, other.times) == (1, 1)


def test_blocks_nest() -> None:
    """The inner one's end sends what there is, and the outer one gathers on."""
    gathering, told = Gathering(), Told()
    with gathering.gathered():
        with gathering.gathered():
            stir(gathering, told)
        stir(gathering, told)
        assert told.times == 1
    assert told.times == 2


def test_a_member_that_waits_has_sent_what_it_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no ping of the link would come to its help."""
    monkeypatch.setattr(link, "PING", 10 * BUSY)
    world = ClusterWorld(2)
    a, b = world.carriers
    try:
        world.until(lambda: a.free(1, FIRST_FREE_KIND) and b.free(0, FIRST_FREE_KIND))
        with a.gathered():
            assert a.post(1, Message(FIRST_FREE_KIND, torch.ones(2)))
            letters: list[Letter] = []
            world.until(lambda: letters.extend(b.take(FIRST_FREE_KIND)) or letters)  # it waits at the first member
    finally:
        world.close()
