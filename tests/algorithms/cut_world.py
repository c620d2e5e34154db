"""Small runs with cuts in them, from one seed, and an account of every link that knows nothing of cuts.

An `Account` sits below each `CuttingMail` and only counts: what was posted on each link, and which of it was folded.
What a cut must hold follows from the counts at the two ends' records, whatever the markers did.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.cut import Part, put_together
from lightning_async.algorithms.cutting_mail import CuttingMail
from lightning_async.algorithms.gossip import Gossip, gossip
from lightning_async.algorithms.training import Trained, train
from lightning_async.algorithms.worth import Worth
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Message
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.transport.worlds import VirtualWorld

STARTS = torch.nn.functional.pad(torch.randn(8, 8, generator=torch.Generator().manual_seed(11)), (0, 8))
NOTHING = Worth(torch.zeros(16, dtype=torch.float64), 0)
ONES = torch.eye(8, 16)  # member r's steps move coordinate r of its own replica; the other half is padding
State = dict[str, Any]


class Account:
    """A carrier that counts what passes on each of its links."""

    def __init__(self, carrier: Any) -> None:
        self._carrier = carrier
        self.kinds: dict[int, list[int]] = {}  # by receiver: the kinds of the messages 1, 2, 3, ...
        self.folds: dict[int, set[int]] = {}  # by sender: the numbers that were folded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def post(self, peer: int, message: Message) -> bool:
        posted = self._carrier.post(peer, message)
        if posted:
            self.kinds.setdefault(peer, []).append(message.kind)
        return posted

    def folded(self, letter: Letter) -> None:
        self._carrier.folded(letter)
        if letter.message.kind >= FIRST_FREE_KIND:
            self.folds.setdefault(letter.peer, set()).add(letter.number)

    def so_far(self) -> State:
        """What was posted and folded until now."""
        return {
            "kinds": {peer: tuple(kinds) for peer, kinds in self.kinds.items()},
            "folds": {peer: frozenset(numbers) for peer, numbers in self.folds.items()},
        }


@dataclass
class Plan:
    """A run, drawn from a seed."""

    n: int
    knobs: dict[str, Any]
    speeds: list[float]
    steps: list[int]
    masses: list[int]
    lr: float
    begins: dict[int, int]  # member: before which of its steps it begins cut 1
    second: set[int] = field(default_factory=set)  # who begins cut 2, when cut 1 is all there
    late: bool = True  # whether a member looks for cuts just before it folds, or just after
    network: dict[str, Any] = field(default_factory=dict)
    faults: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    killed: int | None = None  # then cut 2 begins when all know of the death, and cut 3 when all parts of 2 are there

    @classmethod
    def drawn(cls, seed: int, **fixed: Any) -> Plan:
        chance = random.Random(seed)
        n = chance.randint(2, 6)
        steps = [chance.randint(4, 9) for _ in range(n)]
        members = chance.sample(range(n), chance.choice([1, 1, 2, n]))
        step = 0.02
        plan = {
            "n": n,
            "knobs": {
                "mode": chance.choice(["pairwise", "push_sum"]),
                "wire": chance.choice(["fp32", "bf16"]),
                "topology": chance.choice(["ring", "exponential"]),
                "period": chance.choice([1, 1, 1, 2]),
                "max_delay": chance.choice([None, None, 1, 3]),
            },
            "speeds": [step * chance.choice([1, 1, 2, 4]) * chance.uniform(0.9, 1.1) for _ in range(n)],
            "steps": steps,
            "masses": [UNIT * chance.choice([1, 1, 1, 3]) for _ in range(n)],
            "lr": chance.choice([0.0, 0.5]),
            "begins": {r: chance.randint(1, steps[r]) for r in members},
            "second": set(chance.sample(range(n), chance.choice([0, 0, 0, 1, 2]))),
            "late": chance.random() < 0.5,
            "network": {
                "latency": chance.choice([0.0005, 0.01, 0.05]),
                "jitter": chance.choice([0.0, 1.0]),
                "bandwidth": chance.choice([None, None, 1e4]),
                "silence": chance.choice([0.02, 1.0]),
                "seed": seed,
            },
            "faults": [_fault(chance, r, n) for r in range(n) if chance.random() < 0.2],
        }
        return cls(**{**plan, **fixed})

    @classmethod
    def killing(cls, seed: int) -> Plan:
        """The same with a death somewhere around the cut."""
        plan, chance = cls.drawn(seed, faults=[]), random.Random(seed)
        plan.killed = chance.randrange(plan.n)
        plan.faults = [("kill", {"member": plan.killed, "at": chance.uniform(0.0, 0.25)})]
        plan.second = {chance.choice([r for r in range(plan.n) if r != plan.killed])}
        plan.network["silence"] = chance.choice([0.02, 0.2])
        return plan

    def born(self) -> Worth:
        """What all members count before the first step."""
        return sum((Worth(STARTS[r].double() * (m / UNIT), m) for r, m in enumerate(self.masses)), start=NOTHING)


def _fault(chance: random.Random, r: int, n: int) -> tuple[str, dict[str, Any]]:
    when = {"at": chance.uniform(0.0, 0.2), "seconds": chance.uniform(0.01, 0.3)}
    name, arguments = chance.choice([("freeze", {"member": r}), ("cut", {"a": r}), ("cut", {"a": r, "b": (r + 1) % n})])
    return name, {**arguments, **when}


@dataclass
class World:
    """The members of a plan, on any carriers, from its beginning or from a cut."""

    plan: Plan
    carriers: list[Any]
    source: dict[int, Part[State]] = field(default_factory=dict)
    algorithms: list[Gossip] = field(init=False)
    replicas: list[Replica] = field(init=False)
    accounts: list[Account] = field(init=False)
    mails: list[CuttingMail[State]] = field(init=False)
    rounds: list[Rounds] = field(init=False)
    done: list[int] = field(init=False)  # steps
    parts: dict[int, dict[int, Part[State]]] = field(default_factory=lambda: {1: {}, 2: {}, 3: {}})
    trained: dict[int, Trained] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = range(self.plan.n)
        starts = [self.source[r].state["weights"] if self.source else STARTS[r] for r in ranks]
        self.algorithms = [gossip(**self.plan.knobs) for _ in ranks]
        self.replicas = [Replica([nn.Parameter(start.clone())]) for start in starts]
        self.accounts = [Account(carrier) for carrier in self.carriers]
        self.done = [self.source[r].state["step"] if self.source else 0 for r in ranks]
        self.mails = [self._mail(r) for r in ranks]
        self.rounds = [Rounds(carrier) for carrier in self.carriers]

    def _mail(self, r: int) -> CuttingMail[State]:
        part = self.source.get(r)
        if part is None:
            return CuttingMail(self.accounts[r], lambda: self._state(r))
        return CuttingMail(self.accounts[r], lambda: self._state(r), letters=part.letters, losses=part.losses)

    def _state(self, r: int) -> State:
        weights = self.replicas[r].weights()
        held = self.algorithms[r].held(weights)
        account = self.accounts[r].so_far()
        return {
            "step": self.done[r],
            "weights": weights,
            "algorithm": self.algorithms[r].midway(),
            "held": held,
            **account,
        }

    # -- a member's life --------------------------------------------------------------------------------------------

    def life(self, r: int, *, cuts: bool = True, meets: bool = False) -> Generator[float | str, None, Trained]:
        """Train; look for cuts meanwhile (`cuts`), and then until all are there; meet at the end (`meets`)."""
        plan, mail = self.plan, self.mails[r]

        def seconds(me: int, step: int) -> float:
            self.done[r] = step - 1
            if cuts and not plan.late:
                self.look(r, step)
            return plan.speeds[r]

        def take_step(step: int) -> None:
            if cuts and plan.late:
                self.look(r, step)

        def move() -> None:
            self.replicas[r].shift(ONES[r], plan.lr)

        member = self.algorithms[r], self.replicas[r], mail
        if self.source:
            trained = yield from self._go_on(r, take_step, move, seconds)
        else:
            trained = yield from train(
                *member,
                steps=plan.steps[r],
                take_step=take_step,
                optimizer_step=move,
                seconds=seconds,
                rounds=self.rounds[r],
                mass=plan.masses[r],
                meets=False,
            )
        self.done[r] = plan.steps[r]
        while cuts and not meets and not self.all_there():
            self.look(r, math.inf)
            yield "the cut"
        if meets:
            yield from mail.finish(self.rounds[r])
            self.collect(r)
            trained.consensus = yield from self.algorithms[r].meet(*member[1:])
        return trained

    def _go_on(
        self,
        r: int,
        take_step: Callable[[int], None],
        move: Callable[[], None],
        seconds: Callable[[int, int], float],
    ) -> Generator[float | str, None, Trained]:
        """The same from a part of a cut, with the numbers of the steps that follow."""
        algorithm, replica, mail = self.algorithms[r], self.replicas[r], self.mails[r]
        algorithm.begin(replica, mail, self.plan.masses[r], self.rounds[r])
        algorithm.go_on(self.source[r].state["algorithm"])
        for step in range(self.done[r] + 1, self.plan.steps[r] + 1):
            yield seconds(r, step)
            take_step(step)
            yield from algorithm.before_step(replica, mail, step)
            move()
            mail.at(step)
            yield from algorithm.after_step(replica, mail, step)
        return Trained()

    def look(self, r: int, step: float) -> None:
        """Between two steps, before `step`: begin what is due, take what has ended."""
        mail, plan = self.mails[r], self.plan
        if r in plan.begins and step >= plan.begins[r]:
            mail.begin_cut(1)
        if r in plan.second and self._may_follow(1):
            mail.begin_cut(2)
        if plan.killed is not None and r in plan.second and self._may_follow(2):
            mail.begin_cut(3)
        mail.between_steps()
        self.collect(r)

    def collect(self, r: int) -> None:
        """Take what has ended."""
        while ended := self.mails[r].taken():
            self.parts[ended.number][r] = ended

    def _may_follow(self, number: int) -> bool:
        killed = self.plan.killed
        if killed is None:
            return len(self.parts[number]) == self.plan.n
        if number == 1:
            return all(killed not in self.carriers[r].members() for r in self.survivors)
        return self.survivors <= self.parts[number].keys()

    @property
    def survivors(self) -> set[int]:
        """Those who are not killed."""
        return {*range(self.plan.n)} - {self.plan.killed}

    def all_there(self) -> bool:
        """Whether all parts of the plan's cuts are taken."""
        last = 3 if self.plan.killed is not None else 2 if self.plan.second else 1
        return self.survivors <= self.parts[last].keys()

    # -- what must be true ------------------------------------------------------------------------------------------

    def counted(self, part: Part[State]) -> Worth:
        """What a part counts in the conserved sum."""
        return self.algorithms[part.member].counted(part.state["held"], part.letters, part.losses)

    def cut(self, number: int) -> dict[int, Part[State]]:
        """The parts of a cut, put together; where nobody died, with all mass."""
        mass = (lambda part: self.counted(part).mass) if self.plan.killed is None else None
        return put_together(self.parts[number].values(), mass=mass, born=sum(self.plan.masses))

    def total(self, cut: dict[int, Part[State]]) -> Worth:
        """What a cut counts, less the steps that were taken until then: constant."""
        total = sum((self.counted(part) for part in cut.values()), start=NOTHING)
        return self._less_steps(total, {r: part.state["step"] for r, part in cut.items()})

    def total_now(self) -> Worth:
        """What all members hold now and declare missing, less their steps."""
        pairs = zip(self.algorithms, self.replicas, strict=True)
        return self._less_steps(sum((a.held(r.weights()) for a, r in pairs), start=NOTHING), dict(enumerate(self.done)))

    def _less_steps(self, total: Worth, steps: dict[int, int]) -> Worth:
        vector = total.vector.clone()
        for r, count in steps.items():
            vector[r] -= self.plan.lr * count * self.plan.masses[r] / UNIT
        return Worth(vector, total.mass)


