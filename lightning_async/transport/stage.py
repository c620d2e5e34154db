"""A stage for programs that must not overtake each other's messages: many threads, exactly one of them on at any time.

    main:   choose one that can go on --> let it go --> wait until it blocks or ends --> choose again
    actor:  run ... wait_for(name): not posted yet --> hand the turn back
                    rest(word): needs a word of others that no log has --> hand it back until something moved
                    park(): did all that is wanted of it --> goes on only as far as others need it

Threads serve only to pause a program in the middle of an ordinary call; nothing runs in parallel, so nothing is locked.
The process's random generators, torch's default precision and what the process says of its world (`world.seen_as`) are
each actor's own while it is on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

import torch

from lightning_async.transport import chance, world
from lightning_async.transport.log import Divergence
from lightning_async.transport.mail import Message

Program = Generator[float | str, None, Any]
Name = tuple[int, int, int, int]
"""Sender, receiver, kind and place of a message among those of its kind on that link, from 1."""


class Stop(BaseException):
    """Ends a program that is not to go on; a BaseException, so that no program's `except Exception` keeps it alive."""


class Actor:
    """A program in a thread of its own."""

    def __init__(self, member: int, program: Program, back: threading.Semaphore) -> None:
        self.member = member
        self.missing: Name | None = None
        self.word = ""
        self.seen = -1
        self.parked = False
        self.ended = False
        self.complete = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.stopping = False
        self._program = program
        self._back = back
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name=f"replay of member {member}", daemon=True)
        self._chance: chance.Chance = {}
        self._dtype = torch.get_default_dtype()
        self._view = world.seen()

    def go(self) -> None:
        """Run until it waits for something, or ends."""
        self.missing, self.word = None, ""
        outside, dtype, view = chance.taken(), torch.get_default_dtype(), world.seen()
        chance.put_back(self._chance)
        torch.set_default_dtype(self._dtype)
        world.see(self._view)
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._back.acquire()
        self._chance, self._dtype, self._view = chance.taken(), torch.get_default_dtype(), world.seen()
        chance.put_back(outside)
        torch.set_default_dtype(dtype)
        world.see(view)

    def pause(self) -> None:
        """Called by the program itself: give the turn back."""
        if not self.stopping:
            self._back.release()
            self._turn.acquire()
        if self.stopping:
            raise Stop

    def stop(self) -> None:
        """End the thread, also in the middle of the program."""
        if self._thread.ident is None:
            self._program.close()
            return
        if not self.ended:
            self.stopping = True
            self.go()
        self._thread.join()

    def _live(self) -> None:
        torch.set_num_threads(torch.get_num_threads())
        try:
            while True:
                next(self._program)
        except StopIteration as end:
            self.result, self.complete = end.value, True
        except Stop:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            self._program.close()
            self._back.release()


class Stage:
    """Lets programs run, one at a time, each as far as it comes.

    Attributes:
        posts: The messages that were posted and not taken.
        ending: Whether all are to stop, whatever they do.
        is_cut: Whether this member's log just ends, and its program is there.
        kind: What people call a member here.
        short: Who came no further, for what they wait for is behind the end of somebody's log.
    """

    def __init__(self) -> None:
        self.posts: dict[Name, Message] = {}
        self.ending = False
        self.is_cut: Callable[[int], bool] = lambda member: False
        self.kind = "member"
        self.short: list[int] = []
        self._actors: list[Actor] = []
        self._on: Actor | None = None
        self._moves = 0

    def wait_for(self, name: Name) -> Message:
        """The message of this name; the program that asks is paused until it is posted."""
        if name not in self.posts:
            if self._on is None:
                raise Divergence(f"{self._say(name)} to {self.kind} {name[1]} was not posted")
            self._on.missing = name
            self._on.pause()
        return self.posts[name]

    def post(self, name: Name, message: Message) -> None:
        """Keep a message for whoever waits for it."""
        self.posts[name] = message
        self._give_way()

    def moved(self) -> None:
        """Something happened that others may rest for."""
        self._moves += 1
        self._give_way()

    def rest(self, word: str) -> None:
        """The program that is on can do nothing until something moves; `word` says what it hopes for."""
        if self._on is not None:
            self._on.word = word
            self._on.pause()

    def park(self) -> None:
        """The program that is on has done all that is wanted of it."""
        if self._on is not None and not self._on.parked:
            self._on.parked = True
            self._on.pause()

    def run(
        self,
        programs: dict[int, Program],
        wanted: Collection[int] | None = None,
        services: Mapping[int, Program] | None = None,
    ) -> list[Actor]:
        """Run until all that are wanted (None: all) have ended or parked; the first error ends all and is raised.

        The members' services go on as far as others need them. Returns the programs without those.
        """
        back = threading.Semaphore(0)
        members = [Actor(member, program, back) for member, program in programs.items()]
        beside = [Actor(member, program, back) for member, program in (services or {}).items()]
        self._actors = actors = members + beside
        for actor in actors:
            actor.parked = actor in beside or (wanted is not None and actor.member not in wanted)
        try:
            while not all(actor.ended or actor.parked for actor in actors):
                waiting = [actor for actor in actors if not actor.ended]
                if not any(map(self._can_go, waiting)):
                    if self._end_cut(waiting):
                        continue
                    if self._wait_in_vain(waiting, {member for member in programs if self.is_cut(member)}):
                        self.short = sorted({actor.member for actor in waiting if actor in members})
                        break
                self._on = self._choose(waiting)
                self._on.seen = self._moves  # what it moves itself it may look at again
                self._on.go()
                if self._on.error is not None:
                    raise self._on.error
        finally:
            self.ending = True
            for actor in actors:
                self._on = actor
                actor.stop()
            self._on = None
        return members

    def _give_way(self) -> None:
        """Who has done all that is wanted of it does only what the others need."""
        on = self._on
        if on is None or not on.parked or on.stopping:
            return
        if any(self._can_go(actor) for actor in self._actors if not actor.parked and not actor.ended):
            on.pause()

    def _choose(self, waiting: list[Actor]) -> Actor:
        ready = [actor for actor in waiting if self._can_go(actor)]
        if ready:
            return min(ready, key=lambda actor: actor.parked)
        names = {actor: f"{self.kind} {actor.member}" for actor in waiting}
        wants = [f"{names[a]} took {self._say(a.missing)}, which no replay has posted" for a in waiting if a.missing]
        wants += [f"{names[a]} waits for {a.word}" for a in waiting if not a.missing]
        raise Divergence(f"the logs do not fit together: {'; '.join(wants)}")

    def _end_cut(self, waiting: list[Actor]) -> bool:
        """End who waits where its log ends: it was killed there, and the others went on without it."""
        ending = [actor for actor in waiting if self.is_cut(actor.member)]
        for actor in ending:
            self._on = actor
            actor.stop()
        return bool(ending)

    def _wait_in_vain(self, waiting: list[Actor], gone: set[int]) -> bool:
        """Whether all of these wait for who is gone, or for one that waits for those; a word may be anybody's."""
        while more := {a.member for a in waiting if gone and (a.missing is None or a.missing[0] in gone)} - gone:
            gone |= more
        return all(actor.member in gone for actor in waiting)

    def _can_go(self, actor: Actor) -> bool:
        if actor.missing is not None:
            return actor.missing in self.posts
        return not actor.word or actor.seen < self._moves

    def _say(self, name: Name) -> str:
        return f"message {name[3]} of kind {name[2]} of {self.kind} {name[0]}"
