"""A replay's office stands in no network: a member's mail is in its log, and the others are in one hall with it.

Office             store -- carrier -- links          waits: for the others, with a bound
ReplayedOffice     hall  -- ReplayCarrier -- log      waits: what is in the log goes on at once, the hall has turns
Place              what a Trainer asks of its cluster environment: the member's rank, and no address
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins import ClusterEnvironment

from lightning_async.strategies.office import PAGES, Office
from lightning_async.strategies.replaying import Replaying
from lightning_async.strategies.waiting import Flags
from lightning_async.transport.cluster import ClusterCarrier
from lightning_async.transport.gathering import When
from lightning_async.transport.hall import Hall, Seat
from lightning_async.transport.mail import Carrier, Wait
from lightning_async.transport.pages import Pages
from lightning_async.transport.replay import ReplayCarrier
from lightning_async.transport.rounds import Rounds

T = TypeVar("T")


class ReplayedOffice(Office):
    """A place in a run that is over: the mail is in the log, the others are in the hall."""

    def __init__(self, carrier: ReplayCarrier, replaying: Replaying, hall: Hall) -> None:
        super().__init__(interface=None, silence=1.0, patience=1.0, limit=math.inf, record=None)
        self.recording = replaying
        self._replayed, self._hall = carrier, hall
        self._seat = Seat(hall, carrier.me, carrier.ranks)
        self.ranks_of_members = carrier.ranks_of_members

    def open(
        self, environment: ClusterEnvironment | None, me: int, world: int, device: torch.device, *, fitting: bool
    ) -> None:
        """Sit down."""
        self._carrier = cast(ClusterCarrier, self._seat)  # all that is asked of it here is what every carrier can
        self.flags = Flags(self._seat)
        self.rounds = Rounds(self._seat)
        self._pages = Pages(self._layered(self._carrier), PAGES)
        self.mail: Carrier = self._replayed
        self.algorithms_rounds = Rounds(self._replayed, channel=1)

    def drive(
        self,
        waiting: Wait[T],
        sign: Callable[[], object] | None = None,
        heed: Callable[[], object] | None = None,
        *,
        leaves: When = "together",
    ) -> T:
        """What waits for the log goes on at once, what waits for the hall lets the others do something."""
        asked = self._replayed.asked
        heed = heed or (lambda: None)
        try:
            while True:
                word = next(waiting)
                heed()
                if self._replayed.asked == asked:
                    self._hall.stage.rest(word)
                asked = self._replayed.asked
        except StopIteration as end:
            heed()  # the others may be further than they were
            result: T = end.value
            return result

    def send(self) -> None:
        """What it would send is in the others' logs."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Rounds without the others, for what all decide alike."""
        rounds, me = self.rounds, self._seat.me
        self.rounds = Rounds(Seat(Hall(self._hall.stage, {me}), me, self._seat.world))
        try:
            yield
        finally:
            self.rounds = rounds

    def check_network(self, nodes: int) -> None:
        """There is none."""

    def check_alike(self, mine: Mapping[str, Any]) -> None:
        """They trained: they were."""

    def announce(self, exception: BaseException) -> None:
        """Nobody waits for a member that failed: the stage ends all."""

    def traffic(self) -> dict[Any, Any]:
        """None."""
        return {}

    def close(self) -> None:
        """Stand up."""
        if self.is_open:
            self._carrier = None
            self._seat.leave()
            self.recording.close()


class Place(ClusterEnvironment):
    """One of several members in one process."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world = rank, world

    creates_processes_externally = True
    main_address = "nowhere"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        """Nobody finds it by chance."""
        return False

    def world_size(self) -> int:
        """How many members there were."""
        return self._world

    def set_world_size(self, size: int) -> None:
        """That cannot be changed."""

    def global_rank(self) -> int:
        """Which of them this is."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """That cannot be changed."""

    def local_rank(self) -> int:
        """The only one on its device."""
        return 0

    def node_rank(self) -> int:
        """The only node."""
        return 0
