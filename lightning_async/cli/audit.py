"""`lightning-async audit`: a finished run against what it promised; what the logs do not hold is said to be unknown.

    delays     nothing was folded that was later than the bound; where a server shrinks what is: nothing in full
    accounts   what is conserved (mass) adds up at every meeting, to the last unit
    samples    every sample of an epoch was trained on exactly once
    weights    all ranks left each meeting with the same consensus

Exit status 0: nothing is broken. 1: a promise is broken, and the line says where. 2: nothing could be checked.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_async.algorithms.weighting import bound_among, in_time
from lightning_async.cli.inputs import add_fit
from lightning_async.cli.story import Story, counts_samples, tell, trained
from lightning_async.cli.tell import many
from lightning_async.data.dealt import Dealt
from lightning_async.strategies.course import WrongInput

DESCRIPTION = "Check a finished run against what it promised: delays within the bound, masses and samples conserved."
SERVED = ("async_global", "cyclic_delay")
RECORD = "only an event record tells that (record=...)"


class Finding(NamedTuple):
    """What came of one check: True, False, or None where the logs cannot tell."""

    name: str
    kept: bool | None
    sentence: str


def add_parser(commands: Any) -> None:
    """Enter the command and its arguments."""
    parser = commands.add_parser("audit", help="check a finished run against what it promised", description=DESCRIPTION)
    parser.add_argument("path", type=Path, help="the folder that the run was recorded or logged in")
    parser.add_argument(
        "--max-delay", type=int, metavar="STEPS", help="the bound; by default the strategy's own `max_delay`"
    )
    add_fit(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, tell, and return the exit status."""
    try:
        if arguments.max_delay is not None and arguments.max_delay < 0:
            raise WrongInput(f"--max-delay must be at least 0, got {arguments.max_delay}")
        findings = audit(tell(arguments.path, arguments.fit), arguments.max_delay)
    except WrongInput as wrong:
        print(f"lightning-async: {wrong}", file=sys.stderr)
        return 2
    for name, kept, sentence in findings:
        print(f"{'?' if kept is None else 'kept' if kept else 'BROKEN':<7} {name}: {sentence}")
    if all(kept is None for _, kept, _ in findings):
        print("lightning-async: nothing of this could be checked: record the run (`record=...`)", file=sys.stderr)
        return 2
    return int(any(kept is False for _, kept, _ in findings))


def audit(story: Story, max_delay: int | None = None) -> list[Finding]:
    """All findings."""
    bound = _promised(story) if max_delay is None else Bound(max_delay, story.delays)
    return [_delays(story, bound), *_accounts(story), *_samples(story), _weights(story)]


class Bound(NamedTuple):
    """The largest delay of what is bounded.

    Attributes:
        most: In steps, or versions of a server.
        bounded: How often each delay came, by sender.
        how: What is said of an arrival that is bounded.
    """

    most: int
    bounded: Mapping[int, Counter[int]]
    how: str = "folded"


def _promised(story: Story) -> Bound | None:
    """What the strategy's own knobs say. A server's bound is one of excess, and what is later may count less."""
    most, late = story.knobs.get("max_delay"), story.knobs.get("on_late") or "shrink"
    if most is None:
        return None
    if story.strategy not in SERVED:
        return Bound(most, story.delays)
    n = story.members or story.world
    most = in_time(bound_among(n, most) or 0, n)
    return Bound(most, story.in_full, "folded in full") if late == "shrink" else Bound(most, story.delays)


def _delays(story: Story, bound: Bound | None) -> Finding:
    folded = sum(counts.total() for counts in story.delays.values())
    if bound is None:
        return Finding("delays", None, "there is no bound to check: give --max-delay")
    if not folded:
        return Finding("delays", None, "nothing was folded")
    most, how = bound.most, bound.how
    over = [(delay, rank, n) for rank, counts in bound.bounded.items() for delay, n in counts.items() if delay > most]
    if over:
        delay, rank, _ = max(over)
        many = sum(n for _, _, n in over)
        return Finding("delays", False, f"{many} of {folded} were {how} over {most} steps, the latest {delay} steps "
                       f"late, from rank {rank}")  # fmt: skip
    latest = max(max(counts) for counts in story.delays.values() if counts)
    what = "bound" if how == "folded" else "in full up to"
    refused = story.fates["refused"]
    return Finding(
        "delays", True, f"{folded} folded, the latest {latest} steps late ({what} {most}), {refused} refused"
    )


