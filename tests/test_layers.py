"""Who may import whom. Each rule names the line that breaks it.

strategies, callbacks, cli  ->  algorithms, pipeline, transport, data, metrics  ->  replica, arrival
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_async"

TOP = {"strategies", "callbacks", "cli", "__init__"}
MIDDLE = {"algorithms", "pipeline", "transport", "data", "metrics", "progress", "inner", "hooks"}
BASE = {"replica", "rounding", "arrival", "fresh", "version"}
HEIGHT = {**dict.fromkeys(TOP, 2), **dict.fromkeys(MIDDLE, 1), **dict.fromkeys(BASE, 0)}

LIGHTNING_PLACES = ("__init__.py", "strategies/", "callbacks/", "cli/", "data/loader.py")
DISTRIBUTED_PLACES = (
    "transport/attempts.py",
    "transport/line.py",
    "transport/sender.py",
    "transport/receiver.py",
    "transport/control.py",
    "transport/cluster.py",
    "transport/gloo.py",
    "transport/header.py",
    "transport/world.py",
    "strategies/office.py",
    "hooks.py",
)
PRIVATE_PLACE = "strategies/compat/"
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities")
# What the Trainer, the loops and the strategies of Lightning keep to themselves: a release may break who touches it.
PRIVATE = {
    "_accelerator_connector",
    "_average_model",
    "_callback_connector",
    "_checkpoint_connector",
    "_data_connector",
    "_data_source",
    "_ddp_kwargs",
    "_determine_ddp_device_ids",
    "_forward_redirection",
    "_get_process_group_backend",
    "_layer_sync",
    "_lightning_module",
    "_lightning_optimizers",
    "_logger_connector",
    "_process_group_backend",
    "_register_ddp_hooks",
    "_register_signal_handlers",
    "_results",
    "_run_stage",
    "_signal_connector",
    "_signal_handlers_to_register",
    "_start_method",
    "_teardown",
}


def offences(path: str, source: str) -> list[str]:
    """Every line of `source`, as the file `path` inside the package, that breaks a rule."""
    found = {}
    for line, name in _names(path, ast.parse(source)):
        for rule in _rules(path, name):
            found[f"lightning_async/{path}:{line}: {name}: {rule}"] = None
    return list(found)


def _rules(path: str, name: str) -> Iterator[str]:
    parts = name.split(".")
    if parts[0] == "lightning_async":
        yield from _own_rules(path, parts[1:])
    if parts[0] in LIGHTNING and not path.startswith(LIGHTNING_PLACES):
        yield f"`lightning` is for {', '.join(LIGHTNING_PLACES)} only"
    if parts[:2] == ["torch", "distributed"] and not path.startswith(DISTRIBUTED_PLACES):
        yield f"`torch.distributed` is for {', '.join(DISTRIBUTED_PLACES)} only"
    private = parts[0] in LIGHTNING and any(p.startswith("_") and not p.startswith("__") for p in parts)
    touched = parts[0] == "" and parts[-1] in PRIVATE and path.startswith(LIGHTNING_PLACES)
    if (private or touched) and not path.startswith(PRIVATE_PLACE):
        yield f"private names of Lightning are for {PRIVATE_PLACE} only"


def _own_rules(path: str, parts: list[str]) -> Iterator[str]:
    here = path.split("/")[0].removesuffix(".py")
    there = parts[0] if parts else "__init__"
    if there.startswith("_") and there != "__init__":
        return
    if here not in HEIGHT:
        yield f"`{here}` is in no layer: add it to this test and to the architecture"
    elif HEIGHT.get(there, 2) > HEIGHT[here]:
        yield f"`{here}` lies below `{there}`"
    if here == "callbacks" and there == "strategies":
        yield "callbacks import no strategy"
    if here == "algorithms" and there == "transport" and parts[1:2] not in ([], ["mail"], ["rounds"]):
        yield "of the transport, algorithms know `mail` and `rounds` only"
    if here == "transport" and there == "algorithms":
        yield "the transport knows no algorithm"


def _names(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What is imported, by full name, and attributes: `torch.distributed` by full name, `anything._x` as `._x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(path, node)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}" if _may_be_module(module) else f"{module}"
                yield from [(node.lineno, f"{module}.{alias.name}")] if alias.name.startswith("_") else []
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if f"{dotted}.".startswith("torch.distributed."):
                yield node.lineno, "torch.distributed"
            yield node.lineno, f".{node.attr}"


def _may_be_module(module: str) -> bool:
    """Whether what is imported from it may be a module of its own that a rule speaks of."""
    return module in ("torch", "lightning_async", "lightning_async.transport")


def _absolute(path: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folders = ["lightning_async", *path.split("/")[:-1]]
    return ".".join([*folders[: len(folders) - node.level + 1], *([node.module] if node.module else [])])


FILES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_go_downwards(path: str) -> None:
    found = offences(path, (PACKAGE / path).read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("replica.py", "from lightning_async.transport.mail import Mail"),
        ("replica.py", "from lightning_async import strategies"),
        ("replica.py", "import lightning_async"),
        ("arrival.py", "from .algorithms import gossip"),
        ("transport/cluster.py", "from lightning_async.strategies.base import AsyncStrategy"),
        ("transport/cluster.py", "from ..algorithms.algorithm import Algorithm"),
        ("transport/virtual.py", "import torch.distributed as dist"),
        ("transport/virtual.py", "from torch import distributed"),
        ("transport/virtual.py", "from torch.distributed import TCPStore"),
        ("transport/virtual.py", "import torch\ntorch.distributed.init_process_group('gloo')"),
        ("strategies/gossip_ring.py", "import torch.distributed"),
        ("algorithms/gossip.py", "from lightning.pytorch import Trainer"),
        ("algorithms/gossip.py", "import pytorch_lightning"),
        ("algorithms/gossip.py", "from lightning_async.transport import cluster"),
        ("algorithms/gossip.py", "from lightning_async.transport.virtual import World"),
        ("algorithms/gossip.py", "def late():\n    import torch.distributed"),
        ("data/share.py", "from lightning.pytorch import Trainer"),
        ("data/share.py", "from lightning_async.callbacks import SpeedFaults"),
        ("callbacks/delay.py", "from lightning_async.strategies import GossipRingStrategy"),
        ("callbacks/delay.py", "from ..strategies.base import AsyncStrategy"),
        ("strategies/base.py", "from lightning.pytorch.trainer.connectors import _signal"),
        ("strategies/base.py", "from lightning.fabric.utilities._private import thing"),
        ("strategies/base.py", "def f(trainer):\n    trainer._signal_connector.received_sigterm()"),
        ("strategies/compatible.py", "def f(trainer):\n    trainer._signal_connector.received_sigterm()"),
        ("newcomer/thing.py", "from lightning_async.replica import Replica"),
    ],
)
def test_an_offending_line_is_caught(path: str, line: str) -> None:
    found = offences(path, f"import math\n{line}\n")
    assert found
    assert all(offence.startswith(f"lightning_async/{path}:") for offence in found)
    assert not found[0].startswith(f"lightning_async/{path}:1:")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("__init__.py", "from lightning_async.strategies import GossipRingStrategy"),
        ("algorithms/gossip.py", "from lightning_async.transport.rounds import Rounds"),
        ("algorithms/gossip.py", "from lightning_async.transport import mail, rounds"),
        ("data/loader.py", "from lightning.pytorch.utilities import rank_zero_info"),
        ("strategies/compat/leash.py", "def f(trainer):\n    trainer._signal_connector"),
        ("strategies/office.py", "from torch.distributed import TCPStore"),
        ("transport/line.py", "import torch.distributed as dist"),
        ("cli/__init__.py", "from lightning_async.version import __version__"),
        ("replica.py", "from lightning_async.arrival import Arrival"),
        ("replica.py", "import torch\ntorch.distributions.Normal"),
    ],
)
def test_an_honest_line_passes(path: str, line: str) -> None:
    assert not offences(path, line)


def test_the_architecture_page_names_every_module() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named: list[str] = []
    here = ""
    for line in page.partition("## The rooms")[2].partition("\n## ")[0].splitlines():
        if room := re.match(r"\| \*\*([\w/]+)/\*\* \|", line):
            here = f"{room[1]}/"
        named += [here + name for name in re.findall(r"`([\w*]+\.py)`", line)]
    modules = [path for path in FILES if not path.endswith("__.py")]
    assert [path for path in modules if not any(fnmatch(path, name) for name in named)] == []
    stale = [
        name for name in named if not any(fnmatch(path, end) for path in modules for end in (name, Path(name).name))
    ]
    assert stale == []  # a row may name a module of the top beside its own
