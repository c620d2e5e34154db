"""Several nodes: torchrun on each of two hosts (network namespaces) with a link of 200 Mbit/s between them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.few(0)
@pytest.mark.netns
@pytest.mark.parametrize("named", ["variable", "knob"])
def test_two_nodes_by_torchrun(tmp_path: Path, named: str) -> None:
    """Links go by the interface that GLOO_SOCKET_IFNAME names, or the strategy's own knob."""
    logs = [(tmp_path / f"node{i}.log") for i in range(2)]
    with Hosts(2, mbit=200) as hosts:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        environment |= {"GLOO_SOCKET_IFNAME": "eth0"} if named == "variable" else {}
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-port=29511"]
        script = ["-m", "tests.strategies.script", "gossip_ring", "works", str(tmp_path), "2", "1"]
        script += ["eth0"] if named == "knob" else []
        nodes = []
        for i, log in enumerate(logs):
            own = [f"--node-rank={i}", f"--master-addr={hosts.address(0)}"]
            with log.open("wb") as output:
                nodes.append(hosts.run(i, [sys.executable, *launcher, *own, *script], environment, output=output))
        codes = [node.wait(120) for node in nodes]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    ends = [(tmp_path / f"rank{r}.txt").read_text() for r in range(2)]
    assert ends[0] == ends[1]
