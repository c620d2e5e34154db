"""All that is as long as the model is kept: after the first rounds a step makes no tensor and no array of that size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_async.transport.mail import Wait
from lightning_async.transport.virtual import VirtualCluster
from tests.algorithms.sign_world import Member, life, members, quadratic

D, STEPS, FIRST = 1 << 15, 10, 4
HALF = D * 4 // 2
"""Bytes of half a vector; a block is a 64th, a sheet a 32nd of it."""


class Counts(TorchDispatchMode):
    """Notes the operations that made a tensor of more than half the vector."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {storage for storage, _ in _storages((args, kwargs))}
        self.made += [str(func) for storage, size in _storages(out) if size > HALF and storage not in before]
        return out


def _storages(tree: Any) -> Iterator[tuple[int, int]]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()


def watch(member: Member, counts: Counts) -> None:
    """Look at what the algorithm does in its steps, from the fifth on."""

    def watched(do: Any) -> Any:
        def step(replica: Any, mail: Any, k: int) -> Wait[Any]:
            wait = do(replica, mail, k)
            while True:
                try:
                    if k <= FIRST:
                        next(wait)
                    else:
                        with counts:
                            tracemalloc.start()
                            try:
                                next(wait)
                            finally:
                                peak = tracemalloc.get_traced_memory()[1]
                                tracemalloc.stop()
                                counts.made += ["NumPy"] if peak > HALF else []
                except StopIteration as end:
                    return end.value
                yield "the others"

        return step

    member.algorithm.before_step = watched(member.algorithm.before_step)  # type: ignore[method-assign]
    member.algorithm.after_step = watched(member.algorithm.after_step)  # type: ignore[method-assign]


@pytest.mark.few(2)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("compress", ["update", "gradient"])
@pytest.mark.parametrize("rule", ["always", "accumulate", "paper", "innovation"])
def test_a_step_allocates_nothing_as_long_as_the_model(rule: str, compress: str, form: str) -> None:
    knobs: dict[str, Any] = {"rule": rule, "compress": compress, "form": form, "history": 3, "max_skip": 2}
    some = members(3, [(D - 8,), (8,)], dtype=torch.float32, block=D // 64, min_size=16, threshold=0.6, **knobs)
    watch(some[0], counts := Counts())
    virtual, gradient = VirtualCluster(3), quadratic(3, D)[0]
    virtual.run({c.me: life(some[c.me], c, gradient, steps=STEPS) for c in virtual.carriers})
    assert counts.made == []


def test_what_is_made_is_noticed() -> None:
    with (counts := Counts()):
        torch.zeros(D).add_(1.0)[8:].neg()
        torch.zeros(8)
    assert counts.made == ["aten.zeros.default", "aten.neg.default"]
