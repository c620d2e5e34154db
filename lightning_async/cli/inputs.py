"""What the user names on the command line: a folder of logs, and Python objects as `package.module:name`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_async.strategies import STRATEGIES, DelayedPipelineStrategy
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.course import WrongInput
from lightning_async.strategies.recording import fits_in, log_name
from lightning_async.transport.log import Log

KINDS: dict[str, type[AsyncStrategy]] = {kind.name: kind for kind in STRATEGIES}
PIPELINE = DelayedPipelineStrategy.name
SAME = ("run", "world", "strategy", "knobs", "ranks_of_members")


def add_fit(parser: Any) -> None:
    """Enter the argument that `chosen` looks at."""
    parser.add_argument("--fit", type=int, help="which fit of those recorded there (1, 2, ...; default: the newest)")


def chosen(folder: Path, fit: int | None) -> int:
    """The number of the fit to read: the one that was named, else the newest, and then it is said if there are more."""
    fits = fits_in(folder)
    if fit is not None or not fits:
        return fit or 1
    if len(fits) > 1:
        print(f"fit {fits[-1]} is read, the newest of {', '.join(map(str, fits))} (--fit N for another)", flush=True)
    return fits[-1]


def read_logs(folder: Path, fit: int) -> dict[int, Log]:
    """The logs of all members of a run."""
    if not folder.is_dir():
        raise WrongInput(f"there is no folder {folder}: give the one that the run was recorded in (`record=...`)")
    found = sorted(folder.glob(log_name(0, fit).replace("rank0", "rank*")))
    if not found:
        raise WrongInput(f"there is no log of fit {fit} in {folder}: no file is named like {log_name(0, fit)}")
    world = _read(found[0]).ranks
    paths = {rank: folder / log_name(rank, fit) for rank in range(world)}
    missing = [rank for rank, path in paths.items() if not path.is_file()]
    if missing:
        raise WrongInput(
            f"the log of rank {missing[0]} of {world} is missing: copy the logs of all nodes into {folder} "
            f"({paths[missing[0]].name} is not there)"
        )
    logs = {rank: _read(path) for rank, path in paths.items()}
    for rank, log in logs.items():
        _check_same(rank, log, logs[0])
    return logs


def load(name: str) -> Any:
    """The object that `package.module:name` stands for; the current folder is searched too."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise WrongInput(f"`{name}` must be written as package.module:name")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise WrongInput(f"`{name}` cannot be imported: {error}; start in the folder that it is found from") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise WrongInput(f"`{path}` has no `{attribute}`")
        found = getattr(found, part)
    return found


def made(name: str, kind: type, **arguments: Any) -> Any:
    """What the class or function of this name makes; it must be a `kind`."""
    maker: Callable[..., Any] = load(name)
    if isinstance(maker, kind):
        return maker
    if not callable(maker):
        raise WrongInput(f"`{name}` is {maker!r}, and not a class or a function that makes a {kind.__name__}")
    thing = maker(**arguments)
    if not isinstance(thing, kind):
        raise WrongInput(f"`{name}` makes a {type(thing).__name__}, where a {kind.__name__} is needed")
    return thing


def arguments_of(text: str | None) -> dict[str, Any]:
    """The keyword arguments that a JSON text holds."""
    try:
        read = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise WrongInput(f"--init must be JSON like '{{\"lr\": 0.1}}', got {text!r} ({error})") from None
    if not isinstance(read, dict):
        raise WrongInput(f"--init must be a JSON object like '{{\"lr\": 0.1}}', got {text!r}")
    return read


def check(logs: Mapping[int, Log], arguments: argparse.Namespace) -> None:
    """Refuse what cannot be replayed, each with a sentence."""
    header = logs[0].header
    if header.get("strategy") not in (*KINDS, PIPELINE):
        raise WrongInput(f"the run's strategy {header.get('strategy')!r} is not among {', '.join([*KINDS, PIPELINE])}")
    if header["device"] != "cpu" and header["trainer"]["precision"].startswith(("16", "transformer")):
        raise WrongInput(f"the run's precision was {header['trainer']['precision']}, which a CPU does not have")
    for why in filter(None, (log.first("unreplayable") for log in logs.values())):
        raise WrongInput(f"this run cannot be replayed, since {why}; its logs are for `report` and `audit`")
    kind = logs[0].kind
    if arguments.member is not None and arguments.member not in logs:
        raise WrongInput(f"there is no {kind} {arguments.member}: the run had {kind}s 0 to {len(logs) - 1}")
    if arguments.until is not None and arguments.until < 1:
        raise WrongInput(f"--until must be a step, from 1, got {arguments.until}")
    if arguments.ckpt is not None and not arguments.ckpt.is_file():
        raise WrongInput(f"there is no checkpoint {arguments.ckpt}")
    arguments_of(arguments.init)
    for name in filter(None, (arguments.module, arguments.data, arguments.datamodule)):
        load(name)
    for rank, log in logs.items():
        _check_start(log, arguments)
        if header["strategy"] == PIPELINE:
            _check_stage(rank, log)


def _read(path: Path) -> Log:
    try:
        return Log(path.read_text(encoding="utf-8").splitlines())
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise WrongInput(f"{path} cannot be read: {error}") from None


def _check_same(rank: int, log: Log, first: Log) -> None:
    if log.me != rank:
        raise WrongInput(f"the log given for {log.kind} {rank} was written by {log.name}")
    for name in SAME:
        if log.header.get(name) != first.header.get(name):
            raise WrongInput(
                f"the logs of {log.kind}s 0 and {rank} are not of one run: their `{name}` is "
                f"{first.header.get(name)!r} and {log.header.get(name)!r}"
            )


def _check_start(log: Log, arguments: argparse.Namespace) -> None:
    if (begin := log.first("start")) is None:
        raise WrongInput(f"{log.name} did not come to its first step: there is nothing to replay")
    if begin["resumed"] and arguments.ckpt is None:
        raise WrongInput("the run went on from a checkpoint (`fit(ckpt_path=...)`): give it by --ckpt")


def _check_stage(rank: int, log: Log) -> None:
    if log.first("start").get("fed") != "stream" and sum(map(len, log.epochs())) < log.batches():
        raise WrongInput(
            f"stage {rank} trained on samples without numbers (a stream, or a loader that is no plain DataLoader): a "
            "pipeline's log cannot say which ones a step was taken on"
        )
