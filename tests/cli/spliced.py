"""A run's schedule behind its first meeting, forced on another run that went on from the checkpoint of that meeting.

    through   | ... first meeting | what came when ...   |
                                    v
    resumed   | begin, load       | what came when ...   |     is replayed from the checkpoint: equal to the bit?

A meeting in mid-epoch had something on its way, fetched and not trained on: who begins there fetches that first. Both
runs write down every answer (`everything`), so that each question of the second half stands in the log by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_async.algorithms.shards import LAST, SHOW, TOKEN
from lightning_async.transport.record import NOTE, SERVED, Guesses

Line = list[Any]


def everything() -> None:
    """From now on logs of this process leave no answer out: none is what a reader would guess."""
    Guesses.of = lambda self, question: object()  # type: ignore[method-assign]


def continued(through: list[Any], resumed: list[Any]) -> list[Any]:
    """The log of a run that began as `resumed` did, at the first meeting of `through`, and then went the same way."""
    began = next(i for i, line in enumerate(resumed) if i and line[1:3] == [NOTE, "start"])
    met = next(i for i, line in enumerate(through) if i and line[1:3] == [NOTE, "consensus"])
    before = [line[1:] for line in through[1 : met + 1] if line[1] != SERVED]
    after = [line[1:] for line in through[met + 1 :] if line[1] != SERVED]
    head = [line[1:] for line in resumed[1 : began + 1] if line[1] != SERVED]
    midway = next(words for words in after if words[0] == "batch" or words[:2] == [NOTE, "epoch"])[0] == "batch"
    head = [words for words in head if words[:2] not in ([NOTE, "fetched"], *([] if midway else [[NOTE, "epoch"]]))]
    head += _on_its_way(before) if midway else []
    lines: list[Line] = []
    questions = 0
    for words in [*head, *_tail(before, after)]:
        questions += words[0] != NOTE
        lines.append([questions, *words])
    served = enumerate(_served(through, met, resumed, head), start=1)
    return [resumed[0], *lines, *([number, SERVED, *words] for number, words in served)]


def _on_its_way(before: list[Line]) -> list[Line]:
    """Of the epoch under way, what was fetched and not trained on."""
    begun = max(i for i, words in enumerate(before) if words[:2] == [NOTE, "epoch"])
    fetched = [words for words in before[begun:] if words[:2] == [NOTE, "fetched"]]
    return fetched[sum(words[0] == "batch" for words in before[begun:]) :]


def _tail(before: list[Line], after: list[Line]) -> Iterator[Line]:
    """What came behind the meeting, as one hears it that begins there."""
    keys = [words[1] for words in before if words[0] == "propose" and words[1].startswith("round")]
    rounds = max((int(key.split("/")[1]) for key in keys), default=0)
    tokens = _tokens(before)
    for words in _with_all_of_chance(before, after):
        if words[0] in ("propose", "decided") and words[1].startswith("round"):
            name, number, *rest = words[1].split("/")
            words = [words[0], "/".join([name, str(int(number) - rounds), *rest]), *words[2:]]
        if words[:2] == ["take", TOKEN] and tokens:
            words = [*words[:2], [*tokens, *words[2]]]
            yield words
            yield from (["folded", *token[:2]] for token in tokens)
            tokens = []
        else:
            yield words


def _with_all_of_chance(before: list[Line], after: list[Line]) -> Iterator[Line]:
    """Where random generators are written down, those too that had not moved since the last time."""
    known: dict[str, str] = {}
    for words in (*before, *after):
        if words[0] == NOTE and isinstance(words[2], dict) and "chance" in words[2]:
            known |= words[2]["chance"]
            words[2]["chance"] = dict(known)
    yield from after


def _tokens(before: list[Line]) -> list[Line]:
    """Tokens for what comes behind the meeting, that had come by then: who begins there gets them at its first look."""
    found: dict[int, Line] = {}
    for words in before:
        if words[0] == "post" and words[2] == LAST and words[-1]:
            found.pop(words[1], None)
        if words[:2] == ["take", TOKEN]:
            found |= {letter[0]: letter for letter in words[2]}
    return list(found.values())


def _served(through: list[Any], met: int, resumed: list[Any], head: list[Line]) -> list[Line]:
    """What reached the service: what its own member told it at the beginning, then what came when all was shown."""
    me = resumed[0]["me"]
    told = sum(words[0] == "post" and words[1] == me and bool(words[-1]) for words in head)
    first = [line[2:] for line in resumed[1:] if line[1] == SERVED and line[3] == me][:told]  # others' copies may pass
    shown = [i for i, line in enumerate(through[:met]) if i and line[1] == SERVED and line[4] == SHOW]
    behind = through[shown[-1] + 1 :] if shown else []
    return first + [line[2:] for line in behind if line[1] == SERVED]
