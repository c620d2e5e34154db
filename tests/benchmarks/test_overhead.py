"""What the figure of a step is compared with: `ddp` on two ranks, its own way without shared memory on four."""

from __future__ import annotations

import pytest

from benchmarks.overhead import GLOO, Setting, settings
from benchmarks.work import Work


@pytest.mark.parametrize("quick", [True, False])
def test_four_ranks_run_with_shared_memory_and_without(quick: bool) -> None:
    *two, four = settings(quick)
    assert {setting.than for setting in two} == {"ddp"}
    assert four.than == GLOO
    assert [work.shared_memory for _, work in _of(four).values()] == [True, False]


def _of(setting: Setting) -> dict[str, tuple[object, Work]]:
    return {name: setting.variants()[name] for name in ("gossip_ring", GLOO)}
