"""What is packed comes back, to the bit."""

from __future__ import annotations

import torch

from lightning_async.strategies.whole import pack, unpack


def test_trees_of_tensors() -> None:
    tree = {
        "a": torch.randn(3, 4),
        "b": [torch.arange(5), torch.tensor(2.0, dtype=torch.bfloat16), [1, None, "x", 2.5]],
        "c": {"empty": torch.empty(0, 3), "flag": torch.tensor([True, False])},
    }
    back = unpack(pack(tree))
    assert torch.equal(back["a"], tree["a"])
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(back["b"][:2], tree["b"][:2], strict=True))
    assert back["b"][2] == [1, None, "x", 2.5]
    assert back["c"]["empty"].shape == (0, 3)
    assert back["c"]["flag"].tolist() == [True, False]
    assert unpack(pack({})) == {}
