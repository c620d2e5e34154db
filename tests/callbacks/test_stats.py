"""What the statistics say of real runs: the same on every rank, and what a witness counted by itself."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async import (
    AdaptiveShrink,
    DelayedPipelineStrategy,
    DelayStats,
    Fate,
    SpeedFaults,
    SpreadStats,
    TrafficStats,
)
from lightning_async.callbacks import SignGradients
from lightning_async.callbacks.watched import NAMES, Watched
from lightning_async.progress.stretch import Stretch
from lightning_async.progress.tally import Tally
from lightning_async.strategies import STRATEGIES
from lightning_async.transport.traffic import Count
from tests.callbacks.measured import PAUSE, SLOW, fit, journal, logged, only_rank_0, sketched
from tests.strategies.ranks import run

KINDS = [DelayStats, AdaptiveShrink, TrafficStats, SpreadStats]


@pytest.fixture(scope="module")
def gossip(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Three ranks, the last 10x slow, with all that measures and a shrink by 1 / (1 + 0.1 delay)."""
    folder = tmp_path_factory.mktemp("gossip")
    return run(3, fit, 3, str(folder), "gossip_ring", {"at_meeting": "keep", "balance": "equal"}), folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Two ranks that wait for each other, the last 10x slow."""
    folder = tmp_path_factory.mktemp("ddp")
    return run(2, _quiet_ddp, 2, str(folder)), folder


def _quiet_ddp(n: int, folder: str) -> dict[str, Any]:
    first = os.environ["RANK"] == "0"
    with pytest.warns(UserWarning, match="has nothing to say .*; leave it out") if first else nullcontext():
        return fit(n, folder, "ddp", {})


def test_all_ranks_say_the_same(gossip: Any, ddp: Any) -> None:
    for ends, _ in (gossip, ddp):
        assert all(end["figures"] == ends[0]["figures"] for end in ends)
        assert all(end["stragglers"] == ends[0]["stragglers"] for end in ends)


def test_delays_are_those_of_all_arrivals(gossip: Any) -> None:
    ends, _ = gossip
    delay, shrink = ends[0]["figures"]["delay"], ends[0]["figures"]["shrink"]
    arrivals = [a for end in ends for a in end["arrivals"]]
    delays = np.array([a.delay for a in arrivals])
    assert delay["arrived"] == len(arrivals)
    assert delay["shrunk"] == sum(a.fate is Fate.SHRUNK for a in arrivals) > 0
    assert delay["mean"] == pytest.approx(delays.mean())
    for q in (50, 95, 99):
        assert delay[f"p{q}"] == np.quantile(delays, q / 100, method="inverted_cdf")
    for peer in range(3):
        of_peer = np.array([a.delay for a in arrivals if a.peer == peer])
        assert delay[f"from{peer}/max"] == of_peer.max()
        assert delay[f"from{peer}/mean"] == pytest.approx(of_peer.mean())
    assert shrink["mean"] == pytest.approx(np.mean(1 / (1 + 0.1 * delays)))
    assert shrink["min"] == pytest.approx(1 / (1 + 0.1 * delays.max()))
    assert shrink["count"] == len(arrivals)
    assert shrink["excess_mean"] == pytest.approx(delays.mean())  # `healthy` is 0 here
    for peer in range(3):
        of_peer = np.array([a.delay for a in arrivals if a.peer == peer])
        assert shrink[f"from{peer}/mean"] == pytest.approx(np.mean(1 / (1 + 0.1 * of_peer)))
        assert shrink[f"from{peer}/excess_mean"] == pytest.approx(of_peer.mean())


def test_steps_and_samples_are_those_of_each_rank(gossip: Any, ddp: Any) -> None:
    for ends, folder in (gossip, ddp):
        lines = [line for line in journal(folder) if line["group"] == "delay"]
        assert len(lines) == 2
        for rank, end in enumerate(ends):
            words = [line["words"][str(rank)] for line in lines]
            assert [sum(word["trained"][at] for word in words) for at in (0, 2)] == [end["steps"], end["samples"]]
            for word in words:
                parts = word["compute"] + word["exchange"] + word["waited"]
                assert parts == pytest.approx(word["seconds"], abs=1e-4)


def work_a_batch(folder: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any], float]:
    """What the ranks told at the last meeting; seconds of work in a batch, by rank; seconds of a batch at most."""
    words = [line["words"] for line in journal(folder) if line["group"] == "delay"][-1]
    rows = np.array([[word["compute"], word["seconds"], word["trained"][0]] for word in words.values()])
    return words, rows[:, 0] / rows[:, 2], (rows[:, 1] / rows[:, 2]).max()


def test_the_slow_one_is_named(gossip: Any, ddp: Any) -> None:
    """The one that was made slow; and NumPy, by the same rule, names the same from what was measured."""
    for ends, folder in (gossip, ddp):
        found = ends[0]["figures"]["delay"]
        words, work, step = work_a_batch(folder)
        assert work[-1] >= PAUSE * SLOW  # a pause may last longer, never shorter
        middle = np.quantile(work, 0.5, method="inverted_cdf")
        usual = max(np.quantile(np.abs(work - middle), 0.5, method="inverted_cdf"), 0.05 * middle)
        slow = [rank for rank in np.argsort(-work).tolist() if work[rank] > middle + 3 * usual]
        assert ends[0]["stragglers"] == tuple(slow)
        assert found["straggler"] == slow[0] == len(work) - 1
        for rank, word in words.items():
            mine = [word[name] for name in ("compute", "exchange", "waited", "idle")]
            for name, share in (("compute", mine[0]), ("exchange", mine[1]), ("wait", mine[2] + mine[3])):
                assert found[f"rank{rank}/{name}_share"] == pytest.approx(share / sum(mine))
            assert found[f"rank{rank}/idle_seconds"] == mine[3]
        spent = np.array(
            [[word[name] for name in ("compute", "exchange", "waited", "idle")] for word in words.values()]
        )
        shares = spent.sum(0) / spent.sum()
        assert found["compute_share"] == pytest.approx(shares[0])
        assert found["exchange_share"] == pytest.approx(shares[1])
        assert found["wait_share"] == pytest.approx(shares[2] + shares[3])
        assert found["idle_seconds"] == spent[:, 3].max()
    assert found["rank0/wait_share"] > found["rank1/wait_share"]
    assert found["gain"] > 1.1
    assert found["gain"] == pytest.approx((1 / work).sum() / (len(work) / step))


def test_the_spread_is_the_strategys(gossip: Any) -> None:
    ends, _ = gossip
    spread = ends[0]["figures"]["spread"]
    assert spread["rms"] > 0
    # the strategy divides by the length of the flat vector, which has some padding
    assert spread["rms"] * np.sqrt(97) == pytest.approx(ends[0]["spread"] * np.sqrt(144), rel=1e-5)
    parts = {name for name in spread if name.startswith("in/")}
    assert {name.split("/")[1] for name in parts} == {"layer.0", "layer.1", "layer.2"}
    squares = [numbers * spread[f"in/layer.{at}/rms"] ** 2 for at, numbers in ((0, 72), (1, 16), (2, 9))]
    assert sum(squares) == pytest.approx(97 * spread["rms"] ** 2)
    apart = [np.subtract(end["own"], ends[0]["consensus"]) for end in ends]
    assert all(end["consensus"] == ends[0]["consensus"] for end in ends)
    rms = [np.sqrt((one**2).mean()) for one in apart]
    assert spread["rms"] == pytest.approx(np.sqrt((np.stack(apart) ** 2).mean()), rel=1e-5)
    assert spread["farthest_rms"] == pytest.approx(rms[int(spread["farthest"])], rel=1e-5) == pytest.approx(max(rms))
    size = np.sqrt(sum((np.array(end["own"]) ** 2).sum() for end in ends))
    assert spread["relative"] == pytest.approx(np.sqrt(sum((one**2).sum() for one in apart)) / size, rel=1e-5)


def test_the_traffic_is_the_carriers(gossip: Any) -> None:
    ends, _ = gossip
    traffic = ends[0]["figures"]["traffic"]
    own = [name for name in traffic if name.startswith("kind/") and name.split("/")[1] in ("ask", "answer", "bounce")]
    for what, at in (("bytes_sent", 0), ("messages_sent", 1)):
        assert sum(traffic[name] for name in own if name.endswith(what)) == sum(end["sent"][at] for end in ends)
    assert traffic["kind/ask/bytes_sent"] == traffic["kind/ask/bytes_received"] > 0
    assert traffic["bytes_sent"] == sum(
        traffic[n] for n in traffic if n.startswith("rank") and n.endswith("bytes_sent")
    )
    assert traffic["compression"] == 1
    assert 0 < traffic["occupancy"] <= 1
    assert 0 <= traffic["hidden_share"] <= 1


def test_logged_from_rank_0_grouped_and_in_the_bar(gossip: Any, ddp: Any) -> None:
    ends, folder = gossip
    keys = {name for row in logged(folder) for name, value in row.items() if value}
    for group, figures in ends[0]["figures"].items():
        known = {f"{group}/{name}" for name, value in figures.items() if np.isfinite(value)}
        assert known <= keys
    assert {"delay/p95", "delay/straggler", "shrink/mean", "spread/relative"} <= set(ends[0]["bar"])
    assert ends[0]["bar"]["delay/straggler"] == 2
    for name in ("delay/straggler", "delay/p95", "shrink/mean", "spread/relative"):
        assert ends[0]["bar"][name] == pytest.approx(ends[0]["figures"][name.split("/")[0]][name.split("/")[1]])
    assert all(set(end["bar"]) == set(ends[0]["bar"]) for end in ends)
    assert "delay/gain" in {name for row in logged(ddp[1]) for name in row}


def test_sketches_are_logged_between_meetings(tmp_path: Path) -> None:
    run(2, sketched, str(tmp_path))
    lines = [line for line in journal(tmp_path) if line["group"] == "sketch"]
    assert lines
    assert all(line["words"]["rms"] >= 0 for line in lines)
    assert any(row.get("spread/sketch") for row in logged(tmp_path))


def test_the_journal_knows_what_was_logged(gossip: Any) -> None:
    values = [line["words"] for line in journal(gossip[1]) if line["group"] == "logged"]
    assert any("val" in words for words in values)
    assert any("train_epoch" in words for words in values)


def test_ddp_is_left_as_it_was(ddp: Any) -> None:
    assert not any(end["wrapped"] for end in ddp[0])
    assert {name for name in ddp[0][0]["bar"] if "/" in name} == {"delay/straggler", "delay/wait_share"}
    assert ddp[0][0]["figures"]["traffic"] == ddp[0][0]["figures"]["spread"] == {}


def test_callbacks_that_differ_by_rank_make_nobody_wait(tmp_path: Path) -> None:
    first, second = run(2, only_rank_0, str(tmp_path))
    assert first["rank0/steps_per_second"] > 0
    assert second == {}
    assert [set(line["words"]) for line in journal(tmp_path) if line["group"] == "delay"] == [{"0"}, {"0"}]


@pytest.mark.parametrize("kind", [*STRATEGIES, DelayedPipelineStrategy])
def test_every_strategy_shows_all_that_callbacks_may_see(kind: type[Any]) -> None:
    strategy = kind()
    assert not [name for name in NAMES if name not in dir(strategy)]
    assert {name for name in vars(Watched) if not name.startswith("_")} <= set(NAMES)


@pytest.mark.parametrize("kind", [*KINDS, SpeedFaults, SignGradients])
def test_one_stands_twice(kind: type[Any]) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[kind(), kind()], max_steps=1
    )
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} stands 2 times among the callbacks"):
        trainer.fit(BoringModel())


@pytest.mark.parametrize(
    ("kind", "knobs", "sentence"),
    [
        (DelayStats, {"k": 0}, "`k` must be above 0, got 0"),
        (DelayStats, {"by_rank": -1}, "`by_rank` must be an integer of at least 0, got -1"),
        (DelayStats, {"folder": 3}, "`folder` must be the path of a folder, or None, got 3"),
        (TrafficStats, {"by_rank": 1.5}, "`by_rank` must be an integer of at least 0, got 1.5"),
        (SpreadStats, {"depth": -1}, "`depth` must be an integer of at least 0, got -1"),
        (SpreadStats, {"every": 0}, "`every` must be a number of seconds above 0, or None, got 0"),
        (AdaptiveShrink, {"law": "linear"}, "`law` must be one of constant, .*, got 'linear'"),
        (AdaptiveShrink, {"healthy": -1}, "`healthy` must be an integer of at least 0, or None, got -1"),
    ],
)
def test_wrong_knobs(kind: type[Any], knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(**knobs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_was_not_measured_is_not_said(device: str) -> None:
    """A thread that drives a GPU does not wait where the device does."""
    words = {}
    for rank in range(2):
        strategy = SimpleNamespace(root_device=torch.device(device), training_step=print)
        trainer = SimpleNamespace(strategy=strategy, global_step=0, world_size=2, is_global_zero=True)
        stats = DelayStats()
        stats.begin(cast(Trainer, trainer), BoringModel())
        words[rank] = stats.say(Stretch(Tally(10, 5, 80), seconds=2.0, waited=rank * 1.0))
        stats.end(cast(Trainer, trainer))
    found = stats.conclude(words)
    assert found["rank0/samples_per_second"] == 40
    assert found["rank0/steps_per_second"] == 2.5  # of the optimizer, which steps at every second batch
    told = {"straggler", "gain", "compute_share", "exchange_share", "wait_share", "idle_seconds", "rank1/wait_share"}
    assert told & set(found) == (told if device == "cpu" else set())
    assert stats.stragglers == ((0,) if device == "cpu" else ())


@pytest.mark.parametrize("noticed", [0.0, 3.0, 10.0])
def test_hidden_is_the_part_of_all_links_seconds_in_which_a_rank_trained(noticed: float) -> None:
    """Three peers; seconds under way add up over links, seconds that training noticed are those of one clock."""
    seconds, draw = 10.0, np.random.default_rng(0)
    under_way = draw.uniform(0, seconds, 3)
    table = {1 + at: {16: Count(messages_out=1, seconds_out=taken)} for at, taken in enumerate(under_way)}
    stats = TrafficStats()
    stats._strategy = cast(Watched, SimpleNamespace(traffic=lambda: table, kinds={16: "ask"}, skipped=0))
    word = stats.say(Stretch(seconds=seconds, exchange=noticed / 3, waited=noticed * 2 / 3))
    assert word["hidden"] == pytest.approx(under_way.sum() * (seconds - noticed) / seconds, abs=1e-5)
    stats.begin(cast(Trainer, SimpleNamespace(world_size=4)), BoringModel())
    found = stats.conclude({0: word})
    assert found["hidden_share"] == pytest.approx(1 - noticed / seconds)
    assert found["occupancy"] == pytest.approx(under_way.max() / seconds)
