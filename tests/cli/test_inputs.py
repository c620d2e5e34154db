"""Whatever is wrong with the input of a replay is told in a sentence, with exit status 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import MODULES, Said, copied, write


@pytest.mark.parametrize(
    ("argv", "module", "sentence"),
    [
        ([], "nothing", "`tests.cli.recorded` has no `nothing`"),
        ([], "INPUTS", "and not a class or a function that makes a LightningModule"),
        ([], "loader", "`tests.cli.recorded:loader` makes a DataLoader, where a LightningModule is needed"),
        (["--data", "nowhere.at:all"], "Net", "`nowhere.at:all` cannot be imported: No module named 'nowhere'"),
        (["--data", "nowhere"], "Net", "`nowhere` must be written as package.module:name"),
        (["--data", MODULES + "fewer"], "Net", "the data set of the run had 120 samples, this one has 100"),
        (["--data", MODULES + "stream"], "Net", "give a DataLoader on a data set with numbered samples"),
        (
            ["--init", '{"width": 8}'],
            "Net",
            "the module of the run, tests.cli.recorded:Net, had 161 trainable numbers, this one has 81",
        ),
        (["--init", "{"], "Net", "--init must be JSON"),
        (["--init", "[1]"], "Net", "--init must be a JSON object"),
        (["--init", '{"depth": 8}'], "Net", "the replay failed: TypeError: "),
        (["--fit", "2"], "Net", "there is no log of fit 2"),
        (["--member", "2"], "Net", "there is no member 2: the run had members 0 to 1"),
        (["--until", "0"], "Net", "--until must be a step, from 1, got 0"),
        (["--ckpt", "gone.ckpt"], "Net", "there is no checkpoint gone.ckpt"),
    ],
)
def test_wrong_arguments(argv: list[str], module: str, sentence: str, ordinary: Path, said: Said) -> None:
    status, words = said(ordinary, *argv, module=module)
    assert status == 2
    assert sentence in words


def _header(**changes: Any) -> Callable[[dict[int, list[Any]]], object]:
    return lambda logs: [lines[0].update(changes) for lines in logs.values()]


def _start(**changes: Any) -> Callable[[dict[int, list[Any]]], object]:
    def change(logs: dict[int, list[Any]]) -> None:
        next(line for line in logs[1][1:] if line[1:3] == ["note", "start"])[3].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_header(schema=3), "cannot be read: this log has schema 3, this version reads schema 4"),
        (_header(strategy="tournament"), "the run's strategy 'tournament' is not among gossip_ring"),
        (_header(device="cuda", trainer={"precision": "16-mixed"}), "the run's precision was 16-mixed, which a CPU"),
        (
            _header(knobs={"mode": "chess"}),
            "the run's gossip_ring cannot be made again from its knobs: `mode` must be one",
        ),
        (
            lambda logs: logs[1].insert(1, [0, "note", "unreplayable", "nobody saw it"]),
            "this run cannot be replayed, since nobody saw it; its logs are for `report` and `audit`",
        ),
        (lambda logs: logs[1][0].update(run="another"), "members 0 and 1 are not of one run: their `run` is"),
        (lambda logs: logs[1].__setitem__(0, dict(logs[0][0])), "the log given for member 1 was written by member 0"),
        (lambda logs: logs.pop(1), "the log of rank 1 of 2 is missing"),
        (lambda logs: logs.__setitem__(1, logs[1][:1]), "member 1 did not come to its first step"),
        (lambda logs: logs[1].__setitem__(0, []), "its first line is no header"),
    ],
)
def test_wrong_logs(
    change: Callable[[dict[int, list[Any]]], object], sentence: str, ordinary: Path, tmp_path: Path, said: Said
) -> None:
    logs = copied(ordinary, tmp_path / "run")
    change(logs)
    write(tmp_path / "run", logs)
    status, words = said(tmp_path / "run")
    assert status == 2
    assert sentence in words


def test_no_folder(tmp_path: Path, said: Said) -> None:
    assert said(tmp_path / "no")[0] == 2
