"""A member's life with an algorithm, on any carrier: the same generator on a virtual cluster, in a replay, in a thread.

    begin -> ( compute: gradients -> before_step -> optimizer -> at(step) -> after_step )* -> meet
             `----------- yields seconds; an asynchronous method yields no words -----'     may wait

Whoever drives the generator lets the seconds pass (or skips them), and resumes it after a word when something may have
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT, Algorithm
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier, Wait
from lightning_async.transport.rounds import Rounds

T = TypeVar("T")
Training = Generator[float | str, None, "Trained"]


@dataclass
class Trained:
    """What became of a member.

    Attributes:
        steps: How often its optimizer ran.
        waits: How often it waited between meetings; 0 for an asynchronous method: nobody waits.
        arrivals: What it folded, in order.
        consensus: What the members agreed on at the end; None for who does not meet.
        stepped: When its last step ended, on its own clock.
    """

    steps: int = 0
    waits: int = 0
    arrivals: list[Arrival] = field(default_factory=list)
    consensus: Tensor | None = None
    stepped: float = 0.0


def train(
    algorithm: Algorithm,
    replica: Replica,
    carrier: Carrier,
    *,
    steps: int,
    take_step: Callable[[int], object],
    optimizer_step: Callable[[], object],
    seconds: Callable[[int, int], float],
    rounds: Rounds,
    mass: int = UNIT,
    meets: bool = True,
) -> Training:
    """Train for `steps` steps and meet.

    Args:
        algorithm: Its own algorithm object; members share none.
        replica: Its weights.
        carrier: Its end of the mail and the board.
        steps: How many steps it takes.
        take_step: Computes the gradients of a step, given its number.
        optimizer_step: Applies them (`optimizer.step`).
        seconds: How long it computes, given the member and the number of the step.
        rounds: Its view of the rounds.
        mass: What a step of this member weighs: UNIT for each of its samples.
        meets: Whether it meets the others at the end.
    """
    trained = Trained()
    algorithm.begin(replica, carrier, mass, rounds)
    for step in range(1, steps + 1):
        yield seconds(carrier.me, step)
        take_step(step)
        trained.arrivals += yield from _counted(algorithm.before_step(replica, carrier, step), trained)
        optimizer_step()
        carrier.at(step)
        trained.arrivals += yield from _counted(algorithm.after_step(replica, carrier, step), trained)
        trained.steps = step
    trained.stepped = carrier.now()
    if meets:
        trained.consensus = yield from algorithm.meet(replica, carrier)
        trained.arrivals += algorithm.arrived()
    return trained


def _counted(hook: Wait[T], trained: Trained) -> Generator[str, None, T]:
    while True:
        try:
            words = next(hook)
        except StopIteration as end:
            result: T = end.value
            return result
        trained.waits += 1
        yield words
