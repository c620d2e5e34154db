"""Lightning's own launchers: popen, spawn and fork by name; the caller's module holds the consensus afterwards."""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from lightning_async import GossipRingStrategy
from tests.strategies.lit import Ending, Lit, loader, trainer, weights
from tests.strategies.ranks import FORK

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 90.0


def script(name: str, mode: str, folder: Path) -> tuple[int | None, str]:
    """The exit code and the words of a user's script, once none of its processes can say more.

    The first one is forked, and what it then does is what `python -m` does; those that Lightning starts for the other
    ranks are new interpreters.
    """
    mine, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_run_as_main, args=(theirs, name, mode, str(folder)))
    process.start()
    theirs.close()
    said, end = b"", time.monotonic() + LIMIT
    with mine:
        while mine.poll(max(0.0, end - time.monotonic())) and (words := os.read(mine.fileno(), 1 << 16)):
            said += words
    process.join(max(1.0, end - time.monotonic()))
    process.kill()
    process.join()
    return process.exitcode, said.decode()


def _run_as_main(said: Connection, *argv: str) -> None:
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    said.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(ROOT)
    sys.argv = ["script", *argv]
    try:
        runpy.run_module("tests.strategies.script", run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def held(folder: Path) -> list[str]:
    """What each rank held at the end of its fit."""
    return [(folder / f"end{rank}.txt").read_text() for rank in range(2)]


def test_popen_by_name_and_a_child_that_fails_is_named_by_rank_0(tmp_path: Path) -> None:
    """A child's own exit would have rank 0 killed before it could say anything: so it lingers."""
    code, said = script("gossip_ring", "works, then fails", tmp_path)
    ends = [(tmp_path / f"rank{r}.txt").read_text() for r in range(2)]
    assert ends[0] == ends[1], said[-2000:]
    assert code == 1, (code, said[-2000:])
    assert "PeerFailedError: rank 1 stopped: ValueError: the fifth batch is too much" in said


@pytest.mark.few(0)
def test_spawn_gives_the_caller_the_consensus(tmp_path: Path) -> None:
    code, said = script("gossip_ring_spawn", "works", tmp_path)
    assert code == 0, said[-2000:]
    assert held(tmp_path) == [(tmp_path / "rank0.txt").read_text()] * 2


def test_fork_gives_the_caller_the_consensus(tmp_path: Path) -> None:
    lit = Ending(str(tmp_path))
    before = weights(lit)
    t = trainer(2, strategy=GossipRingStrategy(start_method="fork", at_meeting="keep"))
    t.fit(lit, loader(), loader(40, shuffle=False))
    assert weights(lit) != before
    assert held(tmp_path) == [repr(weights(lit))] * 2
    assert "val" in t.callback_metrics


def test_a_fork_that_fails_is_named() -> None:
    class Failing(Lit):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            if self.global_rank == 1 and len(self.seen) >= 16:
                raise ValueError("the fifth batch is too much")

    t = trainer(2, strategy="gossip_ring_fork")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the fifth batch is too much"):
        t.fit(Failing(), loader(), loader(40, shuffle=False))


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ("gossip_ring", "an earlier Trainer made this process one of 1 ranks, and this one asks for 2"),
        pytest.param(
            *("gossip_ring_fork", "forked from a process that an earlier Trainer had made one of 1 ranks"),
            marks=pytest.mark.forks,
        ),
    ],
)
def test_a_process_of_another_world_is_told_so(second: str, sentence: str) -> None:
    """With `ddp` both hang: the group of the first Trainer is taken for the second one's."""
    mine, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_one_rank_then_two, args=(theirs, second))
    process.start()
    theirs.close()
    with mine:
        said = mine.recv() if mine.poll(LIMIT) else "nothing"
    process.kill()
    process.join()
    assert sentence in said


def _one_rank_then_two(said: Connection, second: str) -> None:
    warnings.simplefilter("ignore")
    trainer(1, strategy="gossip_ring").fit(Lit(), loader())
    try:
        trainer(2, strategy=second).fit(Lit(), loader())
    except Exception as error:
        said.send(str(error))
    os._exit(0)
