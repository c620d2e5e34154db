"""A network by which the others cannot be reached is refused, in a sentence that says what there is."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from lightning_async.transport.network import by, check_interface, check_network, refuse_loopback


def test_one_host_reaches_itself_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    check_network(None, nodes=1)
    check_network("lo", nodes=1)


def test_what_torch_connects_goes_by_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "eth7"):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if before:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
        for named in (None, "eth0"):
            with contextlib.suppress(OSError), by(named):
                assert os.environ.get("GLOO_SOCKET_IFNAME") == (named or before)
                raise OSError
            assert os.environ.get("GLOO_SOCKET_IFNAME") == before


def test_an_address_that_leads_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("10.0.0.1", "fe80::1"):
        refuse_loopback(address, nodes=4)
    for address in ("127.0.1.1", "::1"):
        with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME"):
            refuse_loopback(address, nodes=2)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ValueError, match=r"resolves to 127.0.1.1, where the other 1 nodes cannot reach it"):
        check_network(None, nodes=2)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_network(None, nodes=2)


def test_a_name_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ValueError, match=r"leads to no address .*GLOO_SOCKET_IFNAME"):
        check_network(None, nodes=2)


@pytest.mark.parametrize("name", ["eth77", "", "dormant0"])
def test_an_interface_that_is_not_there_or_has_no_address(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "dormant0")])
    sentence = f"`interface` must name a network interface .*, got '{name}'; there are lo, dormant0"
    with pytest.raises(ValueError, match=sentence):
        check_interface(name, nodes=1)


def test_the_loopback_leads_to_no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    with pytest.raises(ValueError, match=r"`interface='lo'` leads nowhere but to this host.*2 nodes; others are eth0"):
        check_interface("lo", nodes=2)
