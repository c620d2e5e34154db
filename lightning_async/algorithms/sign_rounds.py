"""One round after the other: who sends is known, what travels is packed, what all agreed on is added up.

    number    <- number + 1
    senders   all, or by the number of the round, or who said so ahead           (`sign_rules`, `sign_notices`)
    send      sheet = C(v + rest), rest <- v + rest - sheet                      (`press`, `sign_exchange`)
    silent    rest <- rest + v, or nothing
    decide    whether to send in a round to come                                 (`sign_trigger`)
    finish    wait for the others, or for nobody where nobody sends
    agreed    mean over all n ranks of their sheets, or the sum of such means

All ranks do the same in the same order, so each comes to the same bits. Who waits asks `guard` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.algorithms.press import Press, Rest, Source
from lightning_async.algorithms.sheets import Cut
from lightning_async.algorithms.sign_exchange import Exchange, Guard, Heard
from lightning_async.algorithms.sign_notices import Notices
from lightning_async.algorithms.sign_rules import Silence
from lightning_async.algorithms.sign_trigger import Trigger
from lightning_async.transport.mail import Mail, Wait


class SignRounds:
    """What one rank knows of its rounds.

    Args:
        silence: What it means that a rank does not send.
        press: Packs and unpacks.
        exchange: What travels, and how.
        warm_up: The same with whole numbers, for the first `warm` rounds.
        warm: How many those are.
        period: Where the number of the round decides: one in so many is sent.
        notices: What ranks say of rounds to come.
        trigger: When this rank sends.
        like: The flat vector.
        guard: Raises where those who are missing will never come.
        heard: Called with each sheet that counts.
    """

    def __init__(
        self,
        silence: Silence,
        press: Press,
        exchange: Exchange,
        *,
        warm_up: Exchange | None,
        warm: int,
        period: int,
        notices: Notices,
        trigger: Trigger,
        like: Tensor,
        guard: Guard,
        heard: Heard,
    ) -> None:
        self.number, self.exchange, self.notices, self.trigger = 0, exchange, notices, trigger
        self._since = 0
        self.rest = Rest(torch.zeros_like(like), tracks=silence.tracks)
        self.common = torch.zeros_like(like) if silence.tracks else None
        self._silence, self._press, self._warm_up, self._warm, self._period = silence, press, warm_up, warm, period
        self._guard, self._heard = guard, heard
        self._silent = True

    def take(self, mail: Mail, source: Source) -> Wait[bool]:
        """One round: send or not, and learn what all agreed on. Whether this rank sent."""
        self.number += 1
        number, exchange, ahead = self.number, self._exchange_now, self.notices.ahead
        if ahead == 0:
            self._decide(mail, number, source)
        senders = yield from self._senders(mail, number)
        sends = exchange.me in senders
        if sends:
            exchange.send(mail, number, source, self.rest)
        elif self._silence.keeps:
            self._press.keep(source, self.rest, exchange.cuts)
        if ahead:
            self._decide(mail, number + ahead, source)
        if senders:
            yield from exchange.finish(mail, number, senders, self._guard, self._heard)
        else:
            exchange.pass_by()
        self._silent = not senders
        return sends

    @property
    def cuts(self) -> Sequence[Cut]:
        """How the flat vector is cut once signs travel."""
        return self.exchange.cuts

    def agreed(self, onto: Tensor) -> Tensor:
        """Add to a vector what all agreed on in this round."""
        common, moved = self.common, 0.0
        if not self._silent or self._silence.reuses:
            for source, cut in self._exchange_now.agreed():
                self._press.add(source, cut, Rest(onto if common is None else common))
                if self._silence.decides and common is None:
                    moved += self._press.square(source, cut)[0]
        if common is not None:
            onto.add_(common)
            moved = float(torch.dot(common, common))
        self.trigger.remember(moved)
        return onto

    def go_on(self, number: int, common: Tensor | None) -> None:
        """So many rounds were made of other parameters too: nobody knows yet what the others sent of these."""
        self.number = self._since = number
        if self.common is not None and common is not None:
            self.common.copy_(common)

    @property
    def _exchange_now(self) -> Exchange:
        """What this round goes by: the first ones send whole numbers."""
        if self._warm_up is not None and self.number > self._warm:
            self.exchange.take_over(self._warm_up)
            self._warm_up = None
        return self._warm_up or self.exchange

    def _senders(self, mail: Mail, number: int) -> Wait[tuple[int, ...]]:
        """Who sends in this round."""
        members = self.exchange.members
        if not self._silence.decides:
            sends = not self._silence.keeps or number <= self._warm or number % self._period == 0
            return members if sends else ()
        if number <= self._first:
            return members
        return (yield from self.notices.senders(mail, number, self._guard))

    @property
    def _first(self) -> int:
        """Up to this round all send without a word."""
        remembered = self._since + max(self.trigger.history, self.notices.ahead)
        return max(remembered, self._warm + 1 if self._warm else 0)

    def _decide(self, mail: Mail, number: int, source: Source) -> None:
        """Tell the others whether this rank sends in a round to come."""
        if self._silence.decides and number > self._first:
            sends = self.trigger.decide(number, self._press, source, self.rest, self.exchange.cuts)
            self.notices.say(mail, number, sends)

    # -- what the coming rounds depend on ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is left over here and at this rank's server, and what the rule remembers."""
        return {
            "rest": self.rest.vector.cpu().clone(),
            "common": None if self.common is None else self.common.cpu().clone(),
            "exchange": self.exchange.state_dict(),
            "notices": self.notices.state_dict(),
            "trigger": self.trigger.state_dict(),
            "since": self._since,
        }

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""
        self.rest.vector.copy_(state["rest"])
        if self.common is not None:
            self.common.copy_(state["common"])
        self.exchange.load_state_dict(state["exchange"])
        self.notices.load_state_dict(state["notices"])
        self.trigger.load_state_dict(state["trigger"])
        self._since = state.get("since", 0)  # older states did not say
