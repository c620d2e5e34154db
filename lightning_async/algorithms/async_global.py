"""Asynchronous global update: members train on their own, push what they have moved, and pull the newest weights.

    member j     x: own weights    base: the server's, as last pulled
      step, step, step
      push       c = x - base  ------------->  shard's owner, on arrival:  W += gamma * Q * c,  version + 1
      step, step                               (its service: beside its own training)
      x += W - (base + c),  base = W  <------  W

The answer is folded as a correction, so the steps that were taken meanwhile stay. W - (base + c) is computed as the
server computes it: with one member it is zero, to the bit. Each shard of the flat vector has its own owner, version and
exchange; nobody waits between meetings. The consensus is W. After BPT-CNN (Chen et al. 2019, AGWU), and what
asynchronous local SGD has learnt since (Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT, Algorithm, Shrink
from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.images import bundle, gathered, recut
from lightning_async.algorithms.local_steps import LocalSteps, Period, check_local_steps
from lightning_async.algorithms.outer import Rule, outer_rule
from lightning_async.algorithms.own_service import OwnService
from lightning_async.algorithms.owners import Owners
from lightning_async.algorithms.server_meeting import ServerMeeting
from lightning_async.algorithms.shard_server import OnLate, Rules, ShardServer, version_of
from lightning_async.algorithms.shard_service import ShardService, next_of
from lightning_async.algorithms.shards import (
    ANSWER,
    LAST,
    MANY,
    NAMES,
    NOT_HERE,
    PUSH,
    SERVED,
    SOUGHT,
    cut,
)
from lightning_async.algorithms.sign_wire import codecs
from lightning_async.algorithms.weighting import Attenuation, Bound, check_bound, law
from lightning_async.algorithms.wire import Wire, Wires, check_wire
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Mail, Wait
from lightning_async.transport.rounds import Rounds

MOST = 1 << 22
"""Numbers that a step folds, and pushes, unless one shard has more: some tens of milliseconds of memory's time."""


