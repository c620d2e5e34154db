"""The callbacks that measure say something true of every strategy, and a pipeline is shrunk as FDG shrinks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import (
    AdaptiveShrink,
    AsyncGlobalStrategy,
    DelayedPipelineStrategy,
    DelayStats,
    Fate,
    LazySignStrategy,
    SpeedFaults,
    SpreadStats,
    TrafficStats,
)
from tests.strategies import piped
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run


def _figures(n: int, method: str, folder: str) -> dict[str, Any]:
    strategy = {"async_global": AsyncGlobalStrategy, "lazy_sign": LazySignStrategy}[method]()
    stats = [DelayStats(folder=folder), TrafficStats(), SpreadStats()]
    faults = SpeedFaults(step_seconds=0.004, slow={n - 1: 8.0})  # so slow on a busy machine too
    t = trainer(n, strategy=strategy, callbacks=[faults, *stats], max_epochs=2)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return {c.group: c.figures for c in stats}


@pytest.mark.few(1)
@pytest.mark.parametrize(("method", "kinds"), [("async_global", {"push", "answer"}), ("lazy_sign", {"part", "mean"})])
def test_methods_with_replicas(method: str, kinds: set[str], tmp_path: Path) -> None:
    ends = run(2, _figures, 2, method, str(tmp_path))
    assert ends[0] == ends[1]
    found = ends[0]
    assert found["delay"]["arrived"] > 0
    assert found["delay"]["rank0/steps_per_second"] > 0
    assert found["traffic"]["bytes_sent"] > 0
    assert {name.split("/")[1] for name in found["traffic"] if name.startswith("kind/")} & kinds
    if method == "lazy_sign":  # all ranks go in step, so the fast one waits
        assert found["delay"]["rank0/wait_share"] > found["delay"]["rank1/wait_share"]
        assert found["spread"]["rms"] == pytest.approx(0, abs=1e-6)


class Factors(Callback):
    """The product of the factors that a gradient met on its way to this stage, by the strategy's own record."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[int, float]] = []
        self.rates: set[float] = set()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        found = trainer.strategy.arrivals(self)
        self.arrivals = [(a.delay, a.factor) for a in found if a.fate in (Fate.FOLDED, Fate.SHRUNK)]


def _piped(n: int, law: str, knobs: dict[str, float], optimizer: str) -> dict[str, Any]:
    factors = Factors()
    stats = [DelayStats(), TrafficStats(), AdaptiveShrink(law, **knobs)]  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = DelayedPipelineStrategy(stages="net", order="forward_first")
        t = trainer(n, strategy=strategy, callbacks=[*stats, factors], max_epochs=2)
        module = piped.Piped(optimizer=optimizer)
        t.fit(module, piped.loader(), piped.loader())
    return {
        "weights": [float(x) for p in module.parameters() for x in p.detach().flatten()],
        "arrivals": factors.arrivals,
        "figures": {c.group: c.figures for c in stats},
        "said": [str(w.message) for w in caught if "learning rate" in str(w.message)],
    }


@pytest.mark.few(0)
def test_in_a_pipeline_constant_is_fdgs_shrinking() -> None:
    """Once the pipe is full: a delay of 2 (K - k), and so sqrt(1/2) to the power of that: 1/2 a stage."""
    by_law = run(3, _piped, 3, "constant", {"beta": 0.5**0.5}, "sgd")
    for rank in (1, 2):  # rank 0 is the last stage, where nothing is late
        settled = by_law[rank]["arrivals"][-10:]
        assert {delay for delay, _ in settled} == {2 * rank}
        assert [factor for _, factor in settled] == pytest.approx([0.5] * 10)
    found = by_law[0]["figures"]
    assert found["delay"]["from0/max"] == 2
    assert found["delay"]["from1/max"] == 4
    assert {"kind/activations/bytes_sent", "kind/gradients/bytes_sent"} <= set(found["traffic"])
    assert found["shrink"]["from1/min"] == pytest.approx(0.5)
    assert all(repr(end["figures"]) == repr(found) for end in by_law)  # NaN, where nothing came, is not itself


