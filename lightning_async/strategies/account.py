"""What a run will hold and send, told before it begins: bytes on the device, in host memory, and on the wire.

    device   beside weights, gradients and optimizers: what the method keeps where the weights are; and by how much the
             state of optimizers that step half-precision weights in float32 is longer than these
    host     a slot for each message that may be under way and a box where it arrives, each as long as the message;
             what is served to others; what each link needs, whatever travels on it. With `saves="cut"` also what
             the first rank has while a cut is written. None of it is pinned
    wire     bodies that one member sends in one exchange; headers are 256 bytes each

Of the member that holds the most, which is the first, from its first meeting on and as long as nothing goes wrong: what
is late, refused or taken over from the dead comes on top, and so does what lives within one call. Pure arithmetic: a
module on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_async.algorithms.algorithm import Algorithm
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.gossip import Gossip
from lightning_async.algorithms.late_sign import LateSign
from lightning_async.algorithms.lazy_sign import FEW, LazySign
from lightning_async.algorithms.pairwise import Pairwise
from lightning_async.algorithms.push_sum import PushSum
from lightning_async.algorithms.server_groups import remembered
from lightning_async.algorithms.shards import MANY, cut, first_owner
from lightning_async.algorithms.sheets import Span, cuts
from lightning_async.algorithms.sign_rules import RULES
from lightning_async.algorithms.sign_wire import SMALL
from lightning_async.algorithms.sync_global import SyncGlobal
from lightning_async.algorithms.sync_ring import SyncRing
from lightning_async.algorithms.topology import neighbours, onward, partner
from lightning_async.pipeline.edge import DEPTH
from lightning_async.pipeline.stash import Semantics
from lightning_async.replica import ALIGNMENT
from lightning_async.strategies.cut_consensus import piece_of
from lightning_async.transport.cluster import PIECE, link_bytes
from lightning_async.transport.mail import LONGEST
from lightning_async.transport.rounds import OWNERS, SHORT


@dataclass(frozen=True)
class Model:
    """A module, as far as its size goes.

    Attributes:
        sizes: Numbers of each trainable parameter.
        itemsize: Bytes of a number of the flat vector.
        narrow: Whether parameters are narrower than that: then the vector is held beside them.
        whole: Which of them `lazy_sign` is told to send whole.
        remembered: Vectors like the weights that a server's optimizer remembers.
        adam: Optimizers that need a buffer more where steps are averaged (`algorithms/adam.py`).
        wider: Bytes by which optimizers remember more, since they step narrow parameters in the vector's precision.
        state: Bytes of all that optimizers remember, where a cut copies it.
    """

    sizes: tuple[int, ...]
    itemsize: int = 4
    narrow: bool = False
    whole: frozenset[int] = frozenset()
    remembered: int = 0
    adam: int = 0
    wider: int = 0
    state: int = 0

    @property
    def spans(self) -> list[Span]:
        """Where each parameter lies in the flat vector."""
        step, at, found = max(1, ALIGNMENT // self.itemsize), 0, []
        for number, size in enumerate(self.sizes):
            found.append(Span(at, at + size, number))
            at += -(-size // step) * step
        return found

    @property
    def numel(self) -> int:
        """Length of the flat vector."""
        step = max(1, ALIGNMENT // self.itemsize)
        return sum(-(-size // step) * step for size in self.sizes)

    @property
    def nbytes(self) -> int:
        """The weights, as the flat vector has them."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Account:
    """Bytes of one member.

    Attributes:
        device: See above.
        host: See above.
        wire: See above.
        when: How often that is sent, in words.
        longest: The longest message.
    """

    device: int = 0
    host: int = 0
    wire: int = 0
    when: str = "between meetings"
    longest: int = 0

    def plus(self, *, device: int = 0, host: int = 0, longest: int = 0) -> Account:
        """With more."""
        device, host = self.device + device, self.host + host
        return replace(self, device=device, host=host, longest=max(self.longest, longest))


