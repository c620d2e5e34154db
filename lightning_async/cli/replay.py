"""`lightning-async replay`: a recorded run once more, in one process, compared with its logs to the first difference.

logs + module + data --> one Trainer a member, on a stage --> "as recorded, to the bit"     exit 0
                                                              the first difference          exit 1
                                                              what is wrong with the input  exit 2
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_async.cli.inputs import add_fit, check, chosen, read_logs
from lightning_async.cli.member import recompute
from lightning_async.cli.tell import first_difference, notes, summary
from lightning_async.cli.watch import watch
from lightning_async.strategies.course import Course, Difference, WrongInput
from lightning_async.transport.log import Divergence

DESCRIPTION = "Recompute every member of a recorded run (record=PATH) from its events, and say where it first differs."
EPILOG = """\
The replay is the run to the bit, if the run was on CPUs of one kind with the same torch and the same number of threads
(which the log names), and if its module computes the same twice. Elsewhere, and for a run on GPUs, last bits may
differ: then --tolerance 1e-3 compares losses only, and only so far. Validation and the run's callbacks are left out."""


def add_parser(commands: Any) -> None:
    """Enter the command and its arguments."""
    parser = commands.add_parser(
        "replay",
        help="recompute a recorded run, and say where it first differs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="the folder that the run was recorded in")
    parser.add_argument(
        "--module", required=True, metavar="PKG.MOD:NAME", help="the LightningModule's class, or a maker"
    )
    parser.add_argument("--init", metavar="JSON", help="its arguments, for example '{\"lr\": 0.1}'")
    parser.add_argument("--ckpt", type=Path, help="the checkpoint that the run began with, if not from its seed")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="PKG.MOD:NAME", help="makes the training loader, if the module does not")
    data.add_argument("--datamodule", metavar="PKG.MOD:NAME", help="the LightningDataModule's class, or a maker")
    add_fit(parser)
    parser.add_argument("--until", type=int, metavar="STEP", help="stop behind this step of each member")
    parser.add_argument(
        "--member", type=int, metavar="RANK", help="recompute this member, and others as far as it needs them"
    )
    parser.add_argument("--tolerance", type=float, help="let losses differ relatively by so much; compare no digests")
    parser.add_argument("--watch", action="store_true", help="show what was trained and folded where a loss jumps")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay, tell, and return the exit status."""
    try:
        logs = read_logs(arguments.path, chosen(arguments.path, arguments.fit))
        check(logs, arguments)
        course = Course(len(logs), arguments.until, arguments.tolerance, measure=arguments.watch, tell=_say)
        for note in notes(logs[0].header):
            _say(note)
        with _quiet(logs[0].header["threads"]):
            recompute(logs, arguments, course)
    except WrongInput as wrong:
        print(f"lightning-async: {wrong}", file=sys.stderr)
        return 2
    except (Difference, Divergence) as difference:
        status, last = 1, first_difference(difference, logs)
    except Exception as error:  # of the user's module: with its traceback, and another exit status than a difference
        traceback.print_exc()
        print(f"lightning-async: the replay failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    else:
        status, last = 0, summary(logs, course, arguments.member)
    if arguments.watch:
        _say(watch(course.steps, arguments.member))
    _say(last)
    return status


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """Lightning is silent inside, torch computes on `threads` threads; both are as before outside."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, before, rank = [logger.level for logger in loggers], torch.get_num_threads(), vars(rank_zero_only)["rank"]
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else Lightning chooses a number of its own
    torch.set_num_threads(threads)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)
        vars(rank_zero_only)["rank"] = rank  # every Trainer sets it
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _say(line: str) -> None:
    print(line, flush=True)
