"""An honest run keeps its promises; each broken one is found, and named with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_async import SpeedFaults
from lightning_async.arrival import Arrival
from lightning_async.cli import main
from lightning_async.data.balance import Incremental
from lightning_async.metrics import DelayMetric, pack
from lightning_async.strategies import STRATEGIES, DelayedPipelineStrategy
from tests.cli import recorded
from tests.cli.runs import copied, record, write
from tests.strategies.lit import trainer
from tests.strategies.ranks import run

Spoil = Callable[[dict[int, list[Any]]], None]


def audited(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(["audit", str(folder), *argv])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def notes(lines: list[Any], name: str) -> list[Any]:
    return [line for line in lines[1:] if line[1:3] == ["note", name]]


def fit(n: int, data: str, method: str, knobs: dict[str, Any]) -> None:
    """Three epochs over these data."""
    kind = next(kind for kind in (*STRATEGIES, DelayedPipelineStrategy) if kind.name == method)
    trainer(n, strategy=kind(**knobs), max_epochs=3).fit(recorded.Net(), getattr(recorded, data)())


def test_an_honest_run(ordinary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = audited(ordinary, capsys)
    assert status == 0
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["kept", "delays:"],
        ["kept", "mass:"],
        ["kept", "samples:"],
        ["kept", "weights:"],
    ]


@pytest.mark.parametrize("mode", ["push_sum"])
def test_the_masses_of_push_sum_add_up(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "run", 3, mode=mode, max_delay=1, at_meeting="keep")
    status, said = audited(tmp_path / "run", capsys)
    assert status == 0, said
    assert "to the last unit" in said
    assert " 0 refused" not in said


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("data", "method", "knobs"),
    [
        ("uneven", "lazy_sign", {}),
        ("incomplete", "gossip_ring", {}),
        ("drawn_again", "gossip_ring", {}),
        ("own_batches", "gossip_ring", {"balance": "equal"}),
        ("incomplete", "gossip_ring", {"balance": "equal"}),
        ("uneven", "gossip_ring", {"mode": "sync"}),
        ("incomplete", "delayed_pipeline", {"stages": "layer"}),
        ("uneven", "async_global", {"balance": Incremental(parts=3, partition="kept")}),
        ("incomplete", "cyclic_delay", {"balance": Incremental(parts=3)}),
    ],
)
def test_an_epoch_is_what_its_loader_makes_of_it(
    data: str, method: str, knobs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(2, fit, 2, data, method, {"record": str(tmp_path), **knobs})
    status, said = audited(tmp_path, capsys)
    assert status == 0, said
    often = " (as often as the sampler drew it)" if data == "drawn_again" else ""
    assert f"kept    samples: each once{often} in 3 of 3 epochs" in said


def test_what_a_sampler_of_the_users_own_gives_to_a_pipeline_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(1, fit, 1, "drawn_again", "delayed_pipeline", {"record": str(tmp_path), "stages": "layer"})
    said = audited(tmp_path, capsys)[1]
    assert "?       samples: the sampler is the user's own" in said
    assert "?       weights: no consensus was recorded" in said


def _bounded(n: int, folder: str, method: str, knobs: dict[str, Any]) -> None:
    kind = next(kind for kind in STRATEGIES if kind.name == method)
    faults = SpeedFaults(step_seconds=0.002, slow={n - 1: 8.0})
    t = trainer(n, strategy=kind(record=folder, max_delay=1, **knobs), callbacks=[faults], max_epochs=2)
    t.fit(recorded.Net())


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("async_global", {"on_late": "shrink"}),
        ("async_global", {"on_late": "drop"}),
        ("async_global", {"on_late": "wait"}),
        ("cyclic_delay", {}),
        ("gossip_ring", {}),
        ("gossip_ring", {"mode": "push_sum"}),
    ],
    ids=str,
)
def test_a_tight_bound_is_kept_as_the_method_promises(
    method: str, knobs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(3, _bounded, 3, str(tmp_path), method, knobs)
    status, said = audited(tmp_path, capsys)
    assert status == 0, said
    assert "kept    delays: " in said


@pytest.mark.parametrize(
    ("strategy", "on_late", "fate", "broken"),
    [
        ("async_global", "shrink", "shrunk", False),
        ("async_global", "shrink", "folded", True),
        ("async_global", "drop", "shrunk", True),
        ("async_global", "drop", "refused", False),
        ("cyclic_delay", None, "shrunk", False),
        ("cyclic_delay", None, "folded", True),
        ("gossip_ring", None, "shrunk", True),
    ],
)
def test_what_is_late_by_a_version_too_many(
    strategy: str, on_late: str | None, fate: str, broken: bool, ordinary: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two members have 2 versions between two pushes that are in time; in gossip a delay is none of versions."""
    logs = copied(ordinary, tmp_path / "run")
    bound = 500
    for lines in logs.values():
        lines[0]["strategy"] = strategy
        lines[0]["knobs"] |= {"max_delay": bound, "on_late": on_late}
    arrival = notes(logs[1], "arrivals")[3][3][0]
    arrival[2], arrival[6] = arrival[3] - bound - (0 if strategy == "gossip_ring" else 2), "folded"
    write(tmp_path / "run", logs)
    assert audited(tmp_path / "run", capsys)[0] == 0
    arrival[2], arrival[6] = arrival[2] - 1, fate
    write(tmp_path / "run", logs)
    status, said = audited(tmp_path / "run", capsys)
    assert status == broken, said