def model_of(parameters: Iterable[nn.Parameter], **more: int | frozenset[int]) -> Model:
    """The size of a module, also of one on the meta device."""
    trained = [p for p in parameters if p.requires_grad]
    dtype = torch.float32
    for p in trained:
        dtype = torch.promote_types(dtype, p.dtype)
    narrow = any(p.dtype != dtype for p in trained)
    return Model(tuple(p.numel() for p in trained), dtype.itemsize, narrow, **more)  # type: ignore[arg-type]


def wider_state(optimizer: Optimizer, dtype: torch.dtype) -> int:
    """Bytes by which what an optimizer remembers is longer in this precision than in that of its parameters; 0 for one
    that cannot be asked what it remembers."""
    return kept(optimizer) * sum(p.numel() * max(0, dtype.itemsize - p.dtype.itemsize) for p in _trained(optimizer))


def state_of(optimizer: Optimizer, dtype: torch.dtype) -> int:
    """Bytes of what an optimizer remembers in this precision, or its parameters' if that is wider; 0 as above."""
    return kept(optimizer) * sum(p.numel() * max(dtype.itemsize, p.dtype.itemsize) for p in _trained(optimizer))


def kept(optimizer: Optimizer) -> int:
    """How many numbers an optimizer remembers of each of its parameters'; 0 as above."""
    try:
        return len(remembered(optimizer))
    except Exception:  # it is the user's, and may need whatever it likes
        return 0


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def account(
    algorithm: Algorithm,
    model: Model,
    members: int,
    *,
    inner: int = 1,
    near: int | None = None,
    piece: int = PIECE,
    apart: bool = False,
    cuts: bool = False,
) -> Account:
    """What a method holds and sends.

    Args:
        algorithm: The method with its knobs.
        model: What is trained.
        members: How many members there are.
        inner: How many ranks a member has.
        near: How many other ranks are on the same host, as far as links go there; None: all.
        piece: The longest piece in which a body travels.
        apart: Whether the weights are on a device with memory of its own.
        cuts: Whether checkpoints are cuts.
    """
    links = members - 1 + inner - 1
    found = _method(algorithm, model, members)
    averaged = algorithm.averaged_over(members) > 1
    device = model.nbytes * (int(model.narrow) + model.adam * averaged) + model.wider
    host = rounds(model.nbytes, members) + linked(links, links if near is None else min(near, links), piece)
    longest = min(LONGEST, -(-model.nbytes // min(OWNERS, members))) if members > 1 else 0  # of a round; it has pieces
    if inner > 1:
        device += model.nbytes
        host += inside(model.nbytes, inner) + apart * model.nbytes
    host += cut_midway(model, members) if cuts else 0
    return found.plus(device=device, host=host, longest=longest)


def linked(links: int, near: int, piece: int = PIECE) -> int:
    """What links need, of which `near` go through shared memory: each end has made the memory of its direction."""
    return near * link_bytes(piece, near=True) + (links - near) * link_bytes(piece, near=False)


def rounds(nbytes: int, members: int) -> int:
    """The slots and boxes of an owner in a round that all take part in (`transport/rounds.py`)."""
    others = members - 1
    if nbytes * others <= SHORT:
        return 2 * others * nbytes
    owners = min(OWNERS, members)
    return 2 * (owners - 1 + others) * -(-nbytes // owners)


def cut_midway(model: Model, members: int) -> int:
    """What the first rank has while a cut is written (`cut_files.py`): its record, with what optimizers remember; the
    sum in double precision, which becomes the mean, and the consensus as it stands in the file; and the boxes in which
    pieces of the others' sums arrived, for good."""
    boxes = (members - 1) * piece_of(model.nbytes, members)
    return model.nbytes + model.state + 8 * model.numel + model.nbytes + boxes


def inside(nbytes: int, inner: int) -> int:
    """The slots and boxes of a member's speaker for its siblings (`transport/siblings.py`)."""
    others, part, whole = inner - 1, min(LONGEST, -(-nbytes // inner)), min(LONGEST, nbytes)
    return others * (part + whole + 2 * part + whole)


def _method(algorithm: Algorithm, model: Model, members: int) -> Account:
    if isinstance(algorithm, Gossip):
        return gossip(algorithm, model, members)
    if isinstance(algorithm, (AsyncGlobal, CyclicDelay)):
        return served(algorithm, model, members)
    if isinstance(algorithm, SyncGlobal):
        return merged(algorithm, model, members)
    if isinstance(algorithm, LazySign):
        return signs(algorithm, model, members)
    raise TypeError(f"there is no account of {type(algorithm).__name__}")


def gossip(algorithm: Gossip, model: Model, members: int) -> Account:
    """Weights to neighbours; `pairwise` gets a difference back, so a link has a slot and a box of each."""
    ranks, size = range(members), model.numel * (2 if algorithm.wire == "bf16" else model.itemsize)
    settled = Account(0, rounds(model.nbytes, members))
    when = _every(algorithm.period)
    if isinstance(algorithm, Pairwise):
        asked = onward(algorithm.topology, ranks, 0)
        asking = [r for r in ranks if r and 0 in onward(algorithm.topology, ranks, r)]
        both = 2 if asked and asking else 1 if asked else 0
        host = 2 * (len(asked) + len(asking)) * size
        return Account(model.nbytes, settled.host + host, both * size, when, size)
    around = neighbours(algorithm.topology, ranks, 0)
    if isinstance(algorithm, PushSum):
        turns = range(max(1, len(around)))
        out = {p for turn in turns if (p := partner(algorithm.topology, ranks, 0, turn)) is not None}
        return Account(2 * model.nbytes, settled.host + 2 * len(out) * size, min(1, len(out)) * size, when, size)
    if isinstance(algorithm, SyncRing):
        return Account(2 * model.nbytes, settled.host + 2 * len(around) * size, len(around) * size, when, size)
    return settled


def served(algorithm: AsyncGlobal | CyclicDelay, model: Model, members: int) -> Account:
    """Weights at servers. A shard is at its owner, its mirror at the next member; each asks all owners, itself too."""
    shards = cut(model.numel, min(algorithm.shards or MANY, members))
    owners, part = len(shards), max(shard.end - shard.begin for shard in shards) * model.itemsize
    mirrored = members > 1 and first_owner(owners - 1, owners, members) == members - 1
    gradients = isinstance(algorithm, CyclicDelay) and algorithm.push == "gradient"
    kept = model.remembered if gradients else len(algorithm.rules.make_outer(torch.empty(0)).tensors)
    handed = members + 1 if isinstance(algorithm, CyclicDelay) and algorithm.compensation == "dc" else 0
    image = (1 + kept) * part
    servers = image + handed * part + mirrored * image + 2 * image  # and what its service showed at the last meeting
    others = owners - 1 + members - 1
    pushed = _pushed(algorithm, model) / model.nbytes * part
    mail = others * pushed + part  # PUSH: to the owners, from the members; to itself nothing is cut off
    mail += 2 * (others + 1) * part  # LAST, ANSWER
    mail += ((members > 1) + mirrored) * image  # MIRROR
    device = model.nbytes * (4 if gradients else 2)
    wire = round((owners - 1) * pushed + (members - 1) * _answered(algorithm) * part)
    return Account(device, round(servers + mail), wire, _period(algorithm), image)


def _pushed(algorithm: AsyncGlobal | CyclicDelay, model: Model) -> int:
    """All weights as a push of them travels."""
    wire = algorithm.wire if isinstance(algorithm, AsyncGlobal) else "fp32"
    if wire == "sign":
        dtype = torch.float64 if model.itemsize == 8 else torch.float32
        (one,) = cuts(model.spans, parts=1, dtype=dtype, min_size=SMALL)
        return one.nbytes
    return model.numel * (2 if wire == "bf16" else model.itemsize)


def _answered(algorithm: AsyncGlobal | CyclicDelay) -> float:
    """The part of an answer's bytes that travels."""
    return 1.0 if isinstance(algorithm, CyclicDelay) or algorithm.wire == "fp32" else 0.5


def _period(algorithm: AsyncGlobal | CyclicDelay) -> str:
    if isinstance(algorithm, CyclicDelay):
        return "each time round"
    if algorithm.local_steps == "epoch":
        return "at meetings"
    if algorithm.local_steps == "speed":
        return f"every {algorithm.pace} steps of the fastest member"
    return _every(algorithm.local_steps)


def merged(algorithm: SyncGlobal, model: Model, members: int) -> Account:
    """A mean of all at once; at meetings nothing is rounded."""
    vectors = 1 + len(algorithm.make_outer(torch.empty(0)).tensors)
    size = model.numel * (2 if algorithm.wire == "bf16" else model.itemsize)
    when = "at meetings" if algorithm.local_steps is None else _every(algorithm.local_steps)
    return Account(vectors * model.nbytes, rounds(model.nbytes, members), rounds(size, members) // 2, when)


def signs(algorithm: LazySign, model: Model, members: int) -> Account:
    """Sheets: what this rank sends, what comes from each other one, and what all agreed on."""
    if members == 1:
        return Account()
    rule, late = RULES[algorithm.rule], isinstance(algorithm, LateSign)
    gather = not late and (algorithm.form == "gather" or (algorithm.form == "auto" and members <= FEW))
    vectors = 2 + rule.tracks + (rule.decides and not rule.tracks and algorithm.news == "change")
    block = algorithm.block * model.itemsize
    now, first = _sheets(algorithm, model, members, gather, late), Account()
    if algorithm.warm_up:
        first = _sheets(algorithm, model, members, gather, late, whole=True)
    device = vectors * model.nbytes + algorithm.threads * block + now.device + first.device
    return Account(
        device, max(now.host, first.host) + late * block, now.wire, "a step", max(now.longest, first.longest)
    )


def _sheets(
    algorithm: LazySign, model: Model, members: int, gather: bool, late: bool, *, whole: bool = False
) -> Account:
    """Bytes of sheets, their slots and their boxes."""
    parts = cuts(
        model.spans,
        parts=1 if gather else members,
        dtype=torch.float64 if model.itemsize == 8 else torch.float32,
        exact=range(len(model.sizes)) if whole or algorithm.compressor == "none" else model.whole,
        min_size=algorithm.min_size,
        block=algorithm.block,
        scale=algorithm.scale,
    )
    total, mine, others = sum(part.nbytes for part in parts), parts[0].nbytes, members - 1
    if gather:
        return Account(members * total, 2 * others * total, others * total, longest=total)
    blocks = parts[0].blocks
    rest = (blocks[-1].stop - blocks[0].start) * model.itemsize if blocks else 0
    wire = total - mine + others * mine
    if late:  # the service: its parts, a mean, nothing, its rest, also as it was told at the last meeting
        return Account(2 * total, (members + 2) * mine + 3 * rest + 2 * wire + 2 * mine, wire)
    return Account(rest + (total - mine) + members * mine + total, 2 * wire, wire)


def staged(
    weights: int,
    state: int,
    ranks: int,
    *,
    held: int,
    semantics: Semantics,
    edges: Sequence[int],
    wider: int = 0,
    piece: int = PIECE,
) -> Account:
    """One stage of a pipeline, without the activations inside of it: those are the user's, for each batch held.

    Args:
        weights: Bytes of the stage's own.
        state: Bytes of the whole module, which all get at the start.
        ranks: How many ranks there are.
        held: Batches that the stage holds at most; each goes back to the weights that it went forward with.
        semantics: "stash" alone keeps old weights.
        edges: Bytes of one batch as it goes from stage to stage, at each end of this one that has a neighbour.
        wider: Bytes of what its half-precision weights hold the rounding of, and by which its optimizers remember more.
        piece: The longest piece in which a body travels.
    """
    old = max(0, held - 1) * weights if semantics == "stash" else 0
    host = rounds(state, ranks) + linked(ranks - 1, ranks - 1, piece) + 2 * DEPTH * sum(edges)
    return Account(old + wider, host, sum(edges), "a batch")


def _every(steps: int) -> str:
    return "a step" if steps == 1 else f"every {steps} steps"


def short(nbytes: float) -> str:
    """So many bytes, for people: three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} bytes"
