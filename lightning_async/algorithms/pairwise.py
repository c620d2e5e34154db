"""Pairwise: the two ends of an edge move by opposite corrections, so the mean of all replicas never changes.

    rank i (asks)                                        rank j (answers between two of its own steps)
      x_i  ---------------- ASK: x_i as it was ---------->  d = x_i - x_j
      goes on training                                      x_j += rate * m_i / (m_i + m_j) * d
      x_i -= rate * m_j / (m_i + m_j) * d  <- ANSWER: d --  (to the bit the d and the rate it used itself)

Whatever steps i takes while the answer travels stay: the answer is added. A fast member meets a slow one as often as
the slow one steps, and one sample moves the mean equally whoever saw it. Each edge has one initiator, and each member
one question open at a time; questions and answers are different kinds of messages, so no circle of members can block,
odd or even. A question over the bound is declined (nobody moves); a late answer is bounced: the answerer moves back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.gossip import Gossip
from lightning_async.algorithms.topology import onward
from lightning_async.algorithms.worth import Worth
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Loss, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

MILLION = 1_000_000  # the rate travels as an integer, so that both ends multiply by the same number
ASK, ANSWER, BOUNCE = FIRST_FREE_KIND, FIRST_FREE_KIND + 1, FIRST_FREE_KIND + 2


class Pairwise(Gossip):
    """Symmetric averages on the edges of the topology, without waiting."""

    usual_period = 2
    """At equal samples not told from each step (docs/results/accuracy.md), for fewer messages."""
    kinds: ClassVar[Mapping[int, str]] = {ASK: "ask", ANSWER: "answer", BOUNCE: "bounce"}

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """Nothing is asked, nothing is held."""
        super().begin(replica, mail, mass, rounds)
        self._scratch = torch.empty_like(replica.flat)
        self._asked: set[int] = set()  # at most one: two answers to one snapshot would overshoot
        self._held: list[Letter] = []  # questions whose answer could not be posted yet
        self._turn = 0

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Fold the answers, answer the questions, ask the next neighbour if it is time."""
        self.stepped(replica, step)
        self.pump(replica, mail)
        if step % self.period == 0:
            self._ask(replica, mail)
        yield from ()  # never waits
        return self.arrived()

    def pump(self, replica: Replica, mail: Mail) -> None:
        """Everything but asking."""
        super().pump(replica, mail)
        self._asked.intersection_update(mail.members())  # who died may have folded the question and lost the answer
        for letter in mail.take(ANSWER):
            self._fold(replica, mail, letter)
        questions, self._held = self._held + mail.take(ASK), []
        for letter in questions:
            self._answer(replica, mail, letter)
        for letter in mail.take(BOUNCE):
            self._take_back(replica, mail, letter)

    def pending(self) -> Iterable[int]:
        """Those whom this member has asked, and those whose question it holds: at a meeting there are none."""
        return self._asked.union(letter.peer for letter in self._held)

    def state_dict(self) -> dict[str, Any]:
        """Also whose turn it is."""
        return {**super().state_dict(), "turn": self._turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also whose turn it is."""
        super().load_state_dict(state)
        self._turn = state["turn"]

    def midway(self) -> dict[str, Any]:
        """Also whom it has asked. A question that is held counts as under way."""
        return {**super().midway(), "asked": sorted(self._asked)}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Also whom it has asked."""
        super().go_on(state)
        self._asked = set(state["asked"])

    def worth(self, message: Message, *, lost: bool = False) -> Worth | None:
        """An answer: the asker's move, still to come. A bounce: the answerer's, to be undone. They are equal."""
        m, both = message, {ANSWER: (message.version, message.weight), BOUNCE: (message.weight, self.mass)}
        if m.body is None or m.kind not in both or (lost and not (m.kind == ANSWER and self.in_these_accounts(m))):
            return None
        asker, answerer = both[m.kind]
        moved = m.reference / MILLION * asker * answerer / (asker + answerer)
        return Worth(m.body.to("cpu", torch.float64) * (-moved / UNIT), 0)

    def _ask(self, replica: Replica, mail: Mail) -> None:
        live = mail.live()
        edges = [peer for peer in onward(self.topology, mail.members(), mail.me) if peer in live]
        if not edges:
            return
        peer = edges[self._turn % len(edges)]
        if self._asked or not mail.free(peer, ASK):
            self.skipped += 1
            return
        question = Message(ASK, self.on_wire(replica.flat), step=self._step, weight=self.mass)
        self._turn += 1
        if mail.post(peer, question):
            self._asked.add(peer)
            self.wrote_to.add(peer)

    def _answer(self, replica: Replica, mail: Mail, letter: Letter) -> None:
        """Move towards the asker and send back its own move; if that cannot be sent, keep the question for later."""
        asked, arrival = letter.message, self.arrival(letter, self._step)
        if letter.peer not in mail.members():
            mail.folded(letter)
            return
        if not mail.free(letter.peer, ANSWER):
            self._held.append(letter)
            return
        difference, factor = None, 1.0
        if not self.late(arrival):
            difference = self._difference(replica, asked)
            factor = self.shrink(arrival, difference, partial(self.own_steps.cosine, difference))
        rate = round(self.rate(len(mail.members())) * factor * MILLION)
        answer = Message(ANSWER, difference, self._step, asked.weight, asked.step, weight=self.mass, reference=rate)
        if not mail.post(letter.peer, answer):
            self._held.append(letter)
            return
        mail.folded(letter)  # at once: so the answer itself tells of it, and no header of its own does
        if difference is None:
            self.record(arrival.refused())
        else:
            replica.shift(difference, rate / MILLION * asked.weight / (asked.weight + self.mass))
            self.record(arrival.shrunk(factor))
            self.wrote_to.add(letter.peer)

    def _difference(self, replica: Replica, asked: Message) -> Tensor:
        """What the two replicas are apart, as precisely as it can travel: both ends use the same bits."""
        assert asked.body is not None  # a question always has a body
        theirs = asked.body.to(replica.device)
        return self.on_wire(torch.sub(theirs, replica.flat, out=self._scratch))

    def _fold(self, replica: Replica, mail: Mail, letter: Letter) -> None:
        """The answer to my question: move by the opposite of what the answerer moved by."""
        answer, arrival = letter.message, self.arrival(letter, self._step)
        self._asked.discard(letter.peer)
        if answer.body is not None and self.late(arrival):
            self._send_back(mail, letter)
            self.record(arrival.refused())
        elif answer.body is not None:
            difference = answer.body.to(replica.device)
            factor = self.shrink(arrival, difference, partial(self.own_steps.cosine, difference, -1.0))
            move = answer.reference / MILLION * answer.weight / (answer.weight + self.mass)
            replica.shift(difference, -factor * move)
            if factor < 1:
                self.ledger.enter(Fate.SHRUNK, difference, (factor - 1) * move * self.mass / UNIT)
            self.record(arrival.shrunk(factor))
        mail.folded(letter)

    def _send_back(self, mail: Mail, letter: Letter) -> None:
        """Have the answerer undo its move. Behind a marker nothing may be posted: then the ledger takes it."""
        answer = letter.message
        assert answer.body is not None  # only answers that moved somebody are sent back
        back = replace(answer, kind=BOUNCE, step=self._step, echo=answer.step, weight=self.mass)
        if self.settling or not mail.post(letter.peer, back):
            move = answer.reference / MILLION * answer.weight / (answer.weight + self.mass)
            self.ledger.enter(Fate.REFUSED, answer.body, -move * self.mass / UNIT)

    def _take_back(self, replica: Replica, mail: Mail, letter: Letter) -> None:
        """My answer came too late: undo my side of it, however late that is."""
        back = letter.message
        assert back.body is not None  # a bounce returns the body of an answer
        move = back.reference / MILLION * back.weight / (back.weight + self.mass)
        replica.shift(back.body.to(replica.device), -move)
        mail.folded(letter)

    def lose(self, replica: Replica, loss: Loss) -> None:
        """Of an answer, only my own side was applied."""
        message = loss.message
        if message.kind == ANSWER and message.body is not None and self.in_these_accounts(message):
            move = message.reference / MILLION * message.version / (message.weight + message.version)
            self.ledger.enter(Fate.LOST, message.body, -move * message.weight / UNIT)
