"""What a member tells its own service, by mail like everybody else: who lives, what it takes over, what it gives up.

member's step:  NEWS  TAKE  RETIRE  --in order, as far as the slots are free-->  shard_service  (never waits)
meeting:        SHOW  <-- its shards as bytes                a run that goes on:  RATES  PUT --> they are that
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.shard_service import next_of
from lightning_async.algorithms.shards import NEWS, PUT, RATES, RETIRE, SHOW, SHOWN, TAKE
from lightning_async.transport.mail import Mail, Message, Wait


class OwnService:
    """One member's way to its own service.

    Args:
        mail: Its mail; the service is there already, and knows who lives now.
    """

    def __init__(self, mail: Mail) -> None:
        self._mail = mail
        self._told = (mail.members(), next_of(mail.me, mail.members()))
        self._commands: list[tuple[int, Message]] = []
        self._rates: Tensor | None = None

    def tell(self, owners: Iterable[int] = ()) -> None:
        """Say what is new; of a death, to the other owners too."""
        mail = self._mail
        known = (mail.members(), self._mirror())
        if known != self._told:
            deaths, self._told, (members, mirror) = known[0] != self._told[0], known, known
            ranks = torch.tensor(members, dtype=torch.int64)
            self._commands.append((mail.me, Message(NEWS, ranks, version=-1 if mirror is None else mirror)))
            others = set(owners).intersection(members) - {mail.me} if deaths else ()
            self._commands += [(owner, Message(NEWS, ranks)) for owner in sorted(others)]
        self._post()

    def _mirror(self) -> int | None:
        """Where mirrors go. Who is cut off from all the others is succeeded by one of them: there what it merges must
        be known, or wait. Of two nobody succeeds the other."""
        mail = self._mail
        near = next_of(mail.me, mail.live())
        return next_of(mail.me, mail.members()) if near is None and len(mail.members()) > 2 else near

    def _post(self) -> None:
        """As far as the slots are free, for each in order; what was for the dead is dropped."""
        mail, kept = self._mail, []
        waiting: set[int] = set()
        for peer, message in self._commands:
            if peer in mail.members() and (peer in waiting or not mail.post(peer, message)):
                waiting.add(peer)
                kept.append((peer, message))
        self._commands = kept

    def moved(self, exchange: Exchange) -> None:
        """A shard has another place now: take it over, or forget it."""
        self._commands.append((self._mail.me, Message(RETIRE, reference=exchange.place)))
        if exchange.owner == self._mail.me:
            first = exchange.base.cpu().clone()
            take = Message(TAKE, first, version=exchange.version, reference=exchange.place)
            self._commands.append((self._mail.me, take))

    def rates(self, now: Tensor) -> bool:
        """The optimizer's numbers, if they are others than before; whether they are told: there may be no room."""
        told = self._rates is not None and torch.equal(self._rates, now)
        if not told and self._mail.post(self._mail.me, Message(RATES, now)):
            self._rates, told = now, True
        return told

    @property
    def told_rates(self) -> Tensor:
        """The numbers that the service goes by; none: it was never told any."""
        return torch.empty(0, dtype=torch.float64) if self._rates is None else self._rates

    def put(self, images: Tensor, rates: Tensor | None = None, *, at: int = 0) -> None:
        """A run goes on: the service's shards are these, and it goes by the numbers that it was told last.

        Args:
            images: The shards.
            rates: The numbers; None: none were told.
            at: A place of the generation in which it owns these shards and no others; 0: it owns those that it has.
        """
        if rates is not None and rates.numel():
            self._rates = rates
            self._commands.append((self._mail.me, Message(RATES, rates)))
        self._commands.append((self._mail.me, Message(PUT, images, reference=at)))
        self.tell()

    def images(self, places: Sequence[int] | None = None) -> Wait[Tensor]:
        """Its shards at these places, as bytes; without them, all that it owns."""
        mail = self._mail
        show = Message(SHOW, None if places is None else torch.tensor(places, dtype=torch.int64))
        self.tell()
        while any(peer == mail.me for peer, _ in self._commands) or not mail.post(mail.me, show):
            yield "the own service to hear"
            self.tell()
        while not (letters := mail.take(SHOWN)):
            yield "the own service to show its shards"
        image = letters[0].message.body
        assert image is not None  # bytes, if only none
        copy = image.clone()
        mail.folded(letters[0])
        return copy
