"""`lightning-async replay`: a real run equals its replay to the bit, or the first difference is named."""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_async import SpeedFaults
from tests.cli import recorded
from tests.cli.runs import MODULES, Said, copied, fit, record, write
from tests.strategies.lit import trainer
from tests.strategies.ranks import Forked, run

# -- as recorded -------------------------------------------------------------------------------------------------------


def test_a_real_run_equals_its_replay_to_the_bit(tmp_path: Path, said: Said) -> None:
    ended = record(tmp_path / "run")
    status, words = said(tmp_path / "run")
    lines = words.splitlines()
    assert status == 0
    assert re.fullmatch(r"meeting 1 after steps \d+/\d+: weights as recorded", lines[0])
    assert re.fullmatch(r"meeting 2 after steps \d+/\d+: weights as recorded", lines[1])
    counts = r"2 members, 60 steps, \d+ folds; compared: 60 losses, 10 digests"
    assert re.fullmatch(f"the run is as recorded, to the bit: {counts}", lines[2])
    log = copied(tmp_path / "run", tmp_path / "copy")[0][1:]
    assert ended == [[line[3] for line in log if line[1:3] == ["note", "consensus"]][-1]] * 2


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("n", "module", "knobs", "options"),
    [
        (3, "Net", {"wire": "bf16"}, {}),
        (3, "Plateau", {"mode": "push_sum"}, {"max_epochs": 3}),
        (3, "Net", {"mode": "push_sum", "wire": "bf16", "at_meeting": "keep"}, {}),
        (2, "Epochs", {"max_delay": 1}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
        (2, "Manual", {"balance": "equal"}, {}),
        (4, "Net", {"topology": "exponential", "period": 2}, {"precision": "bf16-mixed"}),
        (2, "Net", {"mode": "sync"}, {"precision": "64-true"}),
        (2, "Plateau", {"buffers": "reestimate"}, {"precision": "bf16-true"}),
        (1, "Net", {"mode": "none"}, {}),
        (2, "Counting", {}, {}),
        (2, "Unlike", {}, {}),
        (2, "Mixing", {}, {"reload_dataloaders_every_n_epochs": 1}),
        (2, "Foreseen", {}, {}),
        (2, "Stepwise", {"meet_every": 37}, {}),
        (3, "Stepwise", {}, {"max_epochs": -1, "max_steps": 17, "val_check_interval": 4}),
        (2, "Stepwise", {"mode": "push_sum"}, {"limit_train_batches": 7, "accumulate_grad_batches": 2}),
        (2, "Stepwise", {"at_meeting": "keep"}, {"val_check_interval": 0.3, "check_val_every_n_epoch": 1}),
    ],
)
def test_whatever_was_trained(
    n: int, module: str, knobs: dict[str, Any], options: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    record(tmp_path / "run", n, module, options=options, **knobs)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words
    assert f"as recorded, to the bit: {n} member" in words


def _unseeded(folder: str) -> None:
    torch.manual_seed(int(os.environ["RANK"]))
    trainer(2, knobs={"record": folder}, max_epochs=1).fit(recorded.Net())


def test_without_a_seed_for_all(tmp_path: Path, said: Said) -> None:
    """Rank 0's weights were given to all; the log knows what its generator began with."""
    run(2, _unseeded, str(tmp_path / "run"))
    assert said(tmp_path / "run")[0] == 0


@pytest.mark.parametrize("argument", ["--data=tests.cli.recorded:loader", "--datamodule=tests.cli.recorded:Whole"])
def test_data_from_elsewhere(argument: str, ordinary: Path, said: Said) -> None:
    assert said(ordinary, argument)[0] == 0


def test_watching_changes_nothing(tmp_path: Path, said: Said) -> None:
    options = {"precision": "bf16-true", "callbacks": []}
    record(tmp_path / "run", module="Plateau", options=options, mode="none", balance="equal")
    status, words = said(tmp_path / "run", "--watch", module="Plateau")
    assert status == 0, words


def test_until_a_step_of_a_member(ordinary: Path, said: Said) -> None:
    status, words = said(ordinary, "--until", "6", "--member", "1")
    assert status == 0
    found = re.search(r"member 1 is as recorded, to the bit, until step 6: 2 members, (\d+) steps", words)
    assert found is not None
    whole = re.search(r"2 members, (\d+) steps", said(ordinary)[1])
    assert whole is not None
    assert 6 <= int(found[1]) < int(whole[1])  # the other one only as far as it is needed


def _killed(folder: str) -> int:
    class Kill(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_rank == 1 and trainer.strategy.steps == 9:
                os.kill(os.getpid(), signal.SIGKILL)

    warnings.simplefilter("ignore")  # that samples were left depends on when the death is noticed
    t = trainer(2, knobs={"record": folder, "patience": 3.0}, callbacks=[Kill(), SpeedFaults(step_seconds=0.003)])
    L.seed_everything(7, verbose=False)
    t.fit(recorded.Net())
    return int(t.strategy.steps)  # type: ignore[attr-defined]


@pytest.mark.few(0)
def test_a_killed_rank_is_replayed_as_far_as_it_came(tmp_path: Path, said: Said) -> None:
    with Forked(2, _killed, str(tmp_path / "run"), store=True) as ranks:
        assert [result.kind for result in ranks.results()] == [None, "gone"]
    status, words = said(tmp_path / "run")
    assert status == 0, words
    assert "member 1's log ends behind step 9: it was stopped or killed\n" in words
    assert re.search(r"meeting 2 after steps \d+/-: weights as recorded", words)


def test_a_failed_run_is_replayed_as_far_as_it_came(tmp_path: Path, said: Said) -> None:
    faults = SpeedFaults(step_seconds=0.003, fail={0: 5})  # early: a rank that the machine starves takes few steps
    with Forked(2, fit, 2, str(tmp_path / "run"), "Net", {}, {"callbacks": [faults]}) as ranks:
        assert [result.kind for result in ranks.results()] == ["RuntimeError", "PeerFailedError"]
    status, words = said(tmp_path / "run")
    assert status == 0, words
    assert "member 0's log ends behind step 5: it was stopped or killed\n" in words


def _in_parts(folder: str, checkpoint: str) -> None:
    L.seed_everything(7, verbose=False)
    knobs = {"record": folder}
    t = trainer(2, knobs=knobs, max_epochs=1)
    net = recorded.Net()
    t.fit(net)
    t.save_checkpoint(checkpoint)
    t.fit_loop.max_epochs = 2
    t.fit(net)
    trainer(2, knobs={"record": f"{folder}/resumed"}, max_epochs=2).fit(recorded.Net(), ckpt_path=checkpoint)


def test_from_a_checkpoint(tmp_path: Path, said: Said) -> None:
    """A second fit begins with the weights of the first; a resumed one with all that a checkpoint holds."""
    folder, checkpoint = tmp_path / "run", tmp_path / "one.ckpt"
    run(2, _in_parts, str(folder), str(checkpoint))
    assert said(folder, "--fit", "1")[0] == 0
    status, words = said(folder)
    assert status == 1
    assert "fit 2 is read, the newest of 1, 2 (--fit N for another)\n" in words
    assert re.search("member [01], before its first step: the digest of its first weights was", words)
    assert "Give the checkpoint that it began with (--ckpt)" in words
    assert said(folder, "--fit", "2", "--ckpt", str(checkpoint))[0] == 0
    status, words = said(folder / "resumed")
    assert status == 2
    assert "the run went on from a checkpoint (`fit(ckpt_path=...)`): give it by --ckpt" in words
    assert said(folder / "resumed", "--ckpt", str(checkpoint))[0] == 0


def _twice(folder: str, checkpoint: str, module: str) -> None:
    torch.manual_seed(7)  # with a seed of Lightning's the second fit would begin with that again
    t, net = trainer(2, knobs={"record": folder}, max_epochs=1), getattr(recorded, module)()
    t.fit(net)
    t.save_checkpoint(checkpoint)
    t.fit_loop.max_epochs = 2
    t.fit(net)


@pytest.mark.few(0)
@pytest.mark.parametrize("module", ["Mixing", "WorkedPersistently"])
def test_a_second_fit_in_which_lightning_makes_two_iterators_at_once(module: str, tmp_path: Path, said: Said) -> None:
    run(2, _twice, str(tmp_path / "run"), str(tmp_path / "one.ckpt"), module)
    status, words = said(tmp_path / "run", "--fit", "2", "--ckpt", str(tmp_path / "one.ckpt"), module=module)
    assert status == 0, words


def test_a_log_that_was_copied_too_early(ordinary: Path, tmp_path: Path, said: Said) -> None:
    """Its end is missing, and others took mail that was sent then: no difference, and nothing that is as recorded."""
    logs = copied(ordinary, tmp_path / "run")
    fourth = [i for i, line in enumerate(logs[1]) if i and line[1] == "at"][3]
    del logs[1][fourth + 1 :]
    write(tmp_path / "run", logs)
    with (tmp_path / "run" / "rank1.jsonl").open("a") as cut:
        cut.write('[120,"not')  # in the midst of a line
    status, words = said(tmp_path / "run", "--until", "999")
    assert status == 0, words
    assert "member 1's log ends behind step 4: it was stopped or killed\n" in words
    found = re.search(r"member 0 is recomputed to step (\d+) only: what it took then was sent behind the end", words)
    assert found is not None, words
    assert "until" not in words
    assert "as far as it was recomputed, the run is as recorded, to the bit: 2 members" in words
    assert int(found[1]) < sum(line[1] == "at" for line in logs[0][1:])


# -- the first difference ----------------------------------------------------------------------------------------------


def test_a_changed_event_is_named(ordinary: Path, tmp_path: Path, said: Said) -> None:
    logs = copied(ordinary, tmp_path / "run")
    index = [i for i, line in enumerate(logs[1]) if i and line[1] == "take"][3]
    step = sum(line[1] == "at" for line in logs[1][1:index])
    del logs[1][index]  # these letters were never taken
    write(tmp_path / "run", logs)
    status, words = said(tmp_path / "run")
    assert status == 1
    assert f"first difference: member 1, behind step {step}: member 1 strays at event" in words


def test_a_changed_digest_is_named(ordinary: Path, tmp_path: Path, said: Said) -> None:
    logs = copied(ordinary, tmp_path / "run")
    own = next(line for line in logs[1][1:] if line[1:3] == ["note", "own"])
    step = sum(line[1] == "at" for line in logs[1][1 : logs[1].index(own)])
    own[3] = "00" * 8
    logs[0][0]["callbacks"] += ["Unfreezing"]
    logs[0][0]["torch"] = "1.0"
    write(tmp_path / "run", logs)
    status, words = said(tmp_path / "run")
    assert status == 1
    assert (
        f"member 1, step {step}: the digest of its weights, with which it came to the meeting, was {'00' * 8} " in words
    )
    assert "a log holds no weights" in words
    assert words.endswith("\ncallbacks of the run that the replay leaves out: Unfreezing\n")
    assert words.startswith("note: the run had torch 1.0, its replay has ")


def test_a_changed_weight_is_named(ordinary: Path, said: Said) -> None:
    status, words = said(ordinary, module="Flipped")
    assert status == 1
    found = re.search(
        r"first difference: member 1, step 5: its loss was \S+ and is \S+ now \(relative difference \S+\); samples "
        r"\[\d+, \d+, \d+, \d+\]; its weights were last seen as recorded after step 0; last fold in step [1-4], from "
        r"member 0 \(its step \d+, delay \d+\)\n",
        words,
    )
    assert found, words


def test_a_changed_sample_is_named(ordinary: Path, tmp_path: Path, said: Said) -> None:
    status, words = said(ordinary, "--data", MODULES + "poisoned")
    assert status == 1
    found = re.search(r"member (\d), step (\d+): its loss was .*; samples (\[.*?\])", words)
    assert found is not None
    lines = copied(ordinary, tmp_path / "run")[int(found[1])][1:]
    batches = [line[3] for line in lines if line[1:3] == ["note", "fetched"]]
    assert recorded.POISONED in json.loads(found[3]) == batches[int(found[2]) - 1]


def test_another_beginning_is_told_at_once(ordinary: Path, said: Said) -> None:
    status, words = said(ordinary, module="Other")
    assert status == 1
    assert "before its first step" in words
    assert "meeting" not in words


@pytest.mark.few(0)
def test_a_loss_that_is_none_any_more_is_named(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", module="Manual", options={"max_epochs": 1})
    status, words = said(tmp_path / "run", module="Silent")
    assert status == 1
    assert re.search(r"member \d, step 1: its loss was \S+, and the training step returns none now", words), words


def test_a_loss_may_be_off(ordinary: Path, tmp_path: Path, said: Said) -> None:
    logs = copied(ordinary, tmp_path / "run")
    for line in logs[0][1:]:
        if line[1] == "batch":
            line[2] *= 1 + 1e-6
        if line[1:3] == ["note", "own"]:
            line[3] = "another machine"
    write(tmp_path / "run", logs)
    assert said(tmp_path / "run")[0] == 1
    status, words = said(tmp_path / "run", "--tolerance", "1e-5")
    assert status == 0
    assert re.search(r"as recorded, within 1e-05 \(losses differ by 1e-06 at most\): .*60 losses, 0 digests", words)
    assert said(tmp_path / "run", "--tolerance", "1e-7")[0] == 1


# -- a jump of the loss ------------------------------------------------------------------------------------------------


def test_a_poisoned_sample_is_found(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", data="poisoned")
    status, words = said(tmp_path / "run", "--data", MODULES + "poisoned", "--watch")
    assert status == 0, words
    assert re.search(r"watch: the loss jumps at member \d, step \d+ by \S+ times the range", words)
    (marked,) = [line for line in words.splitlines() if line.startswith(">")]
    assert str(recorded.POISONED) in marked.split()[-4:]
    assert re.search(rf"^in 2 of 2 batches with a loss of this size: .*\b{recorded.POISONED}\b", words, re.MULTILINE)


def test_nothing_of_the_process_is_changed(ordinary: Path, said: Said) -> None:
    torch.manual_seed(3)
    before = (torch.get_rng_state(), torch.get_num_threads())
    said(ordinary)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
