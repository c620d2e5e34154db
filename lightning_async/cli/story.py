"""A run as its logs tell it, whoever wrote them: the same story from the event record and from the callbacks' journal.

    rank*.jsonl      (`record=...`)     every step and every arrival, by the clock        \\
    meetings.jsonl   (callbacks)        what all ranks told at each meeting                 > Story -> report, audit

Where both are there, the record says what happened when, and the journal adds what only it knows. Times are seconds
from a rank's first step: all set off together, whatever their clocks show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_async.callbacks.journal import NAME, read
from lightning_async.cli.inputs import chosen, read_logs
from lightning_async.metrics import DelayMetric, merged, senders
from lightning_async.strategies.course import WrongInput
from lightning_async.strategies.recording import fits_in, log_name
from lightning_async.transport.log import Log


class Piece(NamedTuple):
    """A piece of a rank's time, and how many seconds of it went into what."""

    begin: float
    end: float
    exchange: float
    waited: float

    @property
    def compute(self) -> float:
        """What is left."""
        return max(0.0, self.end - self.begin - self.exchange - self.waited)


Points = list[tuple[float, float]]


@dataclass
class Story:
    """What can be told of a run.

    Attributes:
        world: How many ranks.
        strategy: Its name, if it is known.
        knobs: The strategy's knobs, if they are known.
        pieces: Each rank's time, in order. Gaps are meetings and validations.
        split: Whether work and waiting could be told apart in it.
        steps: Batches of each rank.
        samples: Samples of each rank.
        delays: By sender: how often each delay was folded.
        in_full: The same of what was not shrunk, where each arrival is known.
        fates: How often each fate came.
        spread: Distance of the replicas, at meetings.
        sketches: The same, estimated between them.
        losses: What was logged, by name, and the losses of all batches as "training loss".
        links: By sender and receiver: bytes and messages of each kind.
        accounts: By meeting and rank: what it had and should have had, by name.
        members: How many tell at meetings, where that is known: of a member of several ranks one does.
        logs: The event record, if there is one.
    """

    world: int
    strategy: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    split: bool = True
    steps: Counter[int] = field(default_factory=Counter)
    samples: Counter[int] = field(default_factory=Counter)
    delays: dict[int, Counter[int]] = field(default_factory=dict)
    in_full: dict[int, Counter[int]] = field(default_factory=dict)
    fates: Counter[str] = field(default_factory=Counter)
    spread: Points = field(default_factory=list)
    sketches: Points = field(default_factory=list)
    losses: dict[str, Points] = field(default_factory=dict)
    links: dict[tuple[int, int], dict[str, tuple[float, float]]] = field(default_factory=dict)
    accounts: list[dict[int, dict[str, tuple[int, int]]]] = field(default_factory=list)
    members: int | None = None
    logs: dict[int, Log] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """When the last rank ended."""
        return max((pieces[-1].end for pieces in self.pieces.values() if pieces), default=0.0)


def tell(folder: Path, fit: int | None = None) -> Story:
    """The story of the run in this folder: of its newest fit, or of this one."""
    if not folder.is_dir():
        raise WrongInput(f"there is no folder {folder}: give the one that the run was recorded or logged in")
    records = sorted((path for path in folder.rglob("*rank0.jsonl") if fits_in(path.parent)), key=_age)
    named = [path for path in records if fit is None or path.name == log_name(0, fit)]
    journals = sorted(folder.rglob(NAME), key=_age)
    if not named and not journals:
        raise WrongInput(
            f"there is neither an event record ({log_name(0, fit or 1)}, of `record=...`) nor a journal ({NAME}, of "
            f"DelayStats and its kind) in {folder}"
        )
    if not named and records:
        raise WrongInput(f"there is no event record of fit {fit} in {folder}: leave out --fit to read the newest one")
    if not named:
        return of_journal(_run(journals[-1], fit))
    record = named[-1].parent
    if len({path.parent for path in named}) > 1:
        print(f"{record} is read, the newest of several records below {folder} (name its folder for another)")
    # Only times tell which fit a journal is of: the newest one, if it was written to since the one before ended.
    beside = journals and named[-1] == records[-1] and all(_age(journals[-1]) > _age(path) for path in records[:-1])
    return of_record(read_logs(record, chosen(record, fit)), of_journal(_newest_run(journals[-1]) if beside else []))


