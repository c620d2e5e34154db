"""Which weights live on which stage: the blocks on theirs, the rest of the module on the first and on the last.

    embedding -> [ b0 b1 | b2 b3 | b4 ] -> head        what is used before the call: the first stage's
    first        first     1       last    last        everything else outside the blocks: the last stage's

A rank holds the weights of its own stage. Those of the others keep their name and shape, and one number in place of
all: so `configure_optimizers` runs as written, and the optimizer then keeps what lives here.

What lies before the call shows in the first batch: there the input of the call knows which parameters it came from.
Until then both ends hold what is outside the blocks; an optimizer does nothing to parameters without a gradient. From
then on a gradient that comes to an end where nobody uses it is refused, whenever that is (`refuse_strays`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.pipeline.replicas import REAL
from lightning_async.strategies import whole
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

OUTSIDE = -1
BY_PARAMETER = ("params", "param_names")
"""What an optimizer's group has one of for each parameter; names, if the user gave them."""
THAW = "thaw in a second `fit`, whose `configure_optimizers` finds thawed what is trained from then on"
BESIDE = (
    "is used before the call of the stages, or inside another stage, and reaches the loss also on another way: such a "
    "gradient would be lost. Let it reach the loss through the stages only (tied weights and penalties on all "
    "parameters have to be taken apart; optimizers have `weight_decay`)"
)
LATE_BEFORE = (
    "is trained before the call of the stages, and was not in the first batch of the run, which shows whose it is: it "
    f"was not used, or frozen outside of a layer, and its gradient would be lost. Use it in each batch, or {THAW}"
)


