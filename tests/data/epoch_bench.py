"""A small board and a virtual clock: members with speeds, look-ahead, interruptions and deaths, all from one seed."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator
from typing import Any, TypeVar

from lightning_async.data.order import Items
from lightning_async.data.ranges import Range
from lightning_async.data.share import Balance, make_share
from lightning_async.transport.mail import Wait

T = TypeVar("T")
Event = tuple[float, int, int]


def at_once(work: Wait[T]) -> T:
    """Run a `Wait` that finds all it waits for."""
    for _ in range(1000):
        try:
            missing = next(work)
        except StopIteration as end:
            result: T = end.value
            return result
    raise AssertionError(f"waited in vain for {missing}")


class Clock:
    def __init__(self) -> None:
        self.time = 0.0


class FakeBoard:
    """What all desks share; an answer is known `latency` after the asking, a note `beat` after it."""

    def __init__(self, clock: Clock, world: int, *, latency: float = 0.0, beat: float = 0.0) -> None:
        self.clock, self.latency, self.beat = clock, latency, beat
        self.keys: dict[str, tuple[float, bytes]] = {}
        self.counters: dict[str, int] = {}
        self.words: dict[int, list[tuple[float, bytes]]] = {}
        self.alive = set(range(world))

    def desks(self) -> list[FakeDesk]:
        return [FakeDesk(self, rank) for rank in sorted(self.alive)]


class FakeDesk:
    def __init__(self, board: FakeBoard, me: int) -> None:
        self.board, self.me = board, me
        self.pending: dict[str, deque[tuple[float, int, int]]] = {}
        self.soon: list[tuple[float, bool]] = []

    def now(self) -> float:
        return self.board.clock.time

    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self.board.alive))

    def live(self) -> tuple[int, ...]:
        return self.members()

    def propose(self, key: str, value: bytes) -> None:
        self.board.keys.setdefault(key, (self.now() + self.board.latency, value))

    def decided(self, key: str) -> bytes | None:
        since, value = self.board.keys.get(key, (float("inf"), b""))
        return value if since <= self.now() else None

    def draw(self, counter: str, amount: int) -> None:
        first = self.board.counters.get(counter, 0)
        self.board.counters[counter] = first + amount
        self.pending.setdefault(counter, deque()).append((self.now() + self.board.latency, first, amount))

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        waiting, found = self.pending.get(counter, deque()), []
        while waiting and waiting[0][0] <= self.now():
            found.append(waiting.popleft()[1:])
        return found

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        assert len(note) <= 1024
        known = self.now() + self.board.beat
        self.soon.append((self.now(), soon))
        self.board.words.setdefault(self.me, []).append((known, note))

    def notes(self) -> dict[int, bytes]:
        """The newest that is old enough to have travelled; older ones are forgotten."""
        found = {}
        for rank, words in self.board.words.items():
            while len(words) > 1 and words[1][0] <= self.now():
                words.pop(0)
            if words[0][0] <= self.now():
                found[rank] = words[0][1]
        return found


class Member:
    """Trains at its own speed, with `ahead` batches fetched beyond the one it trains on."""

    def __init__(self, share: Any, desk: FakeDesk, *, batch: int, seconds: float, ahead: int) -> None:
        self.share, self.desk, self.batch, self.seconds, self.ahead = share, desk, batch, seconds, ahead
        self.queue: deque[list[int]] = deque()
        self.ended = False
        self.finished: float | None = None
        self.last: float | None = None
        self.trained: list[int] = []
        self.waited: list[float] = []

    def life(self) -> Generator[float, None, None]:
        """Yields the seconds until it is to be resumed."""
        while True:
            yield from self._fetch()
            if not self.queue:
                self.finished = self.desk.now()
                return
            yield from self._train(self.queue.popleft())

    def _train(self, batch: list[int]) -> Generator[float, None, None]:
        self.last = self.desk.now()
        yield self.seconds * len(batch) / self.batch
        self.trained += batch
        self.share.completed(len(batch))

    def _fetch(self) -> Generator[float, None, None]:
        while not self.ended and len(self.queue) < 1 + self.ahead:
            batch = yield from self._pull(self.share.next_batch(self.batch))
            self.ended = batch is None
            if batch is not None:
                self.queue.append(batch)

    def _pull(self, work: Wait[list[int] | None]) -> Generator[float, None, list[int] | None]:
        while True:
            try:
                next(work)
            except StopIteration as end:
                batch: list[int] | None = end.value
                return batch
            self.waited.append(self.desk.now())
            yield max(1e-3, self.desk.board.latency / 10)


class Prefetching(Member):
    """One whose loader has workers: `workers * prefetch` batches are with them, one more is fetched, one is trained on.

    The loader asks for one batch whenever one comes out; what it did not get then it never asks for again.
    """

    def __init__(
        self, share: Any, desk: FakeDesk, *, batch: int, seconds: float, workers: int, prefetch: int, start: float
    ) -> None:
        super().__init__(share, desk, batch=batch, seconds=seconds, ahead=workers * prefetch)
        self.start, self.least, self.spare = start, workers, 0

    def life(self) -> Generator[float, None, None]:
        """As `Member`'s."""
        self.spare = self.ahead - self.least
        for _ in range(self.ahead):
            yield from self._put()
        yield self.start
        fetched = yield from self._out()
        while fetched is not None:
            batch, fetched = fetched, (yield from self._out())
            yield from self._train(batch)
        self.finished = self.desk.now()

    def _out(self) -> Generator[float, None, list[int] | None]:
        if not self.queue:
            return None
        batch = self.queue.popleft()
        yield from self._put()
        return batch

    def _put(self) -> Generator[float, None, None]:
        if self.ended:
            return
        batch = yield from self._pull(self.share.next_batch(self.batch, spare=self.spare > 0))
        self.ended = batch is None
        if batch:
            self.queue.append(batch)
        else:
            self.spare -= 1


