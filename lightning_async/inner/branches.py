"""Independent branches of a model as tasks, forward and backward: what does not need each other runs at the same time.

              +-- conv --- norm --- relu --+            a chain of layers that only hand on to each other is one task
    input ----+-- conv --- norm -----------+-- cat      a task's cost is what it took the last time
              +-- pool --------------------+

Each task records its own part of the autograd graph, with its inputs cut off; backward goes through the tasks in the
other direction, and adds up what several of them say of one value in a fixed order. The model is traced once
(`torch.fx`), so it must not decide anything by the values of its input. Dropout draws in the order in which tasks run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_async.inner.tasks import Tasks
from lightning_async.inner.threads import Threads

CALLS = ("call_module", "call_function", "call_method")


class Branches(nn.Module):
    """The same model, of which independent branches are computed at the same time.

    Args:
        model: The model: tensors in, one tensor out.
        threads: Where the tasks run.
    """

    def __init__(self, model: nn.Module, threads: Threads) -> None:
        super().__init__()
        self.model = model
        self.threads = threads
        traced = fx.symbolic_trace(model)
        self._calls = fx.Interpreter(traced)
        self._nodes = list(traced.graph.nodes)
        self._given = [node for node in self._nodes if node.op == "placeholder"]
        self._result = self._nodes[-1].args[0]
        if not isinstance(self._result, fx.Node):
            raise ValueError(f"a model of branches must return one tensor, and this one returns {self._result}")
        self.chains = _chains(self._nodes)
        self._own = [_weights(chain, self._calls) for chain in self.chains]
        self.tasks = Tasks([1.0] * len(self.chains), _needs(self.chains))

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the model gives."""
        weights = [p for own in self._own for p in own]
        found: Tensor = _Branched.apply(self, len(inputs), torch.is_grad_enabled(), *inputs, *weights)  # type: ignore[no-untyped-call]
        return found

    def compute(self, inputs: Sequence[Tensor], recording: bool) -> tuple[Tensor, list[Part]]:
        """Do all tasks."""
        values: dict[fx.Node, Any] = dict(zip(self._given, inputs, strict=True))
        values |= {node: self._calls.get_attr(node.target, (), {}) for node in self._nodes if node.op == "get_attr"}
        parts = [Part(chain, own) for chain, own in zip(self.chains, self._own, strict=True)]
        self.threads.run([partial(part.compute, values, self._call, recording) for part in parts], self.tasks)
        self.tasks = Tasks([part.seconds for part in parts], self.tasks.needs)
        return values[self._result], parts

    def go_back(self, parts: list[Part], grad: Tensor, inputs: int) -> list[Tensor | None]:
        """All tasks in the other direction; the gradients of the inputs and of the weights, in the order they came."""
        last = len(parts) - 1
        told: dict[fx.Node, dict[int, Tensor]] = {self._result: {last + 1: grad}}
        works = [partial(parts[last - k].go_back, told, last - k) for k in range(len(parts))]
        needs = [[last - other for other in self.tasks.then[last - k]] for k in range(len(parts))]
        self.threads.run(works, Tasks([self.tasks.costs[last - k] for k in range(len(parts))], needs))
        of_inputs = [_added(told.get(node)) for node in self._given[:inputs]]
        return [*of_inputs, *(g for part in parts for g in part.grads)]

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return getattr(self._calls, node.op)(node.target, args, kwargs)