def _age(path: Path) -> tuple[int, int, str]:
    """Sorts by when a file was last written to, the newest last; at the same moment, a later fit is newer."""
    return path.stat().st_mtime_ns, len(path.name), path.name


def _run(journal: Path, fit: int | None) -> list[dict[str, Any]]:
    """The lines of this fit, or of the newest one, of those in a journal."""
    lines = read(journal)
    runs = sorted({line["run"] for line in lines})
    if not runs:
        raise WrongInput(f"there is no whole line in {journal}: the run ended before it could tell anything")
    if fit is not None and fit not in runs:
        there = ", ".join(map(str, runs))
        raise WrongInput(f"there is no event record of fit {fit}, and the journal {journal} tells of {there}")
    if fit is None and len(runs) > 1:
        print(f"fit {runs[-1]} is read, the newest of {', '.join(map(str, runs))} (--fit N for another)", flush=True)
    return [line for line in lines if line["run"] == (runs[-1] if fit is None else fit)]


def _newest_run(journal: Path) -> list[dict[str, Any]]:
    lines = read(journal)
    return [line for line in lines if line["run"] == lines[-1]["run"]]


# -- the journal ------------------------------------------------------------------------------------------------------


def of_journal(lines: Iterable[Mapping[str, Any]]) -> Story:
    """What the callbacks of all ranks told."""
    story = Story(world=0)
    for line in lines:
        words, group = line["words"], line["group"]
        if group == "logged":
            for name, value in words.items():
                story.losses.setdefault(name, []).append((line["at"], value))
        elif group == "sketch":
            story.sketches.append((line["at"], words["rms"]))
        elif group == "run":
            story.strategy, story.world = words["strategy"], max(story.world, words["world"])
            story.members = words.get("members")
        elif group in _READ:
            by_rank = {int(rank): word for rank, word in words.items()}
            story.world = max(story.world, 1 + max(by_rank, default=0))
            _READ[group](story, by_rank, line["at"])
    return story


def _delays(story: Story, words: Mapping[int, Any], at: float) -> None:
    for rank, word in words.items():
        begin = word["until"] - word["seconds"]
        pieces = story.pieces.setdefault(rank, [])
        pieces.append(Piece(begin, word["until"], word["exchange"], word["waited"]))
        pieces.append(Piece(word["until"], word["until"] + word["idle"], 0.0, word["idle"]))
        story.split = story.split and word.get("split", True)
        story.steps[rank] += word["trained"][0]
        story.samples[rank] += word["trained"][2]
    story.world = max(
        [story.world, *(senders(word["delays"]) for word in words.values())]
    )  # not all tell what they sent
    metric = merged((word["delays"] for word in words.values()), story.world)
    for peer in range(story.world):
        if counts := _counts(metric, peer):
            story.delays.setdefault(peer, Counter()).update(counts)
    figures = metric.figures()
    story.fates.update({name: int(figures[name]) for name in ("folded", "shrunk", "refused", "lost")})
    story.accounts.append({rank: _pairs(word["accounts"]) for rank, word in words.items()})


def _counts(metric: DelayMetric, peer: int) -> Counter[int]:
    """How often each delay came. A wide bin shows its smallest one, but the latest of all is known to the step."""
    counts = Counter(metric.histogram(peer))
    latest = int(metric.most[peer, 0])
    if counts and latest > max(counts):
        counts.subtract([max(counts)])
        counts[latest] += 1
    return +counts


def _traffic(story: Story, words: Mapping[int, Any], at: float) -> None:
    for rank, word in words.items():
        _links(story, rank, word["links"])


def _spread(story: Story, words: Mapping[int, Any], at: float) -> None:
    rows = [word[""] for word in words.values() if word.get("")]
    if numbers := sum(row[2] for row in rows):
        story.spread.append((at, (sum(row[0] for row in rows) / numbers) ** 0.5))


def _shrink(story: Story, words: Mapping[int, Any], at: float) -> None:
    """Its factors stand in the arrivals too."""


_READ = {"delay": _delays, "traffic": _traffic, "spread": _spread, "shrink": _shrink}


# -- the event record -------------------------------------------------------------------------------------------------


