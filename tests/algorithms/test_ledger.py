"""The ledger adds up what is missing, as precisely as weights are kept."""

from __future__ import annotations

import pytest
import torch

from lightning_async.algorithms.ledger import Ledger
from lightning_async.arrival import Fate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_body_that_travelled_in_half_precision_is_entered_exactly(dtype: torch.dtype) -> None:
    ledger = Ledger()
    body = torch.tensor([1.0, -3.0]).to(dtype)
    for _ in range(1000):
        ledger.enter(Fate.LOST, body, 1 / 3, mass=7)
    torch.testing.assert_close(ledger.total(torch.zeros(2)), torch.tensor([1000 / 3, -1000.0]), rtol=1e-4, atol=0)
    assert ledger.total_mass() == 7000
    assert ledger.count == {Fate.LOST: 1000}


def test_a_state_loads_what_was_in_it() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.enter(Fate.REFUSED, torch.ones(3), 2.0, mass=5)
    other.enter(Fate.LOST, torch.ones(3), 1.0)
    other.load_state_dict(ledger.state_dict())
    ledger.enter(Fate.REFUSED, torch.ones(3), 1.0)
    assert torch.equal(other.total(torch.zeros(3)), torch.full((3,), 2.0))
    assert (other.mass, other.count) == ({Fate.REFUSED: 5}, {Fate.REFUSED: 1})