class Part:
    """One task of one pass: a chain of nodes, its inputs, what it gave, and the gradients of its weights."""

    def __init__(self, chain: list[fx.Node], weights: list[nn.Parameter]) -> None:
        self.grads: list[Tensor | None] = [None] * len(weights)
        self.seconds = 0.0
        self._chain, self._weights = chain, weights
        self._inputs: dict[fx.Node, Tensor] = {}
        self._output: Any = None

    def compute(
        self, values: dict[fx.Node, Any], call: Callable[[fx.Node, dict[fx.Node, Any]], Any], recording: bool
    ) -> None:
        """Forward."""
        began = time.perf_counter()
        own = {node: values[node] for node in _from_outside(self._chain)}
        told = {n: v for n, v in own.items() if recording and n.op != "get_attr" and _counts(v)}
        self._inputs = {n: v.detach().requires_grad_() for n, v in told.items()}
        own |= self._inputs
        with torch.set_grad_enabled(recording):
            for node in self._chain:
                own[node] = call(node, own)
        self._output = own[self._chain[-1]]
        if recording and not isinstance(self._output, (Tensor, int, float, torch.Size)):
            raise ValueError(f"a branch of the model hands on {type(self._output).__name__}, and only tensors can be")
        values[self._chain[-1]] = self._output.detach() if isinstance(self._output, Tensor) else self._output
        self.seconds = max(1e-9, time.perf_counter() - began)

    def go_back(self, told: dict[fx.Node, dict[int, Tensor]], number: int) -> None:
        """Backward: tell those before what is asked of them."""
        grad, asked = _added(told.get(self._chain[-1])), [*self._inputs.values(), *self._weights]
        asked = [tensor for tensor in asked if tensor.requires_grad]
        if grad is None or not asked or not isinstance(self._output, Tensor) or not self._output.requires_grad:
            return
        found = iter(torch.autograd.grad(self._output, asked, grad, allow_unused=True))
        for node in self._inputs:
            if (part := next(found)) is not None:
                told.setdefault(node, {})[number] = part
        self.grads = [next(found) if weight.requires_grad else None for weight in self._weights]


class _Branched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branches: Branches, inputs: int, grad: bool, *tensors: Tensor) -> Tensor:
        ctx.branches, ctx.inputs = branches, inputs
        recording = grad and any(tensor.requires_grad for tensor in tensors)
        output, ctx.parts = branches.compute(tensors[:inputs], recording)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.branches.go_back(ctx.parts, grad, ctx.inputs)


def _chains(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """The calls of a graph, those that only hand on to each other together, in an order that can be computed."""
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node in (node for node in nodes if node.op in CALLS):
        before = [other for other in node.all_input_nodes if other.op in CALLS]
        chain = chains.pop(before[0]) if len(before) == 1 and len(before[0].users) == 1 else []
        chains[node] = [*chain, node]
    return list(chains.values())


def _needs(chains: list[list[fx.Node]]) -> list[list[int]]:
    """Which chains come before each: those it hears from, and those that use one of its modules before it."""
    made = {chain[-1]: number for number, chain in enumerate(chains)}
    used: dict[Any, int] = {}
    needs = []
    for number, chain in enumerate(chains):
        modules = [node.target for node in chain if node.op == "call_module"]
        needs.append([made[n] for n in _from_outside(chain) if n in made] + [used[m] for m in modules if m in used])
        used |= dict.fromkeys(modules, number)
    return [[other for other in before if other != number] for number, before in enumerate(needs)]


def _from_outside(chain: list[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(n for node in chain for n in node.all_input_nodes if n not in chain))


def _weights(chain: list[fx.Node], calls: fx.Interpreter) -> list[nn.Parameter]:
    """The weights that a chain uses: of its layers, and such as the model itself has."""
    layers = [calls.submodules[str(node.target)] for node in chain if node.op == "call_module"]
    own = [calls.fetch_attr(str(node.target)) for node in _from_outside(chain) if node.op == "get_attr"]
    weights = [*(p for layer in layers for p in layer.parameters()), *(p for p in own if isinstance(p, nn.Parameter))]
    return list(dict.fromkeys(weights))


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _added(parts: dict[int, Tensor] | None) -> Tensor | None:
    """What several tasks say of one value, added in the order of their numbers."""
    if not parts:
        return None
    _, *others = ordered = [parts[number] for number in sorted(parts)]
    total = ordered[0]
    for part in others:
        total = total + part
    return total
