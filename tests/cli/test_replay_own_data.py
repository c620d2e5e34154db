"""Data of the ranks' own: samples have no numbers, and each member draws from its loader again as in the run."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import SpeedFaults
from lightning_async.cli import main
from tests.cli import recorded
from tests.cli.runs import MODULES, Said, copied, record, write
from tests.strategies.lit import trainer
from tests.strategies.ranks import run

pytestmark = pytest.mark.filterwarnings(
    "ignore:Your `IterableDataset` has `__len__` defined", "ignore:rank .* had no batch in this epoch"
)
SPLIT = {"use_distributed_sampler": False}


def notes(folder: Path, name: str, rank: int = 0) -> list[Any]:
    lines = [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()][1:]
    return [line[3] for line in lines if line[1:3] == ["note", name]]


# -- as recorded -------------------------------------------------------------------------------------------------------


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("n", "module", "knobs", "options"),
    [
        (3, "Streamed", {"period": 1}, {}),
        (2, "Streamed", {}, {"val_check_interval": 3, "accumulate_grad_batches": 2}),
        (2, "Streamed", {"mode": "push_sum", "at_meeting": "keep"}, {"limit_train_batches": 7}),
        (2, "Endless", {}, {"limit_train_batches": 7, "val_check_interval": 2}),
        (2, "Endless", {"mode": "sync"}, {"max_epochs": -1, "max_steps": 17, "val_check_interval": 4}),
        (2, "Unlikely", {"period": 1}, {"max_epochs": 3}),
        (2, "Unlikely", {}, {"limit_train_batches": 8}),
        (2, "Paired", {}, {"max_epochs": 3}),
        (2, "Streamed", {}, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}),
        (2, "Paired", {}, {"limit_train_batches": 9, **SPLIT}),
        (2, "Streamed", {"period": 1}, SPLIT),
        (2, "Split", {"mode": "push_sum"}, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3, **SPLIT}),
        (2, "Split", {}, {"limit_train_batches": 0.5, "val_check_interval": 0.5, **SPLIT}),
        (3, "Split", {"period": 1}, {"val_check_interval": 4, **SPLIT}),
    ],
)
def test_whatever_was_drawn(
    n: int, module: str, knobs: dict[str, Any], options: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    """The ranks are parted by torch's default group, as with other strategies."""
    record(tmp_path / "run", n, module, options=options, **knobs)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words
    assert f"as recorded, to the bit: {n} members" in words
    for rank in range(n):
        drawn = notes(tmp_path / "run", "drawn", rank)
        assert drawn == list(range(1, len(drawn) + 1))
        assert len(drawn) >= len(notes(tmp_path / "run", "clock", rank))


@pytest.mark.few(1)
@pytest.mark.parametrize("data", ["stream", "by_worker"])
def test_a_stream_from_elsewhere_and_what_is_said_of_it(
    data: str, tmp_path: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "run", data=data)
    status, words = said(tmp_path / "run", "--data", MODULES + data, "--watch")
    assert status == 0, words
    assert re.search(r"watch: .*\n +step +loss .*\n(.*\n)*> +\d+ .* batch \d+\n", words), words
    assert main(["audit", str(tmp_path / "run")]) == 0
    drawn = "of 20 batches drawn, 20 were trained on"
    assert f"?       samples: the record names none (data of the ranks' own): {drawn}" in capsys.readouterr().out


def _parted(folder: str, module: str, options: dict[str, Any], resumed: bool) -> None:
    L.seed_everything(7, verbose=False)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    saving = [] if resumed else [ModelCheckpoint(f"{folder}/saved", "{step}", every_n_train_steps=5, save_top_k=-1)]
    callbacks = [SpeedFaults(step_seconds=0.003, slow={1: 3.0}), *saving]
    knobs = {"record": f"{folder}/{resumed}", "period": 1}
    t = trainer(2, knobs=knobs, callbacks=callbacks, enable_checkpointing=bool(saving), **options)
    t.fit(getattr(recorded, module)(), ckpt_path=f"{folder}/saved/step=5.ckpt" if resumed else None)


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("Streamed", {}),
        ("Streamed", SPLIT),
        ("Endless", {"limit_train_batches": 9}),
        ("Unlikely", {"max_epochs": 4}),  # who had no more when the run was saved waits again
        ("Split", SPLIT),
    ],
)
def test_a_run_that_went_on_in_mid_epoch(module: str, options: dict[str, Any], tmp_path: Path, said: Said) -> None:
    """Each rank from where its own stream stood; what has no place to go on from begins anew, in the replay too."""
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    for resumed in (False, True):
        run(2, _parted, str(tmp_path), module, options, resumed)
    begun, *others = sorted((tmp_path / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert begun.name == "step=5.ckpt"
    status, words = said(tmp_path / "True", "--ckpt", str(begun), module=module)
    assert status == 0, words
    assert notes(tmp_path / "True", "start")[0]["batch"] > 0
    status, words = said(tmp_path / "True", "--ckpt", str(others[0]), module=module)
    assert status == 2, words
    assert re.search(r"the run went on behind batch \d+ of epoch 0, and this checkpoint is of batch \d+ of", words)


# -- the first difference ----------------------------------------------------------------------------------------------


def test_a_batch_is_named_by_its_number(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", module="Streamed")
    logs = copied(tmp_path / "run", tmp_path / "copy")
    batches = [line for line in logs[1] if isinstance(line, list) and line[1] == "batch"]
    batches[4][2] += 1.0
    write(tmp_path / "copy", logs)
    status, words = said(tmp_path / "copy", module="Streamed")
    assert status == 1
    assert re.search(r"member 1, step 5: its loss was .*; batch 5 of its own data; its weights were last seen", words)


def test_other_data_are_told(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", data="stream")
    status, words = said(tmp_path / "run", "--data", MODULES + "shorter")
    assert status == 2, words
    assert re.search(r"the training data of member \d end behind its batch 3, in the middle of an epoch", words), words
    status, words = said(tmp_path / "run", "--data", MODULES + "loader")
    assert status == 2, words
    assert "the run trained on streams, and the data set here, a Data, is none" in words