def late(logs: dict[int, list[Any]]) -> None:
    arrival = notes(logs[1], "arrivals")[3][3][0]
    arrival[2] = arrival[3] - 900  # launched long ago


def heavier(logs: dict[int, list[Any]]) -> None:
    notes(logs[1], "accounts")[1][3]["mass"][0] += 1


def twice(logs: dict[int, list[Any]]) -> None:
    fetched = notes(logs[1], "fetched")
    fetched[2][3][0] = fetched[1][3][0]


def left_out(logs: dict[int, list[Any]]) -> None:
    for dealt in notes(logs[0], "dealt") + notes(logs[1], "dealt"):
        dealt[3]["samples"] += 1
        dealt[3]["unlike"] += 1


def other_weights(logs: dict[int, list[Any]]) -> None:
    notes(logs[1], "consensus")[1][3] = "0123"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (late, "delays: 1 of .* were folded over 500 steps, the latest 900 steps late, from rank 0"),
        (heavier, "mass: at meeting 2 the ranks have .* together, not "),
        (twice, "samples: in epoch 0 sample .* was trained on 2 times"),
        (left_out, "samples: in epoch 0 1 of 121 samples were not trained on"),
        (other_weights, "weights: the ranks left meeting 2 with different weights"),
    ],
)
def test_a_broken_promise_is_named(
    spoil: Spoil, sentence: str, ordinary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = copied(ordinary, tmp_path / "run")
    spoil(logs)
    write(tmp_path / "run", logs)
    status, said = audited(tmp_path / "run", capsys, "--max-delay", "500")
    assert status == 1
    broken = [line for line in said.splitlines() if line.startswith("BROKEN")]
    assert len(broken) == 1
    assert re.search(sentence, broken[0])


def test_the_run_of_a_killed_rank_is_not_blamed(
    ordinary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = copied(ordinary, tmp_path / "run")
    logs[1] = logs[1][: len(logs[1]) // 2]
    write(tmp_path / "run", logs)
    _, said = audited(tmp_path / "run", capsys)
    assert re.search(r"mass: the same at \d meetings?, to the last unit \(\d without some rank not checked\)", said)


def test_wrong_input(tmp_path: Path, ordinary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audited(tmp_path, capsys)[0] == 2
    status, said = audited(ordinary, capsys, "--max-delay", "-1")
    assert status == 2
    assert "--max-delay must be at least 0, got -1" in said


def journaled(folder: Path, *delays: int) -> Path:
    """The journal of a run of two ranks that is not recorded: rank 1 folded what rank 0 sent, so late."""
    metric = DelayMetric(2, sync_on_compute=False)
    metric.update([Arrival(0, 0, 0, delay, 0.1) for delay in delays])
    word = {"trained": [9, 9, 72], "seconds": 1.0, "exchange": 0.1, "waited": 0.2, "idle": 0.5, "until": 1.0}
    word |= {"compute": 0.7, "skipped": 0, "accounts": {}}
    words = {str(rank): {**word, "delays": pack(metric if rank else DelayMetric(2))} for rank in range(2)}
    line = {"run": 1, "group": "delay", "step": 9, "epoch": 0, "at": 1.5, "words": words}
    (folder / "meetings.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_nothing_could_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ((), ("--max-delay", "9")):
        status, said = audited(journaled(tmp_path), capsys, *argv)
        assert status == 2
        assert "nothing of this could be checked" in said
    assert audited(journaled(tmp_path, 3), capsys, "--max-delay", "9")[0] == 0


def test_of_a_member_of_several_ranks_one_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = {"trained": [9, 9, 72], "seconds": 1.0, "exchange": 0.1, "waited": 0.2, "idle": 0.5, "until": 1.0}
    word = {**trained, "compute": 0.7, "skipped": 0, "accounts": {"mass": [5, 5]}, "delays": pack(DelayMetric(4))}
    line = {"run": 1, "step": 9, "epoch": 0, "at": 1.5}
    met = {**line, "group": "delay", "words": {"0": word, "2": word}}
    for members, kept in ((2, "kept    mass: the same at 1 meeting"), (4, "?       mass: the same at 0 meetings")):
        began = {**line, "group": "run", "words": {"strategy": "gossip_ring", "world": 4, "members": members}}
        (tmp_path / "meetings.jsonl").write_text(json.dumps(began) + "\n" + json.dumps(met) + "\n")
        assert kept in audited(tmp_path, capsys)[1]


@pytest.mark.parametrize("latest", [255, 256, 263, 271, 5000])
def test_the_latest_is_known_to_the_step(latest: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journaled(tmp_path, 3, latest - 1, latest)
    status, said = audited(tmp_path, capsys, "--max-delay", str(latest))
    assert status == 0
    assert f"3 folded, the latest {latest} steps late" in said
    status, said = audited(tmp_path, capsys, "--max-delay", str(latest - 1))
    assert status == 1
    assert f"1 of 3 were folded over {latest - 1} steps, the latest {latest} steps late, from rank 0" in said
