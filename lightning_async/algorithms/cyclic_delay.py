"""Cyclic updates with dynamic delay: members push by turns, and what they learn adds up while they wait for theirs.

    member j
      batch, batch, batch        sum += move, or gradient  (so many batches as its speed allows: the dynamic delay)
      token   push the sum   ------------->  shard's owner, on arrival:  W += sum / n, or optimizer.step(sum / n)
      x = W, and its own     <-------------  W, version + 1;  the token goes to the next member
        moves since

Each shard has its own token, owner, version and optimizer state; shard b's token begins at member b mod n, so that all
links carry the same. "strict" (Hu et al. 2018): the ring is never left, and who has pushed waits for W: no push is more
than n - 1 versions late. "skip": nobody waits; an idle holder is passed over (see `turns`). The consensus is W.
Asynchrony begets momentum (Mitliagkas et al. 2016): late gradients move W as if there were more of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.algorithms.algorithm import UNIT, Algorithm, Shrink
from lightning_async.algorithms.compensation import How
from lightning_async.algorithms.compensation import compensation as compensated
from lightning_async.algorithms.delta_exchange import DeltaExchange
from lightning_async.algorithms.images import bundle, gathered, recut
from lightning_async.algorithms.own_service import OwnService
from lightning_async.algorithms.own_turns import OwnTurns
from lightning_async.algorithms.owners import Owners
from lightning_async.algorithms.server_groups import Groups, MakeOptimizer, check_elementwise, numbers
from lightning_async.algorithms.server_meeting import ServerMeeting
from lightning_async.algorithms.shard_server import Rules, version_of
from lightning_async.algorithms.shard_service import next_of
from lightning_async.algorithms.shards import (
    BID,
    LAST,
    MANY,
    NAMES,
    RATES,
    SERVED,
    TOKEN,
    cut,
)
from lightning_async.algorithms.taken_gradients import TakenGradients, UsedGradients
from lightning_async.algorithms.token_exchange import TokenExchange
from lightning_async.algorithms.turn_knobs import Push, Token, check_count, check_turns
from lightning_async.algorithms.turn_server import Moves, Scale
from lightning_async.algorithms.turn_service import TurnService
from lightning_async.algorithms.weighting import Bound, check_bound, law
from lightning_async.algorithms.wire import EXACT
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds


class CyclicDelay(Algorithm):
    """The member's side; what it serves is in `turn_service`.

    With push="gradient" it takes the gradients away before the optimizer of the member could step with them. With
    push="delta" that optimizer steps, and what it moved is pushed: the server adds it.

    Args:
        make_optimizer: Builds the user's optimizer, as for synchronous training; None: `optimizer` is given later, or
            never, with push="delta".
        push: What adds up: "delta" (what own steps moved), or "gradient".
        token: "skip": idle holders are passed over; "strict": the ring is never left, and members wait.
        scale: What a push counts: "sum" (each batch one n-th), "mean" (each push as one batch), or "delay" (as "sum",
            and less if it is later than in a healthy run).
        strength: How much less with scale="delay": (1 + excess)^-strength; None: 0.5.
        compensation: What is done about late pushes: "none", "lr" or "dc" (see `compensation`).
        compensation_strength: Its exponent or factor; None: 0.5 for "lr", 0.04 for "dc".
        max_accumulate: So many batches may add up; then the member waits for its turn. None: no bound.
        warm_up: Over so many own steps that bound grows from 1.
        max_delay: Pushes with an excess of more than so many versions are shrunk; "auto": 1000, or 100 rounds if that
            is more; None: none are.
        shards: How many shards; None: as many as members, at most 8.
        mirror_every: Pushes of a shard that may be in no mirror of it; None: eight for each member.

    Attributes:
        optimizer: The user's, before a run begins. The server's are made after it, and go by its numbers at each step.
        usual: Samples of a batch, on average over the members, where theirs are unlike: then a batch counts by its
            samples. None: batches count alike.
        refused: Batches whose gradients were not finite: they are not added.
        heritage: The states of all members that saved, if they are others than these, who go on from them; taken up at
            the beginning.
    """

    attends = True
    kinds: ClassVar[Mapping[int, str]] = {**NAMES, TOKEN: "token", BID: "token"}

    def __init__(
        self,
        *,
        make_optimizer: MakeOptimizer | None = None,
        token: Token = "skip",
        push: Push = "delta",
        scale: Scale = "sum",
        strength: float | None = None,
        compensation: How = "none",
        compensation_strength: float | None = None,
        max_accumulate: int | None = None,
        warm_up: int = 0,
        max_delay: Bound = "auto",
        shards: int | None = None,
        mirror_every: int | None = None,
    ) -> None:
        check_turns(
            token=token,
            push=push,
            scale=scale,
            strength=strength,
            compensation=compensation,
            max_accumulate=max_accumulate,
            warm_up=warm_up,
        )
        check_bound("max_delay", max_delay)
        check_count("shards", shards, "as many as members, at most 8")
        check_count("mirror_every", mirror_every, "eight for each member")
        self.token, self.push, self.scale, self.strength = token, push, scale, strength
        self.compensation, self.compensation_strength = compensation, compensation_strength
        self.late = compensated(compensation, compensation_strength)
        self.max_accumulate, self.warm_up, self.max_delay = max_accumulate, warm_up, max_delay
        self.shards, self.mirror_every = shards, mirror_every
        self.takes_gradients = push == "gradient"
        self.shrinks = "served gradients" if self.takes_gradients else "corrections"
        if make_optimizer is not None:
            check_elementwise(make_optimizer([nn.Parameter(torch.zeros(1))]))
        self._make_optimizer = make_optimizer
        self.optimizer: Optimizer | None = None
        self.usual: float | None = None
        self.rules = Rules("poly", law("poly", strength), max_delay, "shrink", Moves)
        self.heritage: Sequence[Mapping[str, Any]] = ()
        self._beginnings = 0

    # -- a run --------------------------------------------------------------------------------------------------------

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All have the same weights: those are the server's, version 0."""
        self._beginnings += 1
        self._samples, self._rounds = mass // UNIT, rounds
        self._images = torch.empty(0, dtype=torch.uint8)
        own = self.push == "delta"
        self._taken = UsedGradients() if own else TakenGradients(replica, self._users(replica))
        shards = cut(replica.numel, min(self.shards or MANY, mail.world))
        self.owners = Owners(rounds.carrier, len(shards), self._beginnings)
        kind = TokenExchange if self.push == "gradient" else DeltaExchange
        self.exchanges: list[TokenExchange | DeltaExchange] = [kind(shard, replica.flat, mail.me) for shard in shards]
        members = mail.members()
        first: dict[int, int] = {}
        for exchange in self.exchanges:
            number = exchange.shard.number
            exchange.belongs_to(self.owners.owner(number), self.owners.place(number))
            first[exchange.place] = members[number % len(members)]
            exchange.token = exchange.place if first[exchange.place] == mail.me else 0
        self._acting = [exchange.owner for exchange in self.exchanges]
        service = self._service(replica, mail, first)
        mail.serve((*SERVED, BID, RATES), service)
        self._own = OwnService(mail)
        self._turns = OwnTurns(self.exchanges, self.owners, self._own, self.token == "strict")
        heritage, self.heritage = self.heritage, ()
        self._inherit(heritage, replica.flat.cpu(), mail, service)

    def _service(self, replica: Replica, mail: Mail, first: Mapping[int, int]) -> TurnService:
        flat, members = replica.flat.cpu(), mail.members()
        parts = {x.place: (x.owner, flat[x.shard.part]) for x in self.exchanges}
        return TurnService(
            mail.me,
            members,
            {at: part for at, (owner, part) in parts.items() if owner == mail.me},
            {at: part for at, (owner, part) in parts.items() if next_of(owner, members) == mail.me},
            first=first,
            blank=lambda number: torch.zeros_like(self.exchanges[number].base, device="cpu"),
            skip=self.token == "skip",
            scale=self.scale,
            usual=self.usual,
            late=self.late,
            groups=Groups(self._users(replica), replica.places) if self.push == "gradient" else None,
            shards=[exchange.shard for exchange in self.exchanges],
            rules=self.rules,
            codec=EXACT,
            mirror_every=self.mirror_every,
            shrink=self._current_shrink,
        )

    def _users(self, replica: Replica) -> Optimizer:
        if self.optimizer is None:
            if self._make_optimizer is None:
                raise RuntimeError("a run needs an optimizer: give `make_optimizer`, or set `optimizer` before it")
            self.optimizer = self._make_optimizer([parameter for parameter, _ in replica.places])
        return self.optimizer

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Take the gradients away, where they are what is pushed."""
        yield from ()  # never waits
        self._taken.take()
        return []

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Add up, and push where it is this member's turn."""
        self._turns.step, alone = step, mail.members() == (mail.me,)
        self._add_up()
        if self.push == "gradient":
            yield from self._tell_rates(numbers(self._users(replica)), replica, mail, wait=alone)
        self._turns.tend(replica, mail)
        if (most := self.most) is not None:
            yield from self._until(lambda x: x.count < most, "the token", replica, mail)
        if self.token == "strict" or alone:  # alone: before the next batch, whose gradients would else be late
            yield from self._until(lambda x: not (x.asked or (alone and x.count)), "the server's answer", replica, mail)
        return self.arrived()

    @property
    def most(self) -> int | None:
        """So many batches may add up in this step."""
        most = self.max_accumulate
        return (
            most
            if most is None or self._turns.step >= self.warm_up
            else 1 + (most - 1) * self._turns.step // self.warm_up
        )

    @property
    def refused(self) -> int:
        """Batches whose gradients were not finite."""
        return self._taken.refused

    def stop(self, replica: Replica, mail: Mail) -> Wait[None]:
        """This member goes to where all wait for each other: from now on nobody may wait for its next push."""
        if self.token == "strict" or self.max_accumulate is not None:
            yield from self._meeting(replica, mail).push_all(replica, mail)

    def attend(self, replica: Replica, mail: Mail) -> None:
        """An heir that knows of no pause may give this member a turn; it may have to be an heir itself."""
        if self._turns.paused:
            self._turns.tend(replica, mail, LAST)
        else:
            self._turns.pump(replica, mail)

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """Push what is left, by turns; when all have, pull: the consensus is the server's W."""
        meeting = self._meeting(replica, mail)
        consensus = yield from meeting.consensus(replica, mail)
        self._acting, self._images = meeting.acting, (yield from self._own.images(meeting.places))
        return consensus

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """What was pulled is the base of what comes."""
        self._taken.drop()
        self._turns.paused = False

    def averaged_over(self, n: int) -> int:
        """Each batch's move counts one n-th; of gradients it is the server that steps."""
        return n if self.push == "delta" else 1

    def healthy_delay(self, n: int) -> int:
        """Between two pushes of a member, each of the others pushes once; without waiting, twice."""
        return n - 1

    def arrived(self) -> list[Arrival]:
        """What became of own pushes since the last call."""
        return self._turns.arrived()

    # -- a state at a meeting -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shards that this member acts as owner of, with their optimizers. The bases are the consensus."""
        return {
            "method": type(self).__name__,
            "shards": len(self.exchanges),
            "push": self.push,
            "step": self._turns.step,
            "refused": self.refused,
            "images": self._images,
            "owners": self._acting,
            "rates": self._own.told_rates,
            "versions": [exchange.version for exchange in self.exchanges],
            "pushes": [exchange.step for exchange in self.exchanges],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same method, on the weights of that meeting. Who had a token is given it again."""
        mine = {"method": type(self).__name__, "shards": len(self.exchanges), "push": self.push}
        for name, now in mine.items():
            if state.get(name) != now:
                raise ValueError(
                    f"the run was saved with {name} {state.get(name)!r} and goes on with {now!r}: go on with the same, "
                    "or start anew from the weights alone"
                )
        self._turns.step, self._taken.refused = state["step"], state["refused"]
        for exchange, version, pushes in zip(self.exchanges, state["versions"], state["pushes"], strict=True):
            exchange.version, exchange.step, exchange.clean = version, pushes, self._turns.step
            exchange.token = exchange.token if "rates" not in state else 0  # older images name no holder
        self._images = state["images"].clone()
        at = self.owners.were(state.get("owners"), self.exchanges)
        self._acting = [exchange.owner for exchange in self.exchanges]
        self._own.put(self._images, state.get("rates"), at=at)

    def _inherit(self, states: Sequence[Mapping[str, Any]], flat: Tensor, mail: Mail, service: TurnService) -> None:
        """Go on from the states of other members: what the server's optimizers remember is cut anew.

        Its letter is the first that the own service gets: the others push when all have begun.
        """
        mine = (type(self).__name__, self.push)
        states = [state for state in states if (state.get("method"), state.get("push")) == mine]
        old = gathered(state["images"] for state in states)
        if not old:
            return
        among = states[0]["shards"]
        owned = [exchange.shard for exchange in self.exchanges if exchange.owner == mail.me]
        self._own.put(bundle(recut(old, among, flat, owned, service.anew, count=max)))
        for exchange in self.exchanges:
            exchange.version = max(map(version_of, old.values()))

    # -- between two steps --------------------------------------------------------------------------------------------

    def _add_up(self) -> None:
        """Before anything is folded: these gradients belong to the old weights."""
        gradient = self._taken.used()
        if gradient is not None:
            for exchange in self.exchanges:
                exchange.add(gradient, self._samples)
        self._taken.drop()

    def _meeting(self, replica: Replica, mail: Mail) -> ServerMeeting:
        self._turns.pause()
        return ServerMeeting(
            list(self.exchanges),
            self.owners,
            self._rounds,
            self._turns.step,
            pump=lambda: self._turns.tend(replica, mail, LAST),
            push=lambda exchange: None,  # `pump` does, of all shards whose token has come
            pausing=False,
        )

    def _tell_rates(self, now: Tensor, replica: Replica, mail: Mail, *, wait: bool) -> Wait[None]:
        """Who is alone steps with these numbers, and not with those of the step before."""
        while not self._own.rates(now) and wait:
            yield "the own service to hear the optimizer's numbers"
            self._turns.pump(replica, mail)

    def _until(
        self, done: Callable[[TokenExchange | DeltaExchange], bool], what: str, replica: Replica, mail: Mail
    ) -> Wait[None]:
        while (waits := next((x for x in self.exchanges if not done(x)), None)) is not None:
            self._turns.say_idle(mail)
            yield f"{what} of shard {waits.shard.number}"
            self._turns.tend(replica, mail)

    def _current_shrink(self) -> Shrink:
        return self.shrink
