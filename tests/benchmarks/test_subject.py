"""A benchmark is of the strategy that it is told, and says so where there is no choice."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.subject import algorithm, made, subject, with_control
from lightning_async import AsyncGlobalStrategy, GossipRingStrategy
from lightning_async.algorithms.async_global import AsyncGlobal


def test_it_is_of_the_strategy_that_it_is_told() -> None:
    assert isinstance(made(subject("gossip_ring")), GossipRingStrategy)
    assert isinstance(made(subject("async_global")), AsyncGlobalStrategy)
    assert isinstance(algorithm({"strategy": "async_global", "pace": 3}), AsyncGlobal)
    assert list(with_control("async_global")) == ["async_global", "none", "ddp"]


def test_an_unknown_strategy_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"the strategies are .*async_global.*, got 'sgd'"):
        made({"strategy": "sgd"})


def test_where_there_is_no_choice_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--strategy", "async_global"]) == 2
    assert "benchmark overhead takes no --strategy: leave it out" in capsys.readouterr().err
