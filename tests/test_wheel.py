"""The wheel holds the package, its types and its ready configs where they are read, and nothing else."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_async.cli import configs
from tests.strategies.ranks import run

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # what pip calls
FOLDERS = ("lightning_async", "strategies", "callbacks", "examples", "benchmarks", "tests", "docs")


def _too_old() -> str | None:
    """Why no wheel can be built here, offline and without installing anything."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "building a wheel needs setuptools, which is not installed"
    if int(version.split(".")[0]) < 77:
        return f"building this wheel needs setuptools 77 or newer, {version} is installed"
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from a copy of the sources, so that the tree stays as it is."""
    if reason := _too_old():
        pytest.skip(reason)
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, sources / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (file for file in ROOT.iterdir() if file.is_file()):
        shutil.copy(file, sources)
    built = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=sources, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_all_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "lightning_async").rglob("*.py")}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ready = {f"lightning_async/configs/{name}.yaml" for name in configs.names()}
    pages = {f"lightning_async/configs/{group}/README.md" for group in configs.GROUPS}
    assert held == package | ready | pages | {"lightning_async/py.typed"}


def test_the_pages_beside_the_configs_come_along(wheel: zipfile.ZipFile) -> None:
    for group in configs.GROUPS:
        page = wheel.read(f"lightning_async/configs/{group}/README.md")
        assert page == (ROOT / group / "README.md").read_bytes()


def test_the_configs_are_where_the_command_reads_them(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    installed = _load(tmp_path / "lightning_async" / "cli" / "configs.py")
    assert {name.partition("/")[0] for name in installed.names()} == {"strategies", "callbacks"}
    assert {name: installed.read(name) for name in installed.names()} == {n: configs.read(n) for n in configs.names()}


def test_the_command_and_the_licence_come_along(wheel: zipfile.ZipFile) -> None:
    held = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "lightning-async = lightning_async.cli:main" in wheel.read(held["entry_points.txt"]).decode()
    assert any(name.endswith("LICENSE") for name in held)


def test_installed_alone_the_command_prints_a_config(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """By pip, and called by its name from elsewhere: no file of the checkout is in reach of what is printed."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("installing a wheel needs pip, which is not installed")
    target, name = tmp_path / "installed", "strategies/gossip_ring"
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-cache-dir", "--no-compile", "--target", str(target)]
    subprocess.run([*pip, *offline, str(wheel.filename)], check=True, timeout=60)
    file = target / "lightning_async" / "configs" / f"{name}.yaml"
    assert file.read_text(encoding="utf-8") == configs.read(name)
    file.write_text("# the installed one\n" + configs.read(name), encoding="utf-8")
    (said,) = run(1, _say, target, name)
    assert said == (0, file.read_text(encoding="utf-8"))


def _say(target: Path, name: str) -> tuple[Any, str]:
    """What the installed command says, in a process that was forked for it: loading Lightning anew takes seconds."""
    for module in [module for module in sys.modules if module.partition(".")[0] == "lightning_async"]:
        del sys.modules[module]
    command = target / "bin" / "lightning-async"
    sys.path[:0], sys.argv[:] = [str(target)], [str(command), "config", name]
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        runpy.run_path(str(command), run_name="__main__")
    return ended.value.code, said.getvalue()


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("installed_configs", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
