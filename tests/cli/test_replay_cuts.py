"""Checkpoints by cuts change nothing that is trained: the log has what the algorithm was told, and a replay no cuts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import GossipRingStrategy, SpeedFaults
from tests.cli import recorded
from tests.cli.runs import MODULES, Said
from tests.strategies.lit import trainer
from tests.strategies.ranks import run

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:The dirpath has changed")


def _fit(folder: str, knobs: dict[str, Any], options: dict[str, Any], begin: str | None) -> None:
    L.seed_everything(7, verbose=False)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    saving = ModelCheckpoint(f"{folder}/saved", "{step}", every_n_train_steps=6, save_top_k=-1)
    callbacks = [SpeedFaults(step_seconds=0.006, slow={2: 3.0}), saving]
    strategy = GossipRingStrategy(saves="cut", record=f"{folder}/run", period=1, **knobs)
    options = {"max_epochs": 1, "enable_checkpointing": True, **options}
    trainer(3, strategy=strategy, callbacks=callbacks, **options).fit(
        recorded.Epochs(), recorded.long(), ckpt_path=begin
    )


def cuts_with_mail(folder: Path) -> list[str]:
    """The checkpoints that were cut while something was under way."""

    def letters(path: Path) -> int:
        files = (torch.load(file, weights_only=True) for file in Path(f"{path}.ranks").glob("*.rank*.ckpt"))
        return sum(len(file["cut"]["letters"]) for file in files if "cut" in file)

    return [str(path) for path in sorted(folder.glob("*.ckpt")) if letters(path)]


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("knobs", "options"),
    [
        ({"mode": "push_sum", "at_meeting": "keep", "wire": "bf16"}, {"precision": "bf16-true"}),
        ({"mode": "pairwise"}, {"val_check_interval": 0.5}),
        ({"mode": "push_sum"}, {}),
    ],
)
def test_cuts_change_nothing_that_is_replayed(
    knobs: dict[str, Any], options: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    """A run that is saved by cuts, and one that goes on from a cut: its first mail is in the files of the ranks."""
    run(3, _fit, str(tmp_path / "one"), knobs, options, None)
    status, words = said(tmp_path / "one" / "run", "--data", MODULES + "long", module="Epochs")
    assert status == 0, words
    assert "as recorded, to the bit: 3 members" in words

    begin = cuts_with_mail(tmp_path / "one" / "saved")[0]
    run(3, _fit, str(tmp_path / "two"), knobs, options, begin)
    logs = [(tmp_path / "two" / "run" / f"rank{rank}.jsonl").read_text().splitlines()[1:] for rank in range(3)]
    taken = [letter for log in logs for line in map(json.loads, log) if line[1] == "take" for letter in line[3]]
    assert any(number < 1 for _, number, *_ in taken)
    argv = ["--data", MODULES + "long", "--ckpt", begin]
    status, words = said(tmp_path / "two" / "run", *argv, module="Epochs")
    assert status == 0, words
    assert "as recorded, to the bit: 3 members" in words
