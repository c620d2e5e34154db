"""A run that went on from a checkpoint is replayed from it; under the schedule of the run that was not interrupted it
is that run to the bit."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, LazySignStrategy, SpeedFaults
from tests.cli import recorded
from tests.cli.runs import Said, copied, write
from tests.cli.spliced import continued, everything
from tests.strategies.lit import trainer
from tests.strategies.ranks import run

UNMIRRORED = {"mirror_every": 10**6}
"""Copies for a death, from which nothing is computed; when they travel is another thing in a run that goes on."""
SAVED = {"Epochs": "epoch=0", "Midway": "step=8"}
"""At the end of an epoch of 15 steps, and in the middle of one."""


def _interrupted(folder: str, epochs: int) -> None:
    L.seed_everything(7, verbose=False)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    saving = [ModelCheckpoint(f"{folder}/saved", "last")] if epochs == 1 else []
    callbacks = [SpeedFaults(step_seconds=0.003, slow={1: 3.0}), *saving]
    knobs = {"record": f"{folder}/{epochs}", "mode": "push_sum", "at_meeting": "keep"}
    t = trainer(2, knobs=knobs, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=bool(saving))
    t.fit(recorded.Epochs(), ckpt_path=None if saving else f"{folder}/saved/last.ckpt")


@pytest.mark.few(0)
def test_a_run_that_goes_on_from_each_rank_s_own_state(tmp_path: Path, said: Said) -> None:
    run(2, _interrupted, str(tmp_path), 1)
    run(2, _interrupted, str(tmp_path), 3)
    status, words = said(tmp_path / "3", "--ckpt", str(tmp_path / "saved" / "last.ckpt"), module="Epochs")
    assert status == 0, words
    assert "2 members, 60 steps" in words


def _through(folder: str, module: str, kind: Any, knobs: dict[str, Any], precision: Any, resumed: bool) -> None:
    everything()
    L.seed_everything(7, verbose=False)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    name, _, every = SAVED[module].partition("=")
    when: dict[str, Any] = {"every_n_train_steps": int(every)} if name == "step" else {}
    saving = [] if resumed else [ModelCheckpoint(f"{folder}/saved", f"{{{name}}}", save_top_k=-1, **when)]
    callbacks = [SpeedFaults(step_seconds=0.003, slow={1: 3.0}), *saving]
    options: dict[str, Any] = {"max_epochs": 3, "callbacks": callbacks, "enable_checkpointing": bool(saving)}
    t = trainer(2, strategy=kind(record=f"{folder}/{resumed}", **knobs), precision=precision, **options)
    t.fit(getattr(recorded, module)(), ckpt_path=f"{folder}/saved/{SAVED[module]}.ckpt" if resumed else None)


METHODS = [
    (GossipRingStrategy, {"mode": "push_sum", "at_meeting": "keep"}, "32-true"),
    (CyclicDelayStrategy, {"push": "gradient", **UNMIRRORED}, "32-true"),
    (AsyncGlobalStrategy, {"outer_momentum": 0.5, "outer_lr": 0.7, **UNMIRRORED}, "32-true"),
    (LazySignStrategy, {"rule": "innovation"}, "32-true"),
    (GossipRingStrategy, {"mode": "pairwise", "at_meeting": "adopt"}, "32-true"),
    (GossipRingStrategy, {"mode": "push_sum", "at_meeting": "keep"}, "bf16-true"),
    (GossipRingStrategy, {"mode": "pairwise", "at_meeting": "adopt"}, "bf16-true"),
    (AsyncGlobalStrategy, {"local_steps": "speed", "wire": "bf16", "shards": 1, **UNMIRRORED}, "bf16-true"),
    (AsyncGlobalStrategy, {"attenuation": "paper", "on_late": "wait", "max_delay": 2, **UNMIRRORED}, "32-true"),
    (CyclicDelayStrategy, {"push": "gradient", "token": "strict", "scale": "delay", **UNMIRRORED}, "bf16-true"),
    (CyclicDelayStrategy, {"push": "gradient", "compensation": "dc", "max_accumulate": 3, **UNMIRRORED}, "32-true"),
    (CyclicDelayStrategy, {"compensation": "lr", **UNMIRRORED}, "32-true"),
    (LazySignStrategy, {}, "bf16-true"),
    (GossipRingStrategy, {"mode": "sync"}, "32-true"),
    (GossipRingStrategy, {"mode": "none", "at_meeting": "keep"}, "32-true"),
    (AsyncGlobalStrategy, {"local_steps": 1, "attenuation": "poly", **UNMIRRORED}, "32-true"),
]
FOLDS_NOTHING = (LazySignStrategy, "sync", "none")
"""Their rounds are no folds."""


@pytest.mark.few(0)
@pytest.mark.parametrize(("kind", "knobs", "precision"), METHODS)
@pytest.mark.parametrize("module", ["Midway", "Epochs"])
def test_what_comes_behind_a_checkpoint_is_what_came_behind_it_to_the_bit(
    module: str, kind: Any, knobs: dict[str, Any], precision: str, tmp_path: Path, said: Said
) -> None:
    """Under the schedule of the run that was not interrupted: the same messages, at the same steps. Under its own the
    run that went on is replayed too."""
    for resumed in (False, True):
        run(2, _through, str(tmp_path), module, kind, knobs, precision, resumed)
    checkpoint = ["--ckpt", str(tmp_path / "saved" / f"{SAVED[module]}.ckpt")]
    logs = [copied(tmp_path / str(resumed), tmp_path / f"copy{resumed}") for resumed in (False, True)]
    spliced = {rank: continued(logs[0][rank], logs[1][rank]) for rank in range(2)}
    (tmp_path / "continued").mkdir()
    write(tmp_path / "continued", spliced)
    steps = sum(line[1] == "batch" for lines in spliced.values() for line in lines[1:])
    assert steps == 60 if module == "Epochs" else 60 < steps < 90
    for folder in ("continued", "True"):
        status, words = said(tmp_path / folder, *checkpoint, module=module)
        assert status == 0, f"{folder}: {words}"
        found = re.search(r"2 members, (\d+) steps, (\d+) folds; compared: (\d+) losses, (\d+) digests", words)
        assert found is not None, words
        assert int(found[1]) == int(found[3]) == steps
        assert int(found[2]) > 5 or {kind, knobs.get("mode")} & set(FOLDS_NOTHING)
        assert int(found[4]) >= 10
