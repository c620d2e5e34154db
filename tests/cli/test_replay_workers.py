"""Loaders with worker processes: what is drawn there comes again, and who makes data sees the member's rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import Said, record


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:`Own` has a state, but its copies in the workers advance unseen")
@pytest.mark.parametrize("module", ["WorkedPersistently", "Worked", "WorkedOwn"])
def test_what_workers_draw_comes_again(module: str, tmp_path: Path, said: Said) -> None:
    """With `seed_everything(workers=True)`, a `worker_init_fn`, and `torch.distributed.get_rank()` in the data set."""
    record(tmp_path / "run", module=module, period=1)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words
    assert "as recorded, to the bit: 2 members" in words


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("Worked", {"max_epochs": 1, "val_check_interval": 1}),  # late in an epoch the run has batches to spare
        ("WorkedPersistently", {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}),
    ],
)
def test_who_fetches_at_other_points_draws_the_same(
    module: str, options: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    """A replay fetches ahead of the run, and passes over what was noted there; workers that stay keep their seeds."""
    record(tmp_path / "run", module=module, options=options)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words


@pytest.mark.few(0)
def test_other_draws_are_a_difference(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", module="Worked", options={"max_epochs": 1})
    assert said(tmp_path / "run", module="Worked")[0] == 0
    log = tmp_path / "run" / "rank1.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(line[1:3] == ["note", "workers"] for line in lines[1:]) == 1
    kept = [lines[0], *(line for line in lines[1:] if line[1:3] != ["note", "workers"])]
    log.write_text("\n".join(map(json.dumps, kept)) + "\n")
    status, words = said(tmp_path / "run", module="Worked")
    assert status == 1
    assert "member 1, step 1: its loss was" in words
