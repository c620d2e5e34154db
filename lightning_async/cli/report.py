"""`lightning-async report`: a run's logs as one page that needs nothing else, and its pictures as files.

RUN_DIR (events, journal) -> Story -> timeline.png, delays.png, learning.png, traffic.png -> report.html (all inside)
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_async.callbacks.slowness import stragglers
from lightning_async.cli.inputs import add_fit
from lightning_async.cli.pictures import draw
from lightning_async.cli.story import Story, tell
from lightning_async.cli.tell import many
from lightning_async.strategies.course import WrongInput

CAPTIONS = {
    "timeline": "Each rank's time from left to right. The height of a shade is its share of that moment; white is the "
    "meeting itself, validation, or a rank that is not there.",
    "delays": "How many of its receiver's steps a message was under way, by the rank that sent it.",
    "learning": "Losses, and how far the replicas were apart when they met.",
    "traffic": "Who sent how much to whom, and in which kinds of messages.",
}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .5rem}figure{margin:2rem 0}img{max-width:100%;height:auto}
figcaption{color:#555;font-size:.9rem}ul{padding-left:1.2rem}
.ranks{max-height:22rem;overflow:auto;border:1px solid #ddd}table{border-collapse:collapse;width:100%}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #eee;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:#f4f4f4}tr.slow td{font-weight:700}
"""


def add_parser(commands: Any) -> None:
    """Enter the command and its arguments."""
    about = "Draw a run: one HTML page that needs no network, and the same pictures as PNG files."
    parser = commands.add_parser("report", help="draw a run as one page", description=about)
    parser.add_argument("path", type=Path, help="the folder that the run was recorded or logged in")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUN_DIR/report)")
    add_fit(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw, write, tell where."""
    try:
        story = tell(arguments.path, arguments.fit)
        folder = arguments.out or arguments.path / "report"
        pictures = draw(story, folder)
        file = folder / "report.html"
        file.write_text(page(story, pictures), encoding="utf-8")
    except WrongInput as wrong:
        print(f"lightning-async: {wrong}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lightning-async: {error}: say by --out where the page may be written", file=sys.stderr)
        return 2
    print(file)
    return 0


def page(story: Story, pictures: Mapping[str, Path]) -> str:
    """The page, with everything inside."""
    name = story.strategy or "a run"
    title = f"{name}, {many(story.world, 'rank')}"
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in headlines(story))
    figures = "".join(_figure(name, file) for name, file in pictures.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><ul>{facts}</ul>{figures}{_table(story)}</body></html>\n"
    )


def headlines(story: Story) -> Iterator[str]:
    """What to know at a glance."""
    steps, samples = story.steps.total(), story.samples.total()
    if not (steps or story.links or story.spread or story.losses):
        yield "nothing was told: the run ended before its first meeting"
        return
    if story.end:
        rate = f", {samples / story.end:.0f} samples/s" if samples else ""
        yield f"{many(steps, 'step')} of all ranks, {many(samples, 'sample')} in {story.end:.1f} s{rate}"
    shares = _shares(story, sorted(story.pieces))
    for rank, log in story.logs.items():
        if not log.finished:
            yield f"rank {rank}'s log ends early: it was stopped, failed or was killed"
    if not story.split:
        yield "who worked and who waited is not known: on a GPU, a synchronous step cannot be told apart"
    elif sum(shares):
        yield f"{shares[0]:.0%} of all ranks' time was compute, {shares[1]:.0%} exchange, {shares[2]:.0%} waiting"
    slow = stragglers(_seconds(story)) if story.split else ()
    if slow:
        yield f"slow: {', '.join(f'rank {rank}' for rank in slow)} (a step takes far longer than the median)"
    elif story.world > 1 and story.pieces and story.split:
        yield "no rank is slow"
    if late := [delay for counts in story.delays.values() for delay in counts.elements()]:
        late.sort()
        fates = ", ".join(f"{n} {fate}" for fate, n in story.fates.items() if n)
        yield (
            f"messages: {fates}; median delay {many(late[len(late) // 2], 'step')}, 95 % within "
            f"{late[int(0.95 * (len(late) - 1))]}, the latest {late[-1]}"
        )
    if story.spread:
        yield f"replicas were {story.spread[-1][1]:.2g} apart at the last meeting (rms, by weight)"


def _figure(name: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    caption = escape(CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(story: Story) -> str:
    """One row a rank, where any of them told of its steps."""
    if not story.steps.total():
        return ""
    seconds = _seconds(story)
    slow = stragglers(seconds) if story.split else ()
    head = ("rank", "steps", "samples", "work a step, ms", "compute", "exchange", "waiting")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for rank in range(story.world):
        cells = [str(rank), str(story.steps[rank]), str(story.samples[rank]), f"{1000 * seconds.get(rank, 0):.1f}"]
        cells += [f"{share:.0%}" if story.split else "-" for share in _shares(story, [rank])]
        mark = ' class="slow"' if rank in slow else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="ranks"><table>{"".join(rows)}</table></div>'


def _seconds(story: Story) -> dict[int, float]:
    """Seconds of work in a step, by rank."""
    return {
        rank: sum(piece.compute for piece in pieces) / story.steps[rank]
        for rank, pieces in story.pieces.items()
        if story.steps[rank]
    }


def _shares(story: Story, ranks: Sequence[int]) -> tuple[float, float, float]:
    pieces = [piece for rank in ranks for piece in story.pieces.get(rank, ())]
    parts = (sum(p.compute for p in pieces), sum(p.exchange for p in pieces), sum(p.waited for p in pieces))
    total = sum(parts)
    return (parts[0] / total, parts[1] / total, parts[2] / total) if total else (0.0, 0.0, 0.0)
