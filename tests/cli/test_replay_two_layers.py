"""Members of several ranks: each has a log of its own, and what they tell each other is made again, to the bit."""

from __future__ import annotations

import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, SpeedFaults
from lightning_async.cli import main
from tests.cli import recorded
from tests.cli.runs import MODULES, Said, copied, write
from tests.strategies.lit import trainer
from tests.strategies.ranks import Forked, run

pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")


def _fit(
    folder: str, n: int, module: str, kind: Any, knobs: dict[str, Any], options: dict[str, Any], data: str
) -> None:
    L.seed_everything(7, workers=module == "Worked", verbose=False)
    pace = SpeedFaults(step_seconds=0.003, slow={n - 1: 3.0})
    t = trainer(n, strategy=kind(record=folder, **knobs), **{"callbacks": [pace], **options})
    t.fit(getattr(recorded, module)(), getattr(recorded, data)() if data else None)


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("n", "module", "kind", "knobs", "options", "data"),
    [
        (6, "Plateau", GossipRingStrategy, {"inner_size": 3, "period": 1}, {}, "by_fives"),
        (4, "Plateau", AsyncGlobalStrategy, {"inner_size": 2}, {}, ""),
        (4, "Epochs", CyclicDelayStrategy, {"inner_size": 2}, {"max_epochs": 3}, ""),
        (4, "Manual", GossipRingStrategy, {"inner_size": 2}, {}, ""),
        (3, "Stepwise", AsyncGlobalStrategy, {"inner": "node"}, {}, ""),
        (4, "Plateau", GossipRingStrategy, {"inner_size": 2, "buffers": "reestimate"}, {"precision": "bf16-true"}, ""),
        (
            4,
            "Epochs",
            GossipRingStrategy,
            {"inner_size": 2, "mode": "push_sum", "at_meeting": "keep"},
            {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "val_check_interval": 0.5},
            "uneven",
        ),
        (4, "Worked", GossipRingStrategy, {"inner_size": 2, "mode": "sync"}, {}, ""),
        (4, "Counting", GossipRingStrategy, {"inner_size": 2, "balance": "equal"}, {}, ""),
    ],
)
def test_whatever_was_trained(
    n: int,
    module: str,
    kind: Any,
    knobs: dict[str, Any],
    options: dict[str, Any],
    data: str,
    tmp_path: Path,
    said: Said,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    run(n, _fit, str(folder), n, module, kind, knobs, options, data)
    status, words = said(folder, *(["--data", MODULES + data] if data else []), module=module)
    assert status == 0, words
    assert f"as recorded, to the bit: {n} ranks" in words
    assert main(["audit", str(folder)]) == 0, capsys.readouterr().out
    audited = capsys.readouterr().out
    assert "kept    samples: each once in" in audited
    assert f"equal on all ranks after {len(re.findall('^meeting', words, re.MULTILINE))} meetings" in audited


@pytest.mark.few(0)
def test_a_difference_in_one_rank_of_a_member_is_named(tmp_path: Path, said: Said) -> None:
    """It stops before its sibling hears of it."""
    knobs = {"inner_size": 2, "period": 1}
    run(4, _fit, str(tmp_path / "run"), 4, "Net", GossipRingStrategy, knobs, {"max_epochs": 1}, "")
    logs = copied(tmp_path / "run", tmp_path / "copy", 4)
    batches = [line for line in logs[3][1:] if line[1] == "batch"]
    batches[3][2] *= 1 + 2**-20
    write(tmp_path / "copy", logs)
    status, words = said(tmp_path / "copy")
    assert status == 1
    assert re.search(r"first difference: rank 3, step 4: its loss was .*; samples \[\d+, \d+, \d+, \d+\]", words), words
    logs = copied(tmp_path / "run", tmp_path / "strays", 4)
    fourth = [i for i, line in enumerate(logs[3]) if i and line[1] == "batch"][3]
    logs[3].insert(fourth, [logs[3][fourth][0], "at", 999])
    write(tmp_path / "strays", logs)
    status, words = said(tmp_path / "strays")
    assert status == 1
    assert re.search(r"first difference: rank 3, behind step \d+: rank 3 strays at event", words), words
    status, words = said(tmp_path / "run", "--member", "4")
    assert status == 2
    assert "there is no rank 4: the run had ranks 0 to 3" in words
    status, words = said(tmp_path / "run", "--member", "3", "--until", "4")
    assert status == 0, words
    assert "rank 3 is as recorded, to the bit, until step 4" in words
    (tmp_path / "run" / "rank3.jsonl").unlink()
    status, words = said(tmp_path / "run")
    assert status == 2
    assert "the log of rank 3 of 4 is missing" in words


def _killed(folder: str) -> None:
    class Kill(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_rank == 3 and trainer.strategy.steps == 4:
                os.kill(os.getpid(), signal.SIGKILL)

    warnings.simplefilter("ignore")  # that samples were left depends on when the death is noticed
    knobs = {"record": folder, "patience": 3.0, "silence": 0.5, "inner_size": 2}
    t = trainer(4, knobs=knobs, callbacks=[Kill(), SpeedFaults(step_seconds=0.003)])
    L.seed_everything(7, verbose=False)
    t.fit(recorded.Plateau())


@pytest.mark.few(0)
def test_a_member_that_died_is_replayed_as_far_as_it_came(tmp_path: Path, said: Said) -> None:
    with Forked(4, _killed, str(tmp_path / "run"), store=True) as ranks:
        assert [result.kind for result in ranks.results()] == [None, None, "PeerFailedError", "gone"]
    status, words = said(tmp_path / "run", module="Plateau")
    assert status == 0, words
    assert "rank 3's log ends behind step 4: it was stopped or killed\n" in words
    assert "rank 2's log ends behind step 4: it was stopped or killed\n" in words
    assert "is recomputed to step" not in words
    assert re.search(r"meeting 2 after steps \d+/\d+/-/-: weights as recorded", words)


def _parted(folder: str, resumed: bool) -> None:
    L.seed_everything(7, verbose=False)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    saving = [] if resumed else [ModelCheckpoint(f"{folder}/saved", "{step}", every_n_train_steps=5, save_top_k=-1)]
    callbacks = [SpeedFaults(step_seconds=0.003, slow={1: 3.0}), *saving]
    knobs = {"record": f"{folder}/{resumed}", "inner_size": 2, "mode": "push_sum", "at_meeting": "keep"}
    t = trainer(4, knobs=knobs, callbacks=callbacks, enable_checkpointing=bool(saving))
    t.fit(recorded.Midway(), ckpt_path=f"{folder}/saved/step=5.ckpt" if resumed else None)


@pytest.mark.few(0)
def test_a_run_that_went_on_in_mid_epoch(tmp_path: Path, said: Said) -> None:
    for resumed in (False, True):
        run(4, _parted, str(tmp_path), resumed)
    status, words = said(tmp_path / "True", "--ckpt", str(tmp_path / "saved" / "step=5.ckpt"), module="Midway")
    assert status == 0, words
    assert "as recorded, to the bit: 4 ranks" in words
