"""A stage for programs that must not overtake each other's messages: many threads, exactly one of them on at any time.

    main:   choose one that can go on --> let it go --> wait until it blocks or ends --> choose again
    actor:  run ... wait_for(name): not posted yet --> hand the turn back

Threads serve only to pause a program in the middle of an ordinary call; nothing runs in parallel, so nothing is locked.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import torch

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
        self.ended = False
        self.complete = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.stopping = False
        self._program = program
        self._back = back
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name=f"replay of member {member}", daemon=True)

    def go(self) -> None:
        """Run until it waits for a message, or ends."""
        self.missing = None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._back.acquire()

    def pause(self, name: Name) -> None:
        """Called by the program itself: give the turn back until `name` was posted."""
        self.missing = name
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
    """Lets programs run, one at a time, each as far as it comes."""

    def __init__(self) -> None:
        self.posts: dict[Name, Message] = {}
        self._on: Actor | None = None

    def wait_for(self, name: Name) -> Message:
        """The message of this name; the program that asks is paused until it is posted."""
        if name not in self.posts:
            if self._on is None:
                raise Divergence(f"{_say(name)} to member {name[1]} was not posted")
            self._on.pause(name)
        return self.posts[name]

    def run(self, programs: dict[int, Program]) -> list[Actor]:
        """Run all to their ends; the first error ends all and is raised."""
        back = threading.Semaphore(0)
        actors = [Actor(member, program, back) for member, program in programs.items()]
        try:
            while waiting := [actor for actor in actors if not actor.ended]:
                self._on = self._choose(waiting)
                self._on.go()
                if self._on.error is not None:
                    raise self._on.error
        finally:
            for actor in actors:
                self._on = actor
                actor.stop()
            self._on = None
        return actors

    def _choose(self, waiting: list[Actor]) -> Actor:
        for actor in waiting:
            if actor.missing is None or actor.missing in self.posts:
                return actor
        wants = "; ".join(f"member {a.member} took {_say(a.missing)}" for a in waiting if a.missing)
        raise Divergence(f"the logs do not fit together: {wants}, which no replay has posted")


def _say(name: Name) -> str:
    return f"message {name[3]} of kind {name[2]} of member {name[0]}"
