"""Short mail of a block is told once, at its end or before a wait; long mail and other threads' at once."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from lightning_async.transport import link
from lightning_async.transport.gathering import SHORT, Gathering
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Message
from lightning_async.transport.sender import Sender
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


def test_what_is_to_leave_later_is_told_by_the_next_send() -> None:
    """Once; by no block behind it, unless that has something for the same link."""
    gathering, one, another = Gathering(), Told(), Told()
    with gathering.gathered("later"):
        stir(gathering, one)
    with gathering.gathered():
        stir(gathering, another)
    assert (one.times, another.times) == (0, 1)
    gathering.send()
    gathering.send()
    assert (one.times, another.times) == (1, 1)
    with gathering.gathered("later"):
        stir(gathering, one)
    with gathering.gathered():
        stir(gathering, one)
    gathering.send()
    assert one.times == 2
    stir(gathering, one)
    assert one.times == 3


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


@pytest.mark.parametrize("how", ["send", "wait", "ping"])
def test_what_is_to_leave_later_leaves(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its member does next, and if that is nothing, with the link's next sign of life."""
    if how != "ping":
        monkeypatch.setattr(link, "PING", 10 * BUSY)
    world = ClusterWorld(2)
    a, b = world.carriers
    letters: list[Letter] = []
    try:
        world.until(lambda: a.free(1, FIRST_FREE_KIND) and b.free(0, FIRST_FREE_KIND))
        with a.gathered("later"):
            assert a.post(1, Message(FIRST_FREE_KIND, torch.ones(2)))
        {"send": a.send, "wait": lambda: a.wait(0.0), "ping": int}[how]()
        while not letters:
            b.wait(BUSY)
            letters.extend(b.take(FIRST_FREE_KIND))
    finally:
        world.close()


def test_what_is_folded_waits_for_the_next_post_or_for_a_wait() -> None:
    """Where posts leave at once, and behind such a block."""
    gathering, told = Gathering(), Told()
    with gathering.gathered("at once"):
        assert gathering.hurries
        stir(gathering, told)
    assert (told.times, gathering.hurries) == (0, False)
    gathering.send()
    assert told.times == 1
    with gathering.gathered("at once"):
        stir(gathering, told)
        gathering.sent(told)
        gathering.send()
    assert told.times == 1


def test_a_word_and_its_answer_are_one_header_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was folded travels with the answer, and no thread of a link has anything to do."""
    monkeypatch.setattr(link, "PING", 10 * BUSY)
    world, turns = ClusterWorld(2), 10
    carriers = world.carriers
    letters: list[Letter] = []

    def say(me: int, kind: int) -> None:
        with carriers[me].gathered("at once"):
            for letter in letters:
                carriers[me].folded(letter)
            letters.clear()
            assert carriers[me].post(1 - me, Message(kind, torch.ones(2)))
        world.until(lambda: letters.extend(carriers[1 - me].take(kind)) or letters)

    def headers(me: int) -> int:
        return carriers[me].traffic()[1 - me][0].messages_out

    try:
        world.until(lambda: all(carriers[me].free(1 - me, FIRST_FREE_KIND) for me in (0, 1)))
        for turn in range(4):  # the first header of a peer is answered for its own sake, at the latest by the next one
            say(turn % 2, FIRST_FREE_KIND)
        before = [headers(0), headers(1)]
        for turn in range(2 * turns):
            say(turn % 2, FIRST_FREE_KIND + turn // 2 % 4)
        assert [headers(0) - before[0], headers(1) - before[1]] == [turns, turns]
    finally:
        world.close()


def test_who_answers_writes_by_himself_at_the_end_of_the_block_once_for_each_link() -> None:
    """Whatever was stirred how often, by this thread; others are told."""
    gathering, told, wrote = Gathering(), Told(), list[str]()

    def stirred(name: str) -> None:
        with told:
            gathering.stir(told, SHORT + 1, lambda: wrote.append(name))

    with gathering.answering():
        stirred("first")
        stirred("again")
        assert (told.times, wrote) == (0, [])
        thread = threading.Thread(target=stirred, args=("other",))
        thread.start()
        thread.join(5)
        assert (told.times, wrote) == (1, [])
    assert (told.times, wrote) == (1, ["again"])
    stirred("behind")
    assert (told.times, wrote) == (2, ["again"])


@pytest.mark.parametrize(("links", "has_time"), [(1, True), (2, True), (2, False)])
def test_a_clerk_writes_for_several_links_if_it_has_time(links: int, has_time: bool) -> None:
    """For one it would be a detour."""
    gathering, told, wrote = Gathering(), [Told() for _ in range(links)], list[int]()

    def clerk(writes: list[Callable[[], None]]) -> bool:
        for write in writes if has_time else []:
            write()
        return has_time

    gathering.clerk = clerk
    with gathering.gathered():
        for k, changed in enumerate(told):
            with changed:
                gathering.stir(changed, 0, lambda k=k: wrote.append(k))  # type: ignore[misc]
    written = has_time and links > 1
    assert wrote == (list(range(links)) if written else [])
    assert [changed.times for changed in told] == [0 if written else 1] * links


def test_a_service_answers_in_one_header_which_says_that_the_letter_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PING", 10 * BUSY)
    world, ask, answer, turns = ClusterWorld(3), FIRST_FREE_KIND, FIRST_FREE_KIND + 1, 10
    asker, *servers = world.carriers

    def echo(letter: Letter) -> list[tuple[int, Message]]:
        return [(letter.peer, Message(answer, letter.message.body))]

    sent: list[int] = []
    send = Sender._send_header

    def counted(sender: Sender, *args: Any, **kwargs: Any) -> None:
        sent.append(sender._slots.peer)  # before it leaves: who has the answer finds it counted
        send(sender, *args, **kwargs)

    monkeypatch.setattr(Sender, "_send_header", counted)
    letters: list[Letter] = []

    def turn() -> None:
        with asker.gathered("later"):
            for letter in letters:
                asker.folded(letter)
            letters.clear()
            assert all(asker.post(server.me, Message(ask, torch.ones(2))) for server in servers)
        asker.send()
        world.until(lambda: letters.extend(asker.take(answer)) or len(letters) == len(servers))
        world.until(lambda: all(asker.free(server.me, ask) for server in servers))

    try:
        for carrier in world.carriers:
            carrier.serve([ask], echo)
        world.until(lambda: all(asker.free(s.me, ask) and s.free(0, ask) for s in servers))
        for _ in range(2):  # the first header of a peer is answered for its own sake
            turn()
        sent.clear()
        for _ in range(turns):
            turn()
        assert sent.count(asker.me) == turns * len(servers)
    finally:
        world.close()
