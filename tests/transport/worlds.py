"""Worlds in which the contract is tested: members in one process, and a way to let time pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest
import torch

from lightning_async.transport.mail import Carrier, Letter, Message
from lightning_async.transport.virtual import VirtualCluster

KIND = 16
BUSY = 60.0  # seconds in which all comes about even on a machine busy with other things; a hang would take for ever


class World(Protocol):
    """Some members and their time."""

    carriers: Sequence[Carrier]

    def until(self, condition: Callable[[], object], limit: float = 10.0) -> None:
        """Let time pass until `condition()` holds; fail after `limit` seconds."""

    def join(self) -> None:
        """Let the member that is late come."""

    def close(self) -> None:
        """Take the world down."""


class VirtualWorld:
    """Members of a virtual cluster; its time passes in `until` only."""

    JOIN = 5.0

    def __init__(self, n: int, late: int | None = None, **options: float | None) -> None:
        self.cluster = VirtualCluster(n, **{"bandwidth": 1e8, **options})
        self.carriers = self.cluster.carriers
        if late is not None:
            self.cluster.join(late, at=self.JOIN)

    def until(self, condition: Callable[[], object], limit: float = 10.0) -> None:
        end = self.cluster.time + limit
        while not condition():
            if self.cluster.time > end:
                pytest.fail(f"nothing came of it within {limit} virtual seconds")
            self.cluster.advance(0.001)

    def join(self) -> None:
        self.until(lambda: self.cluster.time > self.JOIN)

    def close(self) -> None:
        pass


def body(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def post(world: World, sender: int, receiver: int, message: Message) -> None:
    """Post, as soon as the slot is free."""
    world.until(lambda: world.carriers[sender].post(receiver, message))


def take(world: World, receiver: int, kind: int = KIND, count: int = 1) -> list[Letter]:
    """Take until so many letters came."""
    letters: list[Letter] = []

    def enough() -> bool:
        letters.extend(world.carriers[receiver].take(kind))
        return len(letters) >= count

    world.until(enough)
    assert len(letters) == count
    return letters


def fold(world: World, receiver: int, kind: int = KIND) -> Letter:
    """Take one letter, give it back, and see the sender's slot freed."""
    (letter,) = take(world, receiver, kind)
    world.carriers[receiver].folded(letter)
    world.until(lambda: world.carriers[letter.peer].free(receiver, kind))
    return letter
