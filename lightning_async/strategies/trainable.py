"""What is trained may change at a meeting, on all ranks alike: then they begin anew with the new set, all equal.

    MEETING  ->  a callback unfreezes, as an epoch starts   ->  all say what they train now  ->  next batch, free again
                 or behind a validation, in mid-epoch too       | not the same: an error everywhere, with the names
                                                                | changed: a new flat vector, rank 0's weights in it

Nothing is in flight after a meeting, so nothing that was posted has the old length. Between meetings the set may not
change: what is exchanged would no longer be what is trained.

A checkpoint carries the set, and what is saved behind such a change, at the same meeting, is of the new one: so all say
it before a save too. A run that goes on trains that: Lightning's callbacks freeze again in `setup`, and thaw nothing
whose epoch is past.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_async.replica import Replica
from lightning_async.strategies.words import gather_uneven
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

WHEN = (
    "freeze or unfreeze where an epoch starts (`on_train_epoch_start`, `BaseFinetuning`) or behind a validation "
    "(`on_validation_end`), the same on every rank"
)
SHOWN = 3  # names a rank in the sentence


def check_unchanged(module: nn.Module, replica: Replica) -> None:
    """Refuse a change since the last meeting."""
    if not replica.holds(module.parameters()):
        raise RuntimeError(
            "the set of trainable parameters has changed between two meetings, and what was exchanged was no longer "
            f"what is trained: {WHEN}"
        )


class Renewed(NamedTuple):
    """What is trained from here on.

    Attributes:
        replica: The weights, equal on all ranks.
        alike: Whether what was trained before and is so still is the same on all ranks: a layer may have been replaced
            on one of them.
    """

    replica: Replica
    alike: bool


def trained_word(module: nn.Module, replica: Replica) -> bytes:
    """What this rank trains, whether that is what it trained, and what of it is: its word for the others."""
    held = {id(p) for p, _ in replica.places}
    still = [name for name, p in module.named_parameters() if p.requires_grad and id(p) in held]
    return f"{int(replica.holds(module.parameters()))}{_digest(_names(module))} {_digest(still)}".encode()


def all_unchanged(words: Collection[bytes]) -> bool:
    """Whether all train the same, and what they trained."""
    return len(set(words)) == 1 and all(word[:1] == b"1" for word in words)


def renewed(module: nn.Module, replica: Replica, rounds: Rounds) -> Wait[Renewed | None]:
    """A replica of what is trained from here on; None if that is what it was."""
    words = yield from rounds.agree(trained_word(module, replica), what="what is trained")
    trained, still = zip(*(word[1:].split() for word in words.values()), strict=True)
    if len(set(trained)) > 1:
        yield from _refuse(_names(module), tuple(words), rounds)
    if all_unchanged(words.values()):
        return None
    exact = replica.weights() if replica.narrow else None
    replica.let_go()
    new = Replica(module.parameters())  # of the consensus, which stands in
    if exact is not None:
        new.take_over(exact, replica)
    weights = yield from rounds.broadcast(new.flat.cpu(), min(words))
    new.stand_in(weights)
    new.stay()
    return Renewed(new, alike=len(set(still)) == 1)


def trained_set(module: nn.Module, replica: Replica) -> dict[str, list[str]]:
    """What the replica holds, and which layers take statistics, by name: for a checkpoint."""
    held = {id(p) for p, _ in replica.places}
    return {**trained_now(module), "parameters": [name for name, p in module.named_parameters() if id(p) in held]}


def trained_now(module: nn.Module) -> dict[str, list[str]]:
    """The same of a module without a replica."""
    return {
        "parameters": [name for name, p in module.named_parameters() if p.requires_grad],
        "statistics": [name for name, layer in _norms(module) if layer.track_running_stats],
    }


def train_again(module: nn.Module, saved: dict[str, list[str]], known: Collection[str]) -> str:
    """Train what was trained when the run was saved, of what is `known` to the file. Before there is a replica.

    Returns what is different from what the module said, in words; "" if nothing is.
    """
    wanted, before = set(saved["parameters"]), set(_names(module))
    for name, p in module.named_parameters():
        if name in known:
            p.requires_grad_(name in wanted)
    after = set(_names(module))
    if after == before:
        return ""
    for name, layer in _norms(module):  # those that are frozen take none
        layer.track_running_stats = name in saved["statistics"]
    thawed, frozen = sorted(after - before), sorted(before - after)
    parts = [f"{_some(thawed)} again"] * bool(thawed) + [f"{_some(frozen)} no more"] * bool(frozen)
    return ", ".join(parts)


def _norms(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "track_running_stats"))


def _names(module: nn.Module) -> list[str]:
    return sorted(name for name, p in module.named_parameters() if p.requires_grad)


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _refuse(names: list[str], ranks: tuple[int, ...], rounds: Rounds) -> Wait[None]:
    mine = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
    texts = yield from gather_uneven(rounds, mine)
    sets = [set(bytes(text.tolist()).decode().split("\n")) for text in texts]
    own = {rank: sorted(s - sets[0].intersection(*sets)) for rank, s in zip(ranks, sets, strict=True)}
    what = "; ".join(f"rank {rank} also {_some(extra)}" for rank, extra in own.items() if extra)
    raise RuntimeError(f"the ranks do not train the same parameters ({what}): {WHEN}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + more