def run(plan: Plan, *, source: dict[int, Part[State]] | None = None, cuts: bool = True, meets: bool = False) -> World:
    """Run a plan on a virtual cluster until its cuts are all there, or (`meets`) all have met."""
    cluster = VirtualCluster(plan.n, **plan.network)
    for name, arguments in plan.faults:
        getattr(cluster, name)(**arguments)
    world = World(plan, cluster.carriers, source or {})
    world.trained = cluster.run({r: world.life(r, cuts=cuts, meets=meets) for r in range(plan.n)})
    return world


class CuttingWorld(VirtualWorld):
    """The contract's world with a `CuttingMail` in front of every carrier."""

    def __init__(self, n: int, late: int | None = None) -> None:
        super().__init__(n, late)
        self.carriers = [_CuttingCarrier(carrier, list) for carrier in self.cluster.carriers]  # type: ignore[misc]


class _CuttingCarrier(CuttingMail[list[int]]):
    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_mail"], name)  # the board


def check_links(cut: dict[int, Part[State]]) -> int:
    """On each link the cut holds what was posted before its sender's record less what was folded before its receiver's.

    And nothing was folded before the receiver's record that was posted after the sender's: it would come from the
    future. Returns how many letters were under way.
    """
    count = 0
    for receiver, part in cut.items():
        assert part.members == tuple(cut)
        for sender in cut.keys() - {receiver}:
            kinds = cut[sender].state["kinds"].get(receiver, ())
            posted = {number for number, kind in enumerate(kinds, start=1) if kind >= FIRST_FREE_KIND}
            folded = part.state["folds"].get(sender, frozenset())
            assert folded <= posted, f"{receiver} folded {folded - posted} of {sender} from after its record"
            found = sorted(letter.number for letter in part.letters if letter.peer == sender)
            assert found == sorted(posted - folded)
            count += len(found)
    return count
