"""The `lightning-async` command: prints the configs that LightningCLI reads; replays, draws and audits runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_async.cli import audit, replay, report
from lightning_async.cli.configs import names, read, summary
from lightning_async.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the answer is the exit status."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _config(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        _list()
        return 0
    try:
        text = read(arguments.name)
    except KeyError as unknown:
        print(f"lightning-async: {unknown.args[0]}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Asynchronous training strategies for PyTorch Lightning."
    parser = argparse.ArgumentParser(prog="lightning-async", description=about)
    parser.add_argument("--version", action="version", version=f"lightning-async {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    config = commands.add_parser(
        "config",
        help="list the ready configs, or print one",
        description="Without a name: list the ready LightningCLI configs. With one: print it, to be saved and edited.",
        epilog="lightning-async config strategies/gossip_ring > gossip.yaml; python train.py fit --config gossip.yaml",
    )
    config.add_argument("name", nargs="?", help="for example strategies/gossip_ring")
    config.set_defaults(run=_config)
    replay.add_parser(commands)
    report.add_parser(commands)
    audit.add_parser(commands)
    return parser


def _list() -> None:
    found = names()
    width = max(map(len, found), default=0)
    for name in found:
        print(f"{name:<{width}}  {summary(name)}")


__all__ = ["main"]