class AsyncGlobal(Algorithm):
    """The member's side; what it serves is in `shard_service`.

    Args:
        local_steps: Steps between two pushes; "speed": `pace` for the fastest member, fewer for slower ones, so that
            all push equally often; "epoch": at meetings only (the paper's).
        pace: See `local_steps`.
        attenuation: The law of late arrivals (see `weighting`).
        strength: Its parameter.
        max_delay: Arrivals with an excess of more than so many versions are late; "auto": 1000, or 100 rounds if that
            is more; None: none are.
        on_late: What becomes of them: "shrink", "drop", or "wait" (fast members wait instead).
        outer: The server's rule (see `outer`); None: "delayed_nesterov" with a momentum, else "sum".
        outer_lr: Its learning rate.
        outer_momentum: Its momentum.
        shards: How many shards; None: as many as members, at most 8.
        mirror_every: Arrivals of a shard that may be lost with its owner; None: eight for each member.
        wire: What travels: "fp32", "bf16", or "sign" (corrections as signs, weights as bf16).

    Attributes:
        accuracy: Asked before each push: what it counts beside others.
        heritage: The states of all members that saved, if they are others than these, who go on from them; taken up at
            the beginning.
    """

    attends = True
    kinds: ClassVar[Mapping[int, str]] = NAMES

    def __init__(
        self,
        *,
        local_steps: LocalSteps = 1,
        pace: int = 8,
        attenuation: Attenuation = "hinge",
        strength: float | None = None,
        max_delay: Bound = "auto",
        on_late: OnLate = "shrink",
        outer: Rule | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        shards: int | None = None,
        mirror_every: int | None = None,
        wire: Wire = "fp32",
    ) -> None:
        check_local_steps(local_steps, pace)
        _check_late(max_delay, on_late)
        _check_count("shards", shards, "as many as members, at most 8")
        _check_count("mirror_every", mirror_every, "eight for each member")
        self.local_steps, self.pace, self.shards, self.mirror_every = local_steps, pace, shards, mirror_every
        self.attenuation, self.strength, self.max_delay, self.on_late = attenuation, strength, max_delay, on_late
        self.outer, self.outer_lr, self.outer_momentum, self.wire = outer, outer_lr, outer_momentum, wire
        make_outer = outer_rule(outer, lr=outer_lr, momentum=outer_momentum)
        self.rules = Rules(attenuation, law(attenuation, strength), max_delay, on_late, make_outer)
        check_wire(wire)
        self.accuracy: Callable[[], float] = perfect
        self.heritage: Sequence[Mapping[str, Any]] = ()
        self._beginnings = 0

    # -- a run --------------------------------------------------------------------------------------------------------

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All have the same weights: those are the server's, version 0."""
        self._beginnings += 1
        self._mass, self._rounds, self._step, self._me = mass, rounds, 0, mail.me
        self._arrivals: list[Arrival] = []
        self._unfolded: list[Letter] = []
        self._images = torch.empty(0, dtype=torch.uint8)
        self.period = Period(self.local_steps, self.pace)
        self._elsewhere, self._at_home = 0, dict[int, int]()
        flat, shards = replica.flat.cpu(), cut(replica.numel, min(self.shards or MANY, mail.world))
        self.owners = Owners(rounds.carrier, len(shards), self._beginnings)
        codec, theirs = (codecs(self.wire, shards, replica.places, like) for like in (replica.flat, flat))
        self.exchanges = [Exchange(shard, replica.flat, codec.of(shard.number), mail.me) for shard in shards]
        for exchange in self.exchanges:
            exchange.belongs_to(self.owners.owner(exchange.shard.number), self.owners.place(exchange.shard.number))
        self._acting = [exchange.owner for exchange in self.exchanges]
        mine = {exchange.place: flat[exchange.shard.part] for exchange in self.exchanges if exchange.owner == mail.me}
        behind = {
            exchange.place: flat[exchange.shard.part]
            for exchange in self.exchanges
            if next_of(exchange.owner, mail.members()) == mail.me
        }
        mail.serve(SERVED, self._service(mail, mine, behind, theirs))
        self._own = OwnService(mail)
        heritage, self.heritage = self.heritage, ()
        self._inherit(heritage, flat, mail)

    def _service(
        self, mail: Mail, mine: Mapping[int, Tensor], behind: Mapping[int, Tensor], codec: Wires
    ) -> ShardService:
        return ShardService(
            mail.me,
            mail.members(),
            mine,
            behind,
            blank=lambda number: torch.zeros_like(self.exchanges[number].base, device="cpu"),
            rules=self.rules,
            codec=codec,
            mirror_every=self.mirror_every,
            shrink=self._current_shrink,
        )

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Fold what was answered, and push what is due."""
        self._step = step
        self._pump(replica, mail, most=MOST)
        self.period.stepped(mail, step)
        for exchange in self.exchanges:
            exchange.samples += self._mass // UNIT
        room: float = MOST
        for exchange in sorted(self.exchanges, key=self._turn):
            if room > 0 and self._is_due(exchange, mail.me):
                if exchange.asked and self.on_late == "wait":
                    yield from self._meeting(replica, mail).answered(exchange)
                if not exchange.asked:
                    self._push(exchange, replica, mail, PUSH)
                    room -= exchange.base.numel() if exchange.asked else 0
        return self.arrived()

    def stop(self, replica: Replica, mail: Mail) -> Wait[None]:
        """This member goes to where all wait for each other: from now on nobody may wait for its next push."""
        if self.on_late == "wait":
            yield from self._meeting(replica, mail).push_all(replica, mail)

    def attend(self, replica: Replica, mail: Mail) -> None:
        """It may have to be an heir, which it must hear of, or its mirrors must go to another member."""
        self._pump(replica, mail)

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """Push what is left; when all have, pull: the consensus is the server's W."""
        meeting = self._meeting(replica, mail)
        consensus = yield from meeting.consensus(replica, mail)
        self._acting, self._images = meeting.acting, (yield from self._own.images(meeting.places))
        self.period.pause()
        return consensus

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """What was pulled is the base of what comes."""
        for exchange in self.exchanges:
            exchange.samples, exchange.clean = 0, self._step
        self._at_home.clear()

    def averaged_over(self, n: int) -> int:
        """Each arrival counts one n-th."""
        return n

    def healthy_delay(self, n: int) -> int:
        """Between two pushes of a member, each of the others pushes once."""
        return n - 1

    def arrived(self) -> list[Arrival]:
        """What became of own corrections since the last call."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    # -- a state at a meeting -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shards that this member acts as owner of. The bases are the consensus."""
        return {
            "method": type(self).__name__,
            "shards": len(self.exchanges),
            "outer": self._rule_name(),
            "step": self._step,
            "images": self._images,
            "owners": self._acting,
            "versions": [exchange.version for exchange in self.exchanges],
            "steps": [exchange.step for exchange in self.exchanges],
            "micros": [self.period.micros, self.period.fastest],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same method, on the weights of that meeting."""
        if state.get("method") != (mine := type(self).__name__):
            raise ValueError(
                f"the state of {state.get('method', 'another method')} does not fit {mine}: go on with the method that "
                "the run was started with, or start anew from the weights alone"
            )
        for name, now in (("shards", len(self.exchanges)), ("outer", self._rule_name())):
            if state[name] != now:
                raise ValueError(
                    f"the run was saved with {name}={state[name]!r} and goes on with {now!r}: give it the same "
                    "`shards` and outer rule, or start anew from the weights alone"
                )
        self._step, (self.period.micros, self.period.fastest) = state["step"], state["micros"]
        for exchange, version, step in zip(self.exchanges, state["versions"], state["steps"], strict=True):
            exchange.version, exchange.step, exchange.clean = version, step, self._step
        self._images = state["images"].clone()
        self._own.put(self._images, at=self.owners.were(state.get("owners"), self.exchanges))
        self._acting = [exchange.owner for exchange in self.exchanges]

    def _inherit(self, states: Sequence[Mapping[str, Any]], flat: Tensor, mail: Mail) -> None:
        """Go on from the states of other members: what the outer rule remembers is cut anew.

        Its letter is the first that the own service gets: the others push when all have begun.
        """
        mine = (type(self).__name__, self._rule_name())
        states = [state for state in states if (state.get("method"), state.get("outer")) == mine]
        old = gathered(state["images"] for state in states)
        if not old:
            return
        among = states[0]["shards"]
        owned = [exchange.shard for exchange in self.exchanges if exchange.owner == mail.me]
        images = recut(old, among, flat, owned, lambda part: ShardServer(self.rules, part, mail.members()))
        self._own.put(bundle(images))
        for exchange in self.exchanges:
            exchange.version = max(map(version_of, old.values()))

    # -- between two steps --------------------------------------------------------------------------------------------

    def _pump(self, replica: Replica, mail: Mail, most: float = inf) -> None:
        """Everything but asking: never waits. What would make a step long is left to the next one."""
        mail.lost()  # what was asked of the dead is asked of others
        self._unfolded += mail.take(ANSWER)
        while self._unfolded and most > 0:
            letter = self._unfolded.pop(0)
            most -= 0 if letter.message.body is None else letter.message.body.numel()
            if letter.message.weight == SOUGHT:
                self.owners.sought(letter.message.reference)
            for exchange in self.exchanges:
                if exchange.place == letter.message.reference and exchange.asked and letter.message.weight != SOUGHT:
                    self._fold(exchange, letter, replica)
            mail.folded(letter)
        for exchange in self.exchanges:
            if self.owners.look(exchange.shard.number):
                self._move(exchange)
        self._own.tell(exchange.owner for exchange in self.exchanges)

    def _is_due(self, exchange: Exchange, me: int) -> bool:
        """The first pushes of the shards are spread over a period, so that they do not all travel at once."""
        steps = self.period.steps
        if steps is None or (exchange.owner == me and self._is_ahead(exchange)):
            return False
        early = steps * exchange.shard.number // len(self.exchanges) if exchange.step == 0 else 0
        return self._step - exchange.step >= steps - early

    def _turn(self, exchange: Exchange) -> tuple[int, int]:
        """Whose last push is oldest goes first; at the beginning each member begins with another shard."""
        return exchange.step, (exchange.shard.number - self._me) % len(self.exchanges)

    def _is_ahead(self, exchange: Exchange) -> bool:
        """A member pushes to itself as often as to the others, where a push is a matter of bytes: else its own shards
        would count so many versions of its own that all others looked late there."""
        others = sum(one.owner != exchange.owner for one in self.exchanges)
        since = self._elsewhere - self._at_home.get(exchange.shard.number, -others)
        return self.on_late != "wait" and since < others

    def _push(self, exchange: Exchange, replica: Replica, mail: Mail, kind: int) -> None:
        exchange.push(replica, mail, self._step, kind=kind, micros=self.period.micros, weight=self._weight)
        if exchange.asked and exchange.owner == mail.me:
            self._at_home[exchange.shard.number] = self._elsewhere
        elif exchange.asked:
            self._elsewhere += 1

    def _weight(self) -> int:
        """What a push counts: the paper's law knows no samples."""
        return max(1, round((UNIT if self.attenuation == "paper" else self._mass) * self.accuracy()))

    def _fold(self, exchange: Exchange, letter: Letter, replica: Replica) -> None:
        if letter.message.weight == NOT_HERE:
            self.owners.doubt(exchange.shard.number)
        else:
            self.period.fastest = letter.message.step
        self._arrivals += exchange.fold(letter, replica)

    def _move(self, exchange: Exchange) -> None:
        """A shard has a new owner."""
        number = exchange.shard.number
        exchange.belongs_to(self.owners.owner(number), self.owners.place(number))
        self._own.moved(exchange)

    def _meeting(self, replica: Replica, mail: Mail) -> ServerMeeting:
        return ServerMeeting(
            self.exchanges,
            self.owners,
            self._rounds,
            self._step,
            pump=lambda: self._pump(replica, mail),
            push=lambda exchange: self._push(exchange, replica, mail, LAST),
            pausing=self.on_late == "wait",
        )

    def _rule_name(self) -> str:
        return type(self.rules.make_outer(torch.empty(0))).__name__

    def _current_shrink(self) -> Shrink:
        return self.shrink


def perfect() -> float:
    """Every correction counts alike."""
    return 1.0


def _check_late(max_delay: object, on_late: object) -> None:
    check_bound("max_delay", max_delay)
    if on_late not in get_args(OnLate):
        raise ValueError(f"`on_late` must be 'shrink', 'drop' or 'wait', got {on_late!r}")
    if on_late == "wait" and max_delay is None:
        raise ValueError("on_late='wait' needs a `max_delay`: without a bound nobody has to wait for anybody")


def _check_count(name: str, count: object, none: str) -> None:
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"`{name}` must be an integer of at least 1, or None for {none}, got {count!r}")