def _accounts(story: Story) -> Iterator[Finding]:
    names = sorted({name for meeting in story.accounts for word in meeting.values() for name in word})
    if not names:
        yield Finding("accounts", None, "the logs hold none")
    for name in names:
        checked = 0
        for number, meeting in enumerate(story.accounts, 1):
            if len(meeting) < (story.members or story.world):
                continue  # who died took its part along
            checked += 1
            have, should = (sum(word[name][at] for word in meeting.values()) for at in (0, 1))
            if have != should:
                yield Finding(name, False, f"at meeting {number} the ranks have {have} together, not {should}")
                break
        else:
            left_out = len(story.accounts) - checked
            gone = f" ({left_out} without some rank not checked)" if left_out else ""
            where = many(checked, "meeting")
            yield Finding(name, True if checked else None, f"the same at {where}, to the last unit{gone}")


def _samples(story: Story) -> Iterator[Finding]:
    if not story.logs:
        yield Finding("samples", None, RECORD)
        return
    logs = [log for log in story.logs.values() if counts_samples(log)]
    begun = [log.notes_of("epoch") for log in logs]
    counts: dict[int, Counter[Any]] = {note["epoch"]: Counter() for notes in begun for note in notes}
    for notes, log in zip(begun, logs, strict=True):
        for note, batches in zip(notes, trained(log), strict=False):
            counts[note["epoch"]].update(sample for batch in batches for sample in batch)
    if not any(counts.values()):
        drawn, used = sum(len(log.notes_of("drawn")) for log in logs), sum(log.batches() for log in logs)
        said = f": of {many(drawn, 'batch', 'batches')} drawn, {used} were trained on" if drawn else ""
        yield Finding("samples", None, f"the record names none (data of the ranks' own){said}")
        return
    known = [dict(zip((note["epoch"] for note in notes), log.notes_of("dealt"), strict=False))
             for notes, log in zip(begun, logs, strict=True)]  # fmt: skip
    dealt = {epoch: Dealt(**one) for each in known for epoch, one in each.items()}
    if not dealt.keys() >= counts.keys():
        yield Finding("samples", None, "the sampler is the user's own: what an epoch should have is not known")
        return
    yield _once(story, dealt, dict(sorted(counts.items())))


def _once(story: Story, dealt: Mapping[int, Dealt], counts: Mapping[int, Counter[Any]]) -> Finding:
    """Whole epochs: each sample once. The first of a resumed run and the last of a stopped one are parts."""
    whole, deaths, before = 0, any(not log.finished for log in story.logs.values()), Counter[Any]()
    resumed = bool((story.logs[0].first("start") or {}).get("resumed"))
    alike = any(one.samples > one.unlike for one in dealt.values())
    for epoch, counted in counts.items():
        due = dealt[epoch]
        twice = counted.total() - len(counted)
        if twice > due.samples - due.unlike + due.again and not deaths:
            sample, n = counted.most_common(1)[0]
            return Finding("samples", False, f"in epoch {epoch} sample {sample} was trained on {n} times")
        whose = len(before) if due.grows else due.unlike
        missing = len(before.keys() - counted.keys()) if due.grows else due.unlike - len(counted)
        part = epoch == min(counts) and resumed
        if missing > due.missing and not part and epoch != max(counts):
            return Finding("samples", False, f"in epoch {epoch} {missing} of {whose} samples were not trained on")
        whole += missing <= due.missing
        before = counted
    again = "; those of ranks that ended early were repeated" if deaths else ""
    drawn = " (as often as the sampler drew it)" if alike else ""
    return Finding(
        "samples", True, f"each once{drawn} in {whole} of {many(len(counts), 'epoch')}, none twice in the others{again}"
    )


def _weights(story: Story) -> Finding:
    if not story.logs:
        return Finding("weights", None, RECORD)
    digests = [log.notes_of("consensus") for log in story.logs.values()]
    for number, found in enumerate(zip(*digests, strict=False), 1):
        if len(set(found)) > 1:
            return Finding("weights", False, f"the ranks left meeting {number} with different weights")
    if not (met := min(map(len, digests))):
        return Finding("weights", None, "no consensus was recorded: there was no meeting, or no replica to be equal")
    return Finding("weights", True, f"equal on all ranks after {many(met, 'meeting')}")