@pytest.mark.few(0)
@pytest.mark.parametrize("law", ["stability", "relative"])
def test_adaptive_laws_run_in_a_pipeline(law: str) -> None:
    ends = run(3, _piped, 3, law, {}, "sgd")
    assert all(torch.isfinite(torch.tensor(end["weights"])).all() for end in ends)
    assert 0 < ends[0]["figures"]["shrink"]["mean"] <= 1


@pytest.mark.few(0)
def test_a_pipeline_with_adam_is_slowed_in_its_learning_rate() -> None:
    ends = run(2, _piped, 2, "constant", {"beta": 0.5}, "adam")
    assert [factor for _, factor in ends[1]["arrivals"]] == [1.0] * len(ends[1]["arrivals"])
    assert ends[0]["figures"]["shrink"]["min"] == pytest.approx(0.25)
    assert ends[0]["said"]


class Told(DelayStats):
    """Keeps what every rank told at each meeting."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[Any] = []

    def conclude(self, words: Any) -> Any:
        self.words.append(words)
        return super().conclude(words)


def _told(n: int, validates: bool = True) -> dict[str, Any]:
    told, traffic = Told(), TrafficStats()
    limit = {} if validates else {"limit_val_batches": 0}
    t = trainer(n, strategy=DelayedPipelineStrategy(stages="net"), callbacks=[told, traffic], max_epochs=2, **limit)
    t.fit(piped.Piped(), piped.loader(), piped.loader())
    trained = [[word[rank]["trained"] for word in told.words] for rank in range(n)]
    return {"trained": trained, "figures": told.figures, "traffic": traffic.figures}


def test_stages_count_all_their_steps_and_a_rest_without_any_tells_no_rates() -> None:
    n = 2
    found = run(n, _told, n)[0]
    batches, samples = 2 * len(piped.loader()), 2 * len(piped.loader().dataset)  # type: ignore[arg-type]
    for rank, told in enumerate(found["trained"]):
        assert told[-1] == [0, 0, 0], "behind the last batch the stages rest again"
        seen = samples if rank == 0 else 0  # counted once, on the last stage
        assert [sum(one) for one in zip(*told, strict=True)][::2] == [batches, seen]
        assert 0 < sum(updates for _, updates, _ in told) <= batches
    assert sum(updates for _, updates, _ in found["trained"][0]) == batches
    for rank in range(n):
        assert found["figures"][f"rank{rank}/steps_per_second"] > 0
        assert found["figures"][f"rank{rank}/compute_share"] > 0
    assert found["figures"]["compute_share"] > 0
    assert found["traffic"]["occupancy"] > 0


@pytest.mark.parametrize("validates", [True, False])
def test_one_stage_alone_tells_itself(validates: bool) -> None:
    found = run(1, _told, 1, validates)[0]
    batches, samples = 2 * len(piped.loader()), 2 * len(piped.loader().dataset)  # type: ignore[arg-type]
    assert [sum(one) for one in zip(*found["trained"][0], strict=True)] == [batches, batches, samples]
    assert [told[0] for told in found["trained"][0] if told[0]] == [batches / 2] * 2, "at the end of each epoch"
    assert found["figures"]["rank0/samples_per_second"] > 0
    assert found["figures"]["compute_share"] > 0
    assert found["figures"]["straggler"] == -1
    assert found["figures"]["arrived"] == 0
    assert found["traffic"]["bytes_sent"] == 0


def _with_more_stages(n: int, folder: str, path: str | None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = ModelCheckpoint(folder, filename="it")
        options = {"enable_checkpointing": True, "callbacks": [AdaptiveShrink(), saved], "limit_val_batches": 0}
        strategy = DelayedPipelineStrategy(stages="net")
        t = trainer(n, strategy=strategy, max_epochs=1 if path is None else 2, **options)
        t.fit(piped.Piped(), piped.loader(), ckpt_path=path)
    return [str(w.message) for w in caught if "anew" in str(w.message)]


@pytest.mark.few(0)
def test_a_law_of_other_stages_begins_anew_and_says_so_once(tmp_path: Path) -> None:
    assert run(2, _with_more_stages, 2, str(tmp_path), None) == [[], []]
    assert run(3, _with_more_stages, 3, str(tmp_path), str(tmp_path / "it.ckpt")) == [
        ["strategy='delayed_pipeline': what callbacks keep (shrink) was saved by 2 ranks, and now there are 3: it "
         "begins anew"], [], []
    ]  # fmt: skip
