"""The emulated cluster: hosts reach each other, a cut is silence, a slow link is slow, and nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import hosts as hosts_module
from benchmarks.hosts import Hosts, available
from benchmarks.launch import Ranks
from tests.benchmarks.jobs import average, places

PING = "import socket, sys; socket.create_connection((sys.argv[1], 7), timeout=1).close()"
SINK = """
import socket
server = socket.create_server(("", 7))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    while connection.recv(1 << 16):
        pass
    connection.close()
"""


def namespaces() -> set[str]:
    """Of this process: other tests may have some too, at the same time."""
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
    return {name for name in names if name.startswith(f"la{os.getpid()}x")}


def reaches(hosts: Hosts, here: int, there: int) -> bool:
    with open("ping", "wb") as log:
        return hosts.run(here, [sys.executable, "-c", PING, hosts.address(there)], output=log).wait(30) == 0


def listening(hosts: Hosts, i: int, program: str = SINK) -> None:
    with open(f"sink{i}", "wb") as log:
        hosts.run(i, [sys.executable, "-u", "-c", program], output=log)
    end = time.monotonic() + 30
    while "ready" not in Path(f"sink{i}").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.netns
def test_cut_and_heal_and_nothing_left() -> None:
    before = namespaces()
    with Hosts(2) as hosts:
        listening(hosts, 1)
        assert reaches(hosts, 0, 1)
        hosts.cut(1)
        assert not reaches(hosts, 0, 1)
        hosts.heal(1)
        assert reaches(hosts, 0, 1)
    assert namespaces() == before


@pytest.mark.netns
def test_two_clusters_do_not_meet_and_an_exception_cleans_up() -> None:
    before = namespaces()
    with pytest.raises(ConnectionError, match="not reached"):
        _meet_across_clusters()
    assert namespaces() == before


def _meet_across_clusters() -> None:
    with Hosts(1) as one, Hosts(2) as other:
        listening(one, 0)
        if not reaches(other, 1, 0):
            raise ConnectionError("not reached")


@pytest.mark.netns
def test_half_a_cluster_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(namespace: str, device: str, mbit: float) -> None:
        raise RuntimeError("no shaping today")

    before = namespaces()
    monkeypatch.setattr(hosts_module, "_shape", broken)
    with pytest.raises(RuntimeError, match="no shaping today"), Hosts(3, mbit=10):
        pass
    assert namespaces() == before


@pytest.mark.netns
def test_a_link_carries_what_it_is_given() -> None:
    send = (
        "import socket, sys; s = socket.create_connection((sys.argv[1], 7));"
        "s.sendall(bytes(2_000_000)); s.shutdown(socket.SHUT_WR); s.recv(1)"
    )
    with Hosts(2, mbit=40) as hosts:
        listening(hosts, 1)
        start = time.monotonic()
        assert hosts.run(0, [sys.executable, "-c", send, hosts.address(1)]).wait(60) == 0
        assert 2_000_000 < hosts.sent(0) < 2_500_000  # and what frames add
        assert 0.3 < time.monotonic() - start < 5  # 2 MB at 40 Mbit/s: 0.4 s, and the time to start a process


ECHO = """
import socket
server = socket.create_server(("", 7))
print("ready", flush=True)
connection, _ = server.accept()
while word := connection.recv(1 << 16):
    connection.sendall(word)
"""
TRIPS = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 7), timeout=10)
trips = []
for _ in range(5):
    start = time.monotonic()
    link.sendall(b"x")
    link.recv(1)
    trips.append(time.monotonic() - start)
size, got = 1_000_000, 0
link.sendall(bytes(size // 2))
while got < size // 2:
    got += len(link.recv(1 << 16))
print(min(trips))
"""


@pytest.mark.few(0)
@pytest.mark.netns
def test_a_delay_comes_on_top_and_nothing_is_lost_or_left() -> None:
    """A lower bound alone: a busy machine may take longer. Half a million bytes come back whole."""
    before = namespaces()
    with Hosts(2, mbit=100, delay=0.02) as hosts:
        listening(hosts, 1, ECHO)
        with open("trips", "wb") as log:
            assert hosts.run(0, [sys.executable, "-c", TRIPS, hosts.address(1)], output=log).wait(60) == 0
        assert float(Path("trips").read_text()) >= 0.04
        assert 500_000 < hosts.sent(0) < 700_000
        hosts.cut(1)
        assert not reaches(hosts, 0, 1)
    assert namespaces() == before


@pytest.mark.netns
@pytest.mark.few(1)
@pytest.mark.parametrize("store", [True, False])
def test_ranks_on_hosts(store: bool) -> None:
    """The store is on a host of its own, where no rank's death takes it along, or on that of rank 0."""
    with Hosts(2 + store) as hosts:
        address = hosts.address(2 if store else 0)
        with Ranks(average, 2, address=address, spawn=hosts.spawn, store=store) as ranks:
            assert ranks.values(timeout=120) == [0.5, 0.5]


@pytest.mark.netns
def test_two_ranks_on_a_host() -> None:
    with Hosts(2) as hosts, Ranks(places, 4, address=hosts.address(0), spawn=hosts.spawn_by(2)) as ranks:
        assert ranks.values(timeout=120) == [["0", "0", "2"], ["0", "1", "2"], ["1", "0", "2"], ["1", "1", "2"]]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="from 1 to 250"):
        Hosts(0)
    with pytest.raises(ValueError, match="above 0"):
        Hosts(1, mbit=0)
    with pytest.raises(ValueError, match="below 10, got -1"):
        Hosts(1, delay=-1)
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        Hosts(2).address(2)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert available() == "network namespaces need root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert "iproute2" in (available() or "")
