"""The command prints what LightningCLI can read."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from lightning_async.cli import main
from lightning_async.cli.configs import names, read
from lightning_async.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", names())
def test_a_summary_ends_where_its_sentence_ends(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["config"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} "))
    text = line.removeprefix(name).strip()
    assert text.endswith(".")
    heading = read(name).partition("\n#\n")[0]
    assert text == " ".join(part.removeprefix("# ") for part in heading.splitlines())


@pytest.mark.parametrize("name", ["strategies/gossip_ring", "strategies/gossip_ring.yaml", "callbacks/speed_faults"])
def test_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", name]) == 0
    assert capsys.readouterr().out == (ROOT / f"{name.removesuffix('.yaml')}.yaml").read_text(encoding="utf-8")


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "strategies/nope"]) == 2
    assert (
        "there is no config 'strategies/nope'; there are: callbacks/adaptive_shrink, callbacks/delay"
        in capsys.readouterr().err
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-async {__version__}\n"


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["cli", "config", "callbacks/speed_faults"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("lightning_async.cli", run_name="__main__")
    assert capsys.readouterr().out == read("callbacks/speed_faults")


def test_every_config_is_in_its_folder_s_table() -> None:
    for name in names():
        group, _, short = name.partition("/")
        assert f"| `{short}` |" in (ROOT / group / "README.md").read_text(encoding="utf-8"), name