def run(
    board: FakeBoard, members: list[Member], deaths: dict[int, float] | None = None, until: float = float("inf")
) -> list[Any]:
    """Play one epoch to its end, or `until` it is interrupted; a death is declared half a second after it happened."""
    deaths, lives = deaths or {}, [member.life() for member in members]
    heap: list[Event] = [(board.clock.time, rank, rank) for rank in range(len(lives))]
    heap += [(time + 0.5, -1, rank) for rank, time in deaths.items()]
    heapq.heapify(heap)
    while heap and heap[0][0] < until:
        board.clock.time, kind, rank = heapq.heappop(heap)
        if kind < 0:
            board.alive.discard(rank)
        elif board.clock.time < deaths.get(rank, float("inf")):
            pause = next(lives[rank], None)
            if pause is not None:
                heapq.heappush(heap, (board.clock.time + pause, rank, rank))
    return [member.share for member in members]


def crew(
    seconds: list[float],
    *,
    ahead: int = 0,
    batches: list[int] | None = None,
    latency: float = 0.0,
    beat: float = 0.0,
    drop_last: bool = False,
    balance: Balance = "claim",
    size: int = 0,
) -> tuple[FakeBoard, list[Member]]:
    """Members by their seconds per batch."""
    board = FakeBoard(Clock(), len(seconds), latency=latency, beat=beat)
    sizes = batches or [8] * len(seconds)
    members = [
        Member(make_share(balance, d, batch=b, drop_last=drop_last, size=size), d, batch=b, seconds=s, ahead=ahead)
        for d, b, s in zip(board.desks(), sizes, seconds, strict=True)
    ]
    return board, members


def begin(
    members: list[Member],
    total: int,
    epoch: int = 0,
    *,
    done: list[Range] | None = None,
    limit: int | None = None,
    items: Items | None = None,
) -> None:
    for member in members:
        member.ended, member.finished, member.trained = False, None, []
        member.share.begin_epoch(epoch, total=total, digest=7, done=done or [], limit=limit, items=items)


def gap(members: list[Member]) -> float:
    """Seconds between the first and the last to finish."""
    ends = [m.finished for m in members if m.finished is not None]
    return max(ends) - min(ends)
