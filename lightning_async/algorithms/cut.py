"""A cut is a state that the whole run could have been in, taken while everybody trains on; nobody waits for it.

    rank 0 posts    a   b   [records]   CUT   c         a is in both recorded states
    rank 1 folds    a       [records]   b     c         b was under way: it is in the cut; c is in none of it

Chandy and Lamport (1985), on links that keep their order over all kinds; `cutting_mail` takes the parts, this file says
what they are. Restored, each member begins with its recorded state, and finds in its mail what was under way to it.

A cut is all members' or nobody's: if one dies before its marker came, the cut is given up, and the next one is among
those that live. Two that recorded among different members made no cut either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.transport.mail import Letter, Loss, Message

S = TypeVar("S")
M = TypeVar("M", Letter, Loss)


@dataclass
class Part(Generic[S]):
    """What one member knows of a cut.

    Attributes:
        number: The cut's number.
        member: Whose part this is.
        members: Whose parts make the cut, as this member saw it when it recorded.
        state: What it recorded of itself.
        letters: What was under way to it, copied, with kinds and numbers as they were.
        losses: What it had posted to the dead and its algorithm had not heard of yet.
        deaths: Those who died before their markers came. Empty: the part is complete; else the cut is given up.
    """

    number: int
    member: int
    members: tuple[int, ...]
    state: S
    letters: list[Letter] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    deaths: tuple[int, ...] = ()


def put_together(
    parts: Iterable[Part[S]], *, mass: Callable[[Part[S]], int] | None = None, born: int = 0
) -> dict[int, Part[S]]:
    """The cut that these parts make, by member; a ValueError if they make none.

    Args:
        parts: One of each member.
        mass: What a part holds, has under way and declares lost.
        born: What that must be in all parts together.
    """
    parts = sorted(parts, key=lambda part: part.member)
    ranks = tuple(part.member for part in parts)
    for part in parts:
        if part.deaths:
            raise ValueError(
                f"cut {part.number} was given up: rank {part.deaths[0]} died before its marker reached rank "
                f"{part.member}; begin another cut among those that live"
            )
    for part in parts:
        if (part.number, part.members) != (parts[0].number, ranks):
            raise ValueError(
                f"rank {part.member} recorded cut {part.number} among ranks {part.members}, but these are parts of cut "
                f"{parts[0].number} by ranks {ranks}: a cut is all members' or nobody's"
            )
    if mass is not None and (found := sum(mass(part) for part in parts)) != born:
        raise ValueError(f"the parts of this cut count a mass of {found}, and {born} was born: they are damaged")
    return {part.member: part for part in parts}


class Sum:
    """What the parts of a cut bring into its consensus, added up in double precision.

    Attributes:
        mass: The mass that is there.
        count: How many parts.
    """

    def __init__(self) -> None:
        self.mass = self.count = 0
        self._vector: Tensor | None = None
        self._divided = False

    def add(self, body: Tensor, mass: int, *, at: int = 0, numel: int | None = None) -> None:
        """One part: first the weights, times mass in UNITs; behind them what counts alike for all.

        It may come in pieces: this one begins `at` an element of the `numel` that there are.
        """
        if self._divided:
            raise ValueError("the means were taken: no part can be added any more")
        if self._vector is None:
            self._vector = torch.zeros(body.numel() if numel is None else numel, dtype=torch.float64)
        self._vector[at : at + body.numel()].add_(body.cpu())  # computed in double precision, without a copy in it
        self.mass += mass if at == 0 else 0
        self.count += at == 0

    def means(self, numel: int) -> tuple[Tensor, Tensor]:
        """Of the weights, `numel` elements, by mass; of the rest, by parts. In the place of the sums."""
        if self._vector is None:
            raise ValueError("no part was added: there is no mean")
        weights, rest = self._vector[:numel], self._vector[numel:]
        if not self._divided:
            self._divided = True
            weights.div_(self.mass / UNIT)
            rest.div_(self.count)
        return weights, rest


def packed(part: Part[S]) -> dict[str, Any]:
    """A part as tensors, numbers, text, lists and dictionaries, if its state is made of these."""
    return asdict(part)


def unpacked(pack: Mapping[str, Any]) -> Part[Any]:
    """The part that was packed."""
    letters = [Letter(**{**letter, "message": Message(**letter["message"])}) for letter in pack["letters"]]
    losses = [Loss(**{**loss, "message": Message(**loss["message"])}) for loss in pack["losses"]]
    return Part(**{**pack, "letters": letters, "losses": losses})


def copied(mail: M) -> M:
    """With a body of its own: the carrier's is lent."""
    body = mail.message.body
    return replace(mail, message=replace(mail.message, body=None if body is None else body.clone()))


def from_before(letters: Iterable[Letter]) -> list[Letter]:
    """Numbered in their old order, but up to 0: a new link begins with 1."""
    letters = list(letters)
    last = {letter.peer: letter.number for letter in sorted(letters, key=lambda letter: letter.number)}
    return [replace(letter, number=letter.number - last[letter.peer]) for letter in letters]