class Parts:
    """The parts of one module, seen from one stage."""

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], spans: Sequence[range], index: int) -> None:
        self.module, self.index, self.last = module, index, len(spans) - 1
        self.blocks = [blocks[i] for i in spans[index]]
        self._stage_of = _stages(module, blocks, spans)
        self._before: set[int] = set()
        self._seen = False
        self._strays: list[tuple[str, nn.Parameter]] = []
        self._away: list[nn.Parameter] = []
        self._full: list[tuple[Optimizer, list[dict[str, list[Any]]]]] = []

    def own(self) -> list[nn.Parameter]:
        """The parameters that this rank's optimizer may change."""
        return [p for p in self.module.parameters() if self._is_here(p)]

    def buffers(self) -> list[Tensor]:
        """What the forward pass of the own blocks may change."""
        return [buffer for block in self.blocks for buffer in block.buffers()]

    def all_buffers(self) -> dict[str, Tensor]:
        """What any forward pass here may change: at both ends also what is outside of the blocks."""
        here = [(name, b) for name, b, key in _keyed(self.module) if key != id(b) and self._is_at(self.index, key)]
        return dict({id(buffer): (name, buffer) for name, buffer in here}.values())

    def names(self) -> set[str]:
        """The entries of the module's state that this rank answers for."""
        found = set()
        for name, _, key in _keyed(self.module):
            stage = self._stage_of.get(key, OUTSIDE)
            before = key in self._before
            mine = stage == self.index
            if stage == OUTSIDE:
                mine = (before and self.index == 0) or (not before and self.index == self.last)
            if mine:
                found.add(name)
        return found

    # -- what lives elsewhere ------------------------------------------------------------------------------------------

    def send_away(self) -> None:
        """Free the weights of the other stages."""
        for parameter in self.module.parameters():
            if not self._is_here(parameter):
                self._away.append(parameter)
                parameter.data = away(parameter)

    def here(self) -> list[bool]:
        """Of all parameters, in the module's order, whether this rank has their numbers now."""
        elsewhere = {id(p) for p in self._away}
        return [id(p) not in elsewhere for p in self.module.parameters()]

    def take_home(self, state: dict[str, Tensor]) -> None:
        """Make the module whole again from the states of all stages; buffers may have come, or grown, elsewhere."""
        for parameter in self._away:
            parameter.data = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
        self._away = []
        for name, value in state.items():
            if isinstance(value, Tensor):
                self._make_room(name, value)
        self.module.load_state_dict(state, strict=False)  # nothing is missing: it began as this rank's own

    def _make_room(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        part = self.module.get_submodule(path)
        mine = getattr(part, leaf, None)
        if isinstance(mine, Tensor) and mine.shape == value.shape:
            return
        device = mine.device if isinstance(mine, Tensor) else next(self.module.parameters()).device
        if isinstance(mine, Tensor) or leaf in part._buffers:
            setattr(part, leaf, torch.empty_like(value, device=device))
        elif not hasattr(part, leaf):
            part.register_buffer(leaf, torch.empty_like(value, device=device))

    def keep_own(self, optimizers: Iterable[Optimizer]) -> None:
        """Let the optimizers see what lives here only; their numbering of all parameters is remembered."""
        for optimizer in optimizers:
            self._full.append((optimizer, _by_parameter(optimizer)))
            self._drop(
                optimizer, [p for group in optimizer.param_groups for p in group["params"] if not self._is_here(p)]
            )

    @contextmanager
    def whole_groups(self, optimizers: Iterable[Optimizer]) -> Iterator[None]:
        """In here the optimizers have all parameters, and may be given more; then they keep what lives here."""
        optimizers = list(optimizers)
        if self._has_others():  # of somebody else: refused behind the next batch
            yield
            return
        had = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
        known = [{id(p) for group in self.numbering(one) for p in group} for one in optimizers]
        for optimizer in optimizers:
            for group, whole_group in zip(optimizer.param_groups, self._whole(optimizer), strict=True):
                group |= {key: list(values) for key, values in whole_group.items()}
        yield
        self._full = []
        for optimizer, kept, old in zip(optimizers, had, known, strict=True):
            self._full.append((optimizer, _by_parameter(optimizer)))
            every = self.numbering(optimizer)
            here = kept | {id(p) for group in every for p in group if id(p) not in old and self._is_ours(p)}
            self._drop(optimizer, [p for group in every for p in group if id(p) not in here])

    def numbering(self, optimizer: Optimizer) -> list[list[Tensor]]:
        """All parameters of an optimizer as the user made it, group by group."""
        return [group["params"] for group in self._whole(optimizer)]

    def _whole(self, optimizer: Optimizer) -> list[dict[str, list[Any]]]:
        return next(groups for one, groups in self._full if one is optimizer)

    def optimizer_state(self, optimizer: Optimizer, rounds: Rounds) -> Wait[dict[str, Any]]:
        """The state over all parameters, numbered as the user made the optimizer; on rank 0."""
        number = {id(p): at for at, p in enumerate(p for group in self.numbering(optimizer) for p in group)}
        mine = [[number[id(p)], state] for p, state in optimizer.state.items()]
        state = optimizer.state_dict()
        entries: dict[int, Any] = {}
        for part in (yield from whole.collect(rounds, mine, 0)):
            entries |= dict(part)
        groups, at = state["param_groups"], 0
        for group, whole_group in zip(groups, self._whole(optimizer), strict=True):
            n = len(whole_group["params"])
            group |= {**whole_group, "params": list(range(at, at + n))}
            at += n
        return {"state": dict(sorted(entries.items())), "param_groups": groups}

    def own_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state over all parameters, what belongs to those that this optimizer has here."""
        groups: list[dict[str, Any]] = []
        entries: dict[int, Any] = {}
        new = 0
        for group, saved, parameters in zip(
            optimizer.param_groups, state["param_groups"], self.numbering(optimizer), strict=True
        ):
            number = {id(p): at for p, at in zip(parameters, saved["params"], strict=True)}
            olds = [number[id(p)] for p in group["params"]]
            entries |= {new + i: state["state"][old] for i, old in enumerate(olds) if old in state["state"]}
            others = {key: value for key, value in saved.items() if key not in BY_PARAMETER}
            names = {"param_names": group["param_names"]} if "param_names" in group else {}
            groups.append({**others, **names, "params": list(range(new, new + len(olds)))})
            new += len(olds)
        return {"state": entries, "param_groups": groups}

    # -- what lies before the call -------------------------------------------------------------------------------------

    def saw_call(self, x: Tensor, used: Iterable[Tensor | nn.Module], optimizers: Iterable[Optimizer]) -> None:
        """The first batch of a run has come to the call.

        Args:
            x: Its input.
            used: The modules that were used before it, and their frozen parameters.
            optimizers: They keep what lives here.
        """
        leaves = _leaves(x)
        self._seen = True
        self._before = {id(leaf) for leaf in leaves} | {id(one) for one in used}
        outside = [p for p in self.module.parameters() if self.is_outside(p)]
        if self.index in (0, self.last):
            others = [p for p in outside if (id(p) in self._before) != (self.index == 0)]
            for optimizer in optimizers:
                self._drop(optimizer, others)
            gone = {id(p) for p in others} | (self._before if self.index == self.last else set())
            self._strays = [(n, p) for n, p in self.module.named_parameters() if id(p) in gone or not self._is_here(p)]

    def refuse_strays(self) -> None:
        """After a backward pass: gradients may be where they are used, and nowhere else; so too in later epochs."""
        for name, parameter in self._strays:
            if parameter.grad is not None:
                late = self.index == 0 and self.is_outside(parameter)
                raise MisconfigurationException(f"`{name}` {LATE_BEFORE if late else BESIDE}")
        if self._has_others():
            raise MisconfigurationException(
                "an optimizer was given another group of parameters during the fit, and here each stage has its part "
                f"of those that `configure_optimizers` made: {THAW}"
            )

    def refuse_unreal(self) -> None:
        """Replicas average gradients that are real numbers; what is frozen may be anything."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and parameter.dtype not in REAL and self._is_here(parameter):
                apart = "keep its real and its imaginary part in one (`torch.view_as_real`), "
                raise MisconfigurationException(
                    f"`{name}` is trained in {parameter.dtype}, and with `replicas` gradients are averaged as real "
                    f"numbers: {apart if parameter.is_complex() else ''}freeze it, or train with replicas=1"
                )

    def _has_others(self) -> bool:
        """Whether an optimizer has groups that nobody cut."""
        return any(len(optimizer.param_groups) != len(groups) for optimizer, groups in self._full)

    def is_outside(self, parameter: Tensor) -> bool:
        """Whether it is outside of the blocks."""
        return self._stage_of.get(id(parameter), OUTSIDE) == OUTSIDE

    def _is_ours(self, parameter: Tensor) -> bool:
        """Whether this rank steps it, as far as that is known by now."""
        if not self._is_here(parameter):
            return False
        known = self._seen and self.is_outside(parameter)
        return not known or (id(parameter) in self._before) == (self.index == 0)

    def nbytes(self, stage: int) -> int:
        """The weights that a stage holds at first, wherever they are: both ends have what is outside of the blocks."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters() if self._is_at(stage, id(p)))

    def stepped_at(self, stage: int, optimizer: Optimizer) -> list[Tensor]:
        """What an optimizer steps on a stage, as far as that is known at first."""
        return [
            p for group in self.numbering(optimizer) for p in group if p.requires_grad and self._is_at(stage, id(p))
        ]

    def _is_here(self, parameter: Tensor) -> bool:
        return self._is_at(self.index, id(parameter))

    def _is_at(self, index: int, key: int) -> bool:
        stage = self._stage_of.get(key, OUTSIDE)
        return stage == index or (stage == OUTSIDE and index in (0, self.last))

    def _drop(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        gone = {id(p) for p in parameters}
        for group in optimizer.param_groups:
            kept = [at for at, p in enumerate(group["params"]) if id(p) not in gone]
            group |= {key: [group[key][at] for at in kept] for key in BY_PARAMETER if key in group}
        for parameter in [p for p in optimizer.state if id(p) in gone]:
            del optimizer.state[parameter]


def _by_parameter(optimizer: Optimizer) -> list[dict[str, list[Any]]]:
    return [{key: list(group[key]) for key in BY_PARAMETER if key in group} for group in optimizer.param_groups]


def away(parameter: Tensor, device: torch.device | str | None = None) -> Tensor:
    """One number in the place of all, which are elsewhere; on another device, if one is named."""
    return parameter.data.new_zeros((), device=device).expand(parameter.shape)


def _stages(module: nn.Module, blocks: Sequence[nn.Module], spans: Sequence[range]) -> dict[int, int]:
    """The stage of each parameter, buffer and module inside the blocks. Refuses tensors that are in two places."""
    inside: dict[int, int] = {}
    for stage, span in enumerate(spans):
        for i in span:
            inside |= {id(part): stage for part in blocks[i].modules()}
            for name, tensor in _tensors(blocks[i]):
                if inside.setdefault(id(tensor), stage) != stage:
                    raise _tied(f"block {i}'s `{name}`", f"stages {inside[id(tensor)]} and {stage}")
    owned = {id(part) for block in blocks for part in block.modules()}
    for path, part in module.named_modules():
        if id(part) not in owned:
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if id(tensor) in inside:
                    raise _tied(f"`{path}.{name}`", f"stage {inside[id(tensor)]} and what is outside of the stages")
    return inside


def _tied(what: str, where: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{what} is shared between {where}: tied weights must live in one stage. Cut elsewhere, or untie them"
    )


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _keyed(module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Each parameter and buffer, and by what it is known: a buffer by its module, since another may take its place."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter, id(parameter)
    for path, part in module.named_modules(remove_duplicate=False):
        for name, buffer in part.named_buffers(path, recurse=False):
            yield name, buffer, id(part)


def _leaves(x: Tensor) -> list[Tensor]:
    """The tensors at the beginning of the graph that `x` ends."""
    found, seen, waiting = [], set(), [x.grad_fn]
    if x.grad_fn is None and x.requires_grad:
        return [x]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return found
