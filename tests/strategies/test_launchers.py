"""Lightning's own launchers: popen, spawn and fork by name; the caller's module holds the consensus afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.strategies.lit import Lit, loader, trainer, weights

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, mode: str, folder: Path, *, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.strategies.script", name, mode, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def test_popen_by_name(tmp_path: Path) -> None:
    done = script("gossip_ring", "works", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [(tmp_path / f"rank{r}.txt").read_text() for r in range(2)]
    assert ends[0] == ends[1]


def test_a_popen_child_that_fails_is_named_by_rank_0(tmp_path: Path) -> None:
    """Its own exit would have rank 0 killed before it could say anything: so it lingers."""
    done = script("gossip_ring", "fails", tmp_path)
    assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
    assert "PeerFailedError: rank 1 stopped: ValueError: the fifth batch is too much" in done.stderr


def test_spawn_gives_the_caller_the_consensus(tmp_path: Path) -> None:
    done = script("gossip_ring_spawn", "works", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "rank0.txt").exists()


def test_fork_gives_the_caller_the_consensus() -> None:
    lit = Lit()
    before = weights(lit)
    t = trainer(2, strategy="gossip_ring_fork")
    t.fit(lit, loader(), loader(10, shuffle=False))
    assert weights(lit) != before
    assert "val" in t.callback_metrics


def test_a_fork_that_fails_is_named() -> None:
    class Failing(Lit):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            if self.global_rank == 1 and len(self.seen) >= 16:
                raise ValueError("the fifth batch is too much")

    t = trainer(2, strategy="gossip_ring_fork")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the fifth batch is too much"):
        t.fit(Failing(), loader(), loader(10, shuffle=False))
