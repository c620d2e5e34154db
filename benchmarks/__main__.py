"""`python -m benchmarks NAME [--strategy NAME] [--seeds N] [--net NAME] [--link MBIT] [--json OUT] [--quick]`: one.

`--list` names them. A benchmark is a module of this folder with a docstring (what it shows, the limit, the control) and
`def run(quick: bool) -> Table`; one that can be of several strategies, with fewer seeds, of one network or
of one link has an argument `strategy`, `seeds`, `net` or `link` too. The exit status is 1 where a claim of its table
does not hold.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

from benchmarks.table import Table

FOLDER = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the answer is the exit status."""
    found = benchmarks(FOLDER)
    arguments = _parser(list(found)).parse_args(argv)
    if arguments.list or arguments.name is None:
        for name, summary in found.items():
            print(f"{name:<{max(map(len, found))}}  {summary}")
        return 0
    start, spent = time.monotonic(), _processor_seconds()
    run: Callable[..., Table] = importlib.import_module(f"benchmarks.{arguments.name}").run
    given = {name: getattr(arguments, name) for name in ("strategy", "seeds", "net", "link")}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in inspect.signature(run).parameters:
            print(f"benchmark {arguments.name} takes no --{name}: leave it out", file=sys.stderr)
            return 2
    table = run(arguments.quick, **chosen)
    seconds = time.monotonic() - start
    print(table.text())
    spent = _processor_seconds() - spent
    used = f"{seconds:.0f} s, {spent / 60:.1f} minutes of processor time"
    print(f"{used} on {machine()}{', quick' if arguments.quick else ''}")
    if arguments.json:
        record = {
            "benchmark": arguments.name,
            **chosen,
            "quick": arguments.quick,
            "seconds": round(seconds, 1),
            "processor": round(spent, 1),
        }
        text = json.dumps({**record, "machine": machine(), **table.plain()}, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if table.met else 1


def benchmarks(folder: Path) -> dict[str, str]:
    """The benchmarks in a folder with the first line of their docstrings. Nothing is imported."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(sum((used.ru_utime, used.ru_stime)) for used in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def machine() -> dict[str, str | int]:
    """What a reader must know of the machine; no name and no path of it."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
    }


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run one benchmark and print its table.")
    parser.add_argument("name", nargs="?", choices=names, metavar="NAME", help=", ".join(names) or "none yet")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--strategy", metavar="NAME", help="what it is of, where there is a choice")
    parser.add_argument("--seeds", type=int, metavar="N", help="with so many seeds, where there are some")
    parser.add_argument("--net", metavar="NAME", help="of one network only, where there are several")
    parser.add_argument("--link", type=float, metavar="MBIT", help="of links of so many Mbit/s only")
    parser.add_argument("--quick", action="store_true", help="smaller and coarser, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the table there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