def of_record(logs: Mapping[int, Log], story: Story) -> Story:
    """What every rank wrote down; it replaces what the journal only sums up."""
    header = logs[0].header
    story.world, story.strategy, story.knobs = len(logs), header.get("strategy", ""), header.get("knobs", {})
    story.logs, story.pieces, story.accounts, story.members = dict(logs), {}, [], logs[0].world
    story.delays = {}
    story.steps, story.samples, story.fates = Counter(), Counter(), Counter()
    story.spread = []
    for rank, log in logs.items():
        _Reader(story, rank).read(log)
    for losses in story.losses.values():
        losses.sort()
    return story


class _Reader:
    """Reads one rank's events into a story."""

    def __init__(self, story: Story, rank: int) -> None:
        self._story, self._rank = story, rank
        self._first: float | None = None
        self._last: tuple[float, float, float] | None = None
        self._loss: float | None = None
        self._meeting = 0

    def read(self, log: Log) -> None:
        self._story.pieces[self._rank] = []
        self._listens = any(self._rank in ranks[1:] for ranks in log.members)  # another rank speaks for it
        for line in log.lines():
            if line[1] == "note":
                getattr(self, f"_{line[2]}", _pass)(line[3])
            elif line[1] == "batch":
                self._story.steps[self._rank] += 1
                self._loss = line[2]
        if counts_samples(log):
            self._story.samples[self._rank] = sum(len(batch) for epoch in trained(log) for batch in epoch)

    def _time(self, value: list[Any]) -> None:
        what, *now = value
        if self._first is None:
            self._first = now[0]
        if self._last is not None and what != "off":
            (a, spent, waited), (b, spent_now, waited_now) = self._last, now
            waits = waited_now - waited
            piece = Piece(a - self._first, b - self._first, max(0.0, spent_now - spent - waits), waits)
            self._story.pieces[self._rank].append(piece)
        elif self._last is not None:
            waits = now[2] - self._last[2]  # at the meeting
            begin = self._last[0] - self._first
            self._story.pieces[self._rank].append(Piece(begin, begin + waits, 0.0, waits))
        if what == "batch" and self._loss is not None:
            self._story.losses.setdefault("training loss", []).append((now[0] - self._first, self._loss))
        self._last = (now[0], now[1], now[2])

    def _arrivals(self, value: list[list[Any]]) -> None:
        for peer, _, launched, folded, _, _, fate in value:
            self._story.fates[fate] += 1
            if fate in ("folded", "shrunk"):
                self._story.delays.setdefault(peer, Counter())[folded - launched] += 1
            if fate == "folded":
                self._story.in_full.setdefault(peer, Counter())[folded - launched] += 1

    def _accounts(self, value: Mapping[str, Any]) -> None:
        while len(self._story.accounts) <= self._meeting:
            self._story.accounts.append({})
        if not self._listens:
            self._story.accounts[self._meeting][self._rank] = _pairs(value)
        self._meeting += 1

    def _spread(self, value: float) -> None:
        if self._rank == min(self._story.logs) and self._last is not None and self._first is not None:
            self._story.spread.append((self._last[0] - self._first, value))

    def _traffic(self, value: Mapping[str, Any]) -> None:
        _links(self._story, self._rank, value)


def counts_samples(log: Log) -> bool:
    """Whether this rank's samples count: all stages of a pipeline see the same ones, and the last one counts them."""
    return bool((log.first("start") or {}).get("counts", True))


def trained(log: Log) -> list[list[list[Any]]]:
    """The samples of each batch that was trained on, by epochs: fetched first, and trained on in the same order."""
    epochs: list[list[list[Any]]] = []
    waiting: list[list[Any]] = []
    for line in log.lines():
        if line[1:3] == ["note", "epoch"]:
            epochs.append([])
            waiting = []
        elif line[1:3] == ["note", "fetched"]:
            waiting.append(line[3])
        elif line[1] == "batch" and epochs and waiting:
            epochs[-1].append(waiting.pop(0))
    return epochs


def _links(story: Story, rank: int, table: Mapping[str, Any]) -> None:
    """Counts grow: the last table of a rank is the whole."""
    for peer, row in table.items():
        kinds = {kind: (count["bytes_out"], count["messages_out"]) for kind, count in row.items()}
        story.links[rank, int(peer)] = kinds
        story.world = max(story.world, 1 + int(peer))


def _pairs(accounts: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (int(have), int(should)) for name, (have, should) in accounts.items()}


def _pass(value: Any) -> None:
    """A note for replays."""
