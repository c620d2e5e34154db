"""A member's service: one thread that gives letters to it in the order of their arrival, and posts what it answers.

    receiver threads --put--> [ letters ] --> service(letter) --> answers --post--> slots of the peers, in one header
    training thread  --loop-->     ^                                |  slot taken, peer silent: they stay
                     --jobs-->     +------- one thread -------------+  in [ owed ], in order, until they can go

An answer that stays is copied, since the service may change meanwhile what it stands on. What is owed to the dead is
forgotten. The thread waits for a letter, or for news of a slot; while something is owed it also looks by itself.

While it waits it is its member's clerk: it writes what the training thread has gathered for several links. What that
posts to its own service is gathered, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_async.transport.gathering import Gathering
from lightning_async.transport.mail import Letter, Message, Service

LOOK = 0.2
"""Seconds between looks for a free slot while something is owed."""
LATEST = 0.5
"""Seconds between looks for letters of the own member that it forgot to tell of (a link takes `link.PING`)."""


class ServiceThread:
    """Runs a service beside the training.

    Args:
        me: Whose service it is.
        post: Posts a message, or answers False.
        folded: Gives a letter back.
        gathering: What is gathered of its member's mail.
        gone: Whether a peer is dead.
        failed: Called with what the service raises.
    """

    def __init__(
        self,
        me: int,
        *,
        post: Callable[[int, Message], bool],
        folded: Callable[[Letter], None],
        gathering: Gathering,
        gone: Callable[[int], bool],
        failed: Callable[[Exception], None],
    ) -> None:
        self.kinds: set[int] = set()
        self._folded, self._failed, self._gathering = folded, failed, gathering
        self._owed = Owed(post, gone)
        self._me = me
        self._service: Service | None = None
        self._changed = threading.Condition()
        self._letters: deque[Callable[[], Letter]] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._stop = self._nudged = False
        self._idle = True
        self._thread = threading.Thread(target=self._run, name=f"service-{me}", daemon=True)

    def begin(self, service: Service) -> None:
        """From the next letter on it is this service."""
        self._service = service
        if self._thread.ident is None:
            self._thread.start()
        self._gathering.clerk = self.write

    def put(self, letter: Callable[[], Letter]) -> None:
        """A letter has come; it is dated when its turn comes."""
        with self._changed:
            self._letters.append(letter)
            if self._gathering.hurries:
                self._changed.notify_all()
            else:
                self._gathering.stir(self._changed)

    def write(self, jobs: list[Callable[[], None]]) -> bool:
        """Do this at once, and before anything else; False if it is busy."""
        with self._changed:
            if not self._idle or self._stop:
                return False
            self._jobs += jobs
            self._changed.notify_all()
            return True

    def nudge(self) -> None:
        """Something changed: what is owed may go now."""
        if self._owed:
            with self._changed:
                self._nudged = True
                self._changed.notify()

    def stop(self) -> None:
        """No letter is served any more; the one in hand is."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be served or posted."""
        return not self._letters and not self._owed

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (letter := self._next()) is not None or self._jobs or not self._stop:
                while self._jobs:
                    self._jobs.popleft()()
                if letter is not None:
                    self._serve(letter())
                self._owed.pay()
        except Exception as error:  # a service must not end in silence: its member says why and stops
            self._failed(error)

    def _next(self) -> Callable[[], Letter] | None:
        with self._changed:
            self._idle = True
            self._changed.wait_for(self._has_news, LOOK if self._owed else LATEST)
            self._nudged = self._idle = False
            return self._letters.popleft() if self._letters and not self._stop else None

    def _has_news(self) -> bool:
        return bool(self._stop or self._letters or self._nudged or self._jobs)

    def _serve(self, letter: Letter) -> None:
        service = self._service
        assert service is not None  # letters come behind `begin`
        with self._gathering.answering():
            for peer, message in service(letter):
                self.kinds.add(message.kind)
                self._owed.post(peer, message)
            self._folded(letter)


class Owed:
    """Answers that could not go yet, in order for each peer and kind.

    Args:
        post: Posts a message, or answers False.
        gone: Whether a peer is dead.
    """

    def __init__(self, post: Callable[[int, Message], bool], gone: Callable[[int], bool]) -> None:
        self._post, self._gone = post, gone
        self._waiting: list[tuple[int, Message]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def post(self, peer: int, message: Message) -> None:
        """Post it now, or keep a copy for later."""
        if not self._goes(peer, message, self._waiting):
            self._waiting.append((peer, kept(message)))

    def pay(self) -> None:
        """Post what can go now; forget what is for the dead."""
        still: list[tuple[int, Message]] = []
        for peer, message in self._waiting:
            if not self._gone(peer) and not self._goes(peer, message, still):
                still.append((peer, message))
        self._waiting = still

    def _goes(self, peer: int, message: Message, before: list[tuple[int, Message]]) -> bool:
        waits = any((peer, message.kind) == (other, earlier.kind) for other, earlier in before)
        return not waits and self._post(peer, message)


def kept(message: Message) -> Message:
    """A copy that stays as it is."""
    return message if message.body is None else replace(message, body=message.body.detach().clone())


class Loop:
    """A member's way to its own service and back: a slot for each kind, and no wire.

    Args:
        me: The member.
        deliver: Where a message goes that is posted here, with its number.
    """

    def __init__(self, me: int, deliver: Callable[[int, int, Message], None]) -> None:
        self._me, self._deliver = me, deliver
        self._lock = threading.Lock()
        self._unfolded: dict[int, int] = {}
        self._buffers: dict[int, Tensor] = {}
        self._number = 0

    def free(self, kind: int) -> bool:
        """Whether the slot of this kind is free."""
        return kind not in self._unfolded

    def post(self, message: Message) -> bool:
        """Copy the message and deliver it at once, if its slot is free. Each kind is posted by one thread only."""
        if not self.free(message.kind):
            return False
        copy = replace(message, body=self._copied(message), echo=max(0, message.echo))
        with self._lock:
            self._number += 1
            self._unfolded[message.kind] = number = self._number
        self._deliver(self._me, number, copy)
        return True

    def _copied(self, message: Message) -> Tensor | None:
        """In a buffer that is kept: the slot is free, so nobody reads it."""
        body = message.body
        if body is None:
            return None
        buffer = self._buffers.get(message.kind)
        if buffer is None or (buffer.shape, buffer.dtype) != (body.shape, body.dtype):
            buffer = self._buffers[message.kind] = torch.empty_like(body, device="cpu")
        return buffer.copy_(body.detach())

    def folded(self, letter: Letter) -> None:
        """The letter was used: its slot is free."""
        with self._lock:
            if self._unfolded.get(letter.message.kind) != letter.number:
                raise ValueError(f"letter {letter.number} of member {letter.peer} was given back already")
            del self._unfolded[letter.message.kind]
