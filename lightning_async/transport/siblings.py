"""The ranks of one member step together, or not at all: the first of them speaks for it, its siblings hear it.

    word       rank 2 says ---------------------> ranks 3, 4 and 5 hear it, under the same name
    spread     rank 2's tensor -----------------> ranks 3, 4 and 5 have it
               what is longer than a link takes goes in pieces, one after the other
    average    each rank owns a slice: parts to their owners, the owners' means to all, so all get the same bits;
               also piece by piece: whose turn it is to send or to take is known from the slices

Words have several slots, by turns: so a speaker says the next one before all have heard the last.

Nobody in here is replaced. Who waits for a sibling that died is ended by whoever drives the wait, for the whole member
ends with each of its ranks. A word has the name of what it is for: ranks that are at different things raise, in place
of taking one word for another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_async.transport.mail import LONGEST, Carrier, Letter, Message, Wait
from lightning_async.transport.rounds import joined

TENSOR, PART, MEAN = 9, 10, 11
"""Reserved kinds: what a speaker spreads; what siblings owe each other in an average."""
WORDS = (8, 12, 13, 14, 15)
"""What a speaker says, each kind in its turn: about as many words as a step has."""
SIBLING_KINDS = {
    **dict.fromkeys(WORDS, "words inside"),
    TENSOR: "weights inside",
    PART: "gradients inside",
    MEAN: "gradients inside",
}
"""What they are called where people read them."""


class Siblings:
    """One rank among the ranks of its member. All of them must call the same methods in the same order.

    Args:
        carrier: This rank's mail and board.
        ranks: The ranks of the member; the first one speaks for it.
        longest: Bytes of the longest body that a link takes.
    """

    def __init__(self, carrier: Carrier, ranks: tuple[int, ...], longest: int = LONGEST) -> None:
        self.ranks, self.speaker, self.me = ranks, ranks[0], carrier.me
        self.others = tuple(rank for rank in ranks if rank != carrier.me)
        self._carrier, self._longest = carrier, longest
        self._number = self._words = 0
        self._heard = list[Letter]()  # words whose slots are still taken

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for the member."""
        return self.me == self.speaker

    def word(self, name: str, value: Any = None) -> Wait[Any]:
        """What the speaker says, in JSON; what its siblings say is not asked for."""
        kind = WORDS[self._words % len(WORDS)]
        self._words += 1
        if self.speaks:
            body = torch.frombuffer(bytearray(json.dumps([name, value]).encode()), dtype=torch.uint8)
            yield from self._post(Message(kind, body), name)
            return value
        letter = yield from self._letter(kind, self.speaker, name)
        assert letter.message.body is not None  # a word always has one
        said, value = json.loads(letter.message.body.numpy().tobytes())
        self._heard.append(letter)
        if len(self._heard) > len(WORDS) // 2:  # else the speaker has slots left, and is told with what follows
            self._give_back()
        if said != name:
            raise RuntimeError(
                f"the ranks of one member are at different things: rank {self.speaker} at {said!r}, rank {self.me} at "
                f"{name!r}. They must train, validate and save alike: look for code that only some ranks run"
            )
        return value

    def spread(self, tensor: Tensor | None = None, take: Callable[[Tensor], Tensor] = Tensor.clone) -> Wait[Tensor]:
        """The speaker's flat tensor, in host memory; its siblings bring none, and `take` it: it is theirs for that
        long."""
        if self.speaks:
            assert tensor is not None  # the speaker brings it
            tensor = tensor.detach().cpu()
            for piece in self._pieces(tensor):
                yield from self._post(Message(TENSOR, piece, version=tensor.numel()), "its weights")
            return tensor
        letter = yield from self._letter(TENSOR, self.speaker, "its weights")
        if _numel(letter) == letter.message.version:
            return self._body(letter, take)
        came = [self._body(letter)]
        while sum(piece.numel() for piece in came) < letter.message.version:
            came.append(self._body((yield from self._letter(TENSOR, self.speaker, "its weights"))))
        return take(torch.cat(came))

    def collect(self, tensor: Tensor, weight: int) -> Wait[list[tuple[Tensor, int]]]:
        """Everybody's flat tensor with its weight, in the order of ranks, at the speaker; nothing elsewhere.

        They may be of unlike length. A word of the speaker's follows: before that nobody may send its next part.
        """
        self._number += 1
        if not self.speaks:
            for piece in self._pieces(tensor):
                part = Message(PART, piece, version=tensor.numel(), weight=weight, reference=self._number)
                yield from self._swap(PART, {self.speaker: part}, ())
            return []
        weights, pieces = dict[int, int](), {rank: list[Tensor]() for rank in self.others}
        left = self.others
        while left:
            came = yield from self._swap(PART, {}, left)
            missing = {rank: came[rank].message.version for rank in left}
            for rank in left:
                weights[rank] = came[rank].message.weight
                pieces[rank].append(self._body(came[rank]))
            left = tuple(rank for rank in left if sum(piece.numel() for piece in pieces[rank]) < missing[rank])
        return [(tensor, weight), *((joined(pieces[rank]), weights[rank]) for rank in self.others)]

    def average(self, vector: Tensor, begin: int = 0, end: int | None = None) -> Wait[Tensor]:
        """The mean of all siblings' vectors, the same bits on all; in place of the vector, if that is in host memory.

        Of a part of it only that is averaged, with the same bits: an element's owner is the whole vector's matter.
        Nothing is allocated for it: a vector is as long as the weights, and new memory costs its page faults.
        """
        vector = vector.detach().cpu()
        end, most = vector.numel() if end is None else end, max(1, self._longest // vector.element_size())
        for low in range(begin, max(end, begin + 1), most):
            yield from self._average(vector, low, min(low + most, end))
        return vector

    # -- inside --------------------------------------------------------------------------------------------------------

    def _average(self, vector: Tensor, begin: int, end: int) -> Wait[None]:
        self._number += 1
        slices = self._slices(vector, begin, end)
        mine, owners = slices.get(self.me), tuple(rank for rank in self.others if rank in slices)
        parts = {rank: Message(PART, slices[rank], reference=self._number) for rank in owners}
        came = yield from self._swap(PART, parts, () if mine is None else self.others)
        means = dict[int, Message]()
        if mine is not None:
            for rank in self.others:
                self._use(came[rank], mine.add_)
            mine /= len(self.ranks)
            means = dict.fromkeys(self.others, Message(MEAN, mine, reference=self._number))
        came = yield from self._swap(MEAN, means, owners)
        for rank in owners:
            self._use(came[rank], slices[rank].copy_)

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        """At least one."""
        most = max(1, self._longest // tensor.element_size())
        return [tensor[at : at + most] for at in range(0, max(1, tensor.numel()), most)]

    def _post(self, message: Message, name: str) -> Wait[None]:
        """To all siblings."""
        left = list(self.others)
        while left := [rank for rank in left if not self._carrier.post(rank, message)]:
            yield f"rank {left[0]}, of the same member, to hear {name!r}"

    def _letter(self, kind: int, peer: int, name: str) -> Wait[Letter]:
        """The next letter of this kind: no second one is under way before it is folded."""
        while not (letters := self._carrier.take(kind)):
            yield f"rank {peer}, of the same member, to say {name!r}"
        return letters[0]

    def _slices(self, vector: Tensor, begin: int, end: int) -> dict[int, Tensor]:
        """What of this part each rank owns, where it is anything."""
        found, at = dict[int, Tensor](), 0
        for rank, whole in zip(self.ranks, vector.tensor_split(len(self.ranks)), strict=True):
            low, high = max(begin, at), min(end, at + whole.numel())
            if low < high:
                found[rank] = vector[low:high]
            at += whole.numel()
        return found

    def _swap(self, kind: int, outgoing: Mapping[int, Message], senders: tuple[int, ...]) -> Wait[dict[int, Letter]]:
        """Post each its part, and take one letter from each sender."""
        self._give_back()  # told by what is posted now
        left, came = dict(outgoing), dict[int, Letter]()
        while True:
            left = {rank: message for rank, message in left.items() if not self._carrier.post(rank, message)}
            for letter in self._carrier.take(kind) if len(came) < len(senders) else ():
                self._check(letter)
                came[letter.peer] = letter
            missing = [*left, *(rank for rank in senders if rank not in came)]
            if not missing:
                return came
            yield f"rank {missing[0]}, of the same member, in average {self._number} inside of it"

    def _check(self, letter: Letter) -> None:
        if letter.message.reference != self._number:
            raise RuntimeError(
                f"the ranks of one member are at different steps: rank {letter.peer} in its average number "
                f"{letter.message.reference}, rank {self.me} in number {self._number}. They must step together"
            )

    def _use(self, letter: Letter, what: Callable[[Tensor], object]) -> None:
        if letter.message.body is not None and letter.message.body.numel():
            what(letter.message.body)
        self._carrier.folded(letter)

    def _give_back(self) -> None:
        """The slots of the words that were heard are free, in their order."""
        for letter in self._heard:
            self._carrier.folded(letter)
        self._heard.clear()

    def _body(self, letter: Letter, take: Callable[[Tensor], Tensor] = Tensor.clone) -> Tensor:
        body = letter.message.body
        tensor = take(torch.empty(0) if body is None else body)
        self._carrier.folded(letter)
        return tensor


def _numel(letter: Letter) -> int:
    return 0 if letter.message.body is None else letter.message.body.numel()
