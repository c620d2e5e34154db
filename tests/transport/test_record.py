"""A recorded run, replayed: the same to the bit; and a replay that strays is caught at the event where it strays."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

from lightning_async.transport.log import Log
from lightning_async.transport.mail import Carrier, Message
from lightning_async.transport.record import RecordingCarrier
from lightning_async.transport.replay import Divergence, replay
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.stage import Stop
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.transport.worlds import KIND

N, STEPS = 4, 30


class Recorded(Carrier, Protocol):
    """A carrier that notes batches: the recording one and the replaying one."""

    def note_fetched(self, sample_ids: Iterable[Any]) -> None: ...
    def note_batch(self, loss: float | None = None) -> float | None: ...


def life(carrier: Recorded, steps: int = STEPS) -> Program:
    """A toy that uses all of the contract: SGD on own samples, gossip, tickets, notes, losses, and a meeting."""
    chance = torch.Generator().manual_seed(carrier.me)
    model = nn.Linear(3, 2)
    nn.init.normal_(model.weight, generator=chance)
    nn.init.zeros_(model.bias)
    lost = arrived = 0
    for step in range(1, steps + 1):
        yield 0.01 * (1 + carrier.me)
        carrier.draw("samples", 2)
        samples = [first + i for first, amount in carrier.drawn("samples") for i in range(amount)]
        carrier.note_fetched(samples)
        carrier.note_batch(len(samples))
        descend(model, torch.randn(4, 3, generator=chance), len(samples))
        carrier.at(step)
        for letter in carrier.take(KIND):
            assert letter.message.body is not None
            shift(model, letter.message.body, 0.1 / (1 + step - letter.message.echo))
            arrived += letter.seconds < 100
            carrier.folded(letter)
        others = [p for p in carrier.live() if p != carrier.me]
        for peer in others[:1] + others[-1:]:
            if carrier.free(peer, KIND):
                carrier.post(peer, Message(KIND, flat(model), step=step))
        carrier.publish(b"step %d" % step)
        lost += len(carrier.lost()) + 0 * len(carrier.notes())
    (mean,), members = yield from Rounds(carrier).exchange(flat(model), "mean")
    return flat(model).tolist(), mean.tolist(), members, lost, arrived


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def descend(model: nn.Module, x: Tensor, samples: int) -> None:
    model.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.sub_(p.grad, alpha=0.01 * (1 + samples))


def shift(model: nn.Module, weights: Tensor, factor: float) -> None:
    offset = 0
    with torch.no_grad():
        for p in model.parameters():
            p.lerp_(weights[offset : offset + p.numel()].view(p.shape), factor)
            offset += p.numel()


def record(
    faults: Callable[[VirtualCluster], None] = lambda cluster: None,
    program: Callable[[Any], Program] = life,
    n: int = N,
) -> tuple[dict[int, Any], dict[int, list[str]]]:
    """The results and the logs of a run."""
    cluster = VirtualCluster(n, bandwidth=1e6, latency=0.005, seed=7, silence=0.3, patience=1.0)
    faults(cluster)
    sinks = [io.StringIO() for _ in range(n)]
    carriers = [RecordingCarrier(c, sink, seed=7) for c, sink in zip(cluster.carriers, sinks, strict=True)]
    results = cluster.run({c.me: program(c) for c in carriers})
    for rank in results:
        carriers[rank].finish()
    return results, {rank: sink.getvalue().splitlines() for rank, sink in enumerate(sinks)}


def everybody(program: Callable[[Any], Program] = life, n: int = N) -> dict[int, Callable[[Any], Program]]:
    return dict.fromkeys(range(n), program)


# -- the law -----------------------------------------------------------------------------------------------------------


def test_a_replay_is_the_run_to_the_bit() -> None:
    results, logs = record()
    assert all(arrived > 5 for *_, arrived in results.values())
    assert replay(logs, everybody()) == results


def test_a_run_with_faults_is_replayed_too() -> None:
    def faults(cluster: VirtualCluster) -> None:
        cluster.freeze(0, 0.5, at=0.1)
        cluster.cut(1, 2, seconds=0.4, at=0.2)
        cluster.slow(3, 2.0, at=0.3)
        cluster.kill(2, at=0.55)

    results, logs = record(faults)
    assert sorted(results) == [0, 1, 3]
    assert sum(lost for *_, lost, _ in results.values()) > 0
    assert all(members == (0, 1, 3) for _, _, members, _, _ in results.values())
    assert replay(logs, everybody()) == results


def test_a_message_that_was_folded_and_lost_is_replayed_as_both() -> None:
    def program(carrier: Any) -> Program:
        if carrier.me == 0:
            carrier.post(1, Message(KIND, torch.ones(2)))
            while not (losses := carrier.lost()):
                yield "a loss"
            return [(x.number, x.message.echo, x.message.body.tolist()) for x in losses]
        while not (letters := carrier.take(KIND)):
            yield "a letter"
        yield 0.1
        carrier.folded(letters[0])
        yield 100.0
        return None

    results, logs = record(lambda cluster: cluster.cut(1, at=0.05), program, n=2)
    assert results == {0: [(1, 0, [1, 1])]}
    assert replay(logs, everybody(program, 2)) == results


# -- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_has_a_header_and_no_weights(tmp_path: Path) -> None:
    cluster = VirtualCluster(2)
    path = tmp_path / "member0.jsonl"
    with path.open("w") as sink:
        carrier = RecordingCarrier(cluster.carriers[0], sink, seed=5, about={"strategy": "toy"})
        carrier.post(1, Message(KIND, torch.full((1000,), 0.123)))
        carrier.post(1, Message(KIND, torch.full((1000,), 0.123)))
    header, *events = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {
        "schema": 4,
        "me": 0,
        "world": 2,
        "seed": 5,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "strategy": "toy",
    }
    assert events == [[1, "post", 1, KIND, 1000, True], [2, "post", 1, KIND, 1000, False]]


def test_polls_cost_no_lines() -> None:
    sink = io.StringIO()
    carrier = RecordingCarrier(VirtualCluster(2).carriers[0], sink)
    for _ in range(1000):
        carrier.take(KIND)
        carrier.live()
        carrier.decided("key")
    assert len(sink.getvalue().splitlines()) == 1


def test_samples_and_losses_can_be_read_from_the_log() -> None:
    def program(carrier: Any) -> Program:
        yield 0.1
        for batch in [[5, 6], [torch.tensor(7), "b", (8, 9)]]:
            carrier.note_fetched(batch)
        return carrier.epochs() if hasattr(carrier, "epochs") else None, [carrier.note_batch(0.5)]

    results, logs = record(program=program, n=1)
    assert results == {0: (None, [0.5])}
    assert replay(logs, {0: program}) == {0: ([[[5, 6], [7, "b", "(8, 9)"]]], [0.5])}
    assert Log(logs[0]).batches() == 1


def test_a_note_is_found_where_it_was_written_and_may_be_passed_over() -> None:
    def program(carrier: Any, asks: bool = True) -> Program:
        yield 0.1
        heard = []
        for step in range(4):
            carrier.at(step)
            heard.append(carrier.note("rate", step // 2, news=True) if asks else None)
        return heard

    results, logs = record(program=program, n=1)
    assert results == {0: [0, 0, 1, 1]}
    assert replay(logs, {0: program}) == {0: [0, None, 1, None]}
    assert replay(logs, {0: lambda carrier: program(carrier, asks=False)}) == {0: [None] * 4}


def test_notes_of_one_name_at_one_place_are_handed_out_in_their_order() -> None:
    def program(carrier: Any) -> Program:
        yield 0.1
        return [carrier.note("seed", seed) for seed in (3, 1, 2)]

    _, logs = record(program=program, n=1)

    def again(carrier: Any) -> Program:
        yield 0.1
        return [carrier.note("seed", None) for _ in range(4)]

    assert replay(logs, {0: again}) == {0: [3, 1, 2, None]}


def test_a_note_of_the_generators_has_the_states_of_all_though_others_were_passed_over() -> None:
    """What was written are the states of those that had moved since the note before."""
    written = [{"torch": "a", "numpy": "b"}, {"torch": "c"}, {"numpy": "d"}, {}]

    def program(carrier: Any, noted: tuple[int, ...] = (0, 1, 2, 3)) -> Program:
        yield 0.1
        heard = []
        for step, states in enumerate(written):
            carrier.at(step)
            heard.append(carrier.note("off", {"chance": states}) if step in noted else None)
        return heard

    _, logs = record(program=program, n=1)
    whole = {"chance": {"torch": "c", "numpy": "d"}}
    assert replay(logs, {0: lambda carrier: program(carrier, (0, 3))}) == {
        0: [{"chance": written[0]}, None, None, whole]
    }


def test_what_a_law_says_is_an_event_unless_nothing_is_shrunk() -> None:
    def program(carrier: Any) -> Program:
        yield 0.1
        factors = iter([1.0, 0.1 + 0.2, 1.0])
        heard = [carrier.note_factor(3, base, lambda: next(factors)) for base in range(3)]
        carrier.at(1)
        return heard

    results, logs = record(program=program, n=1)
    assert results == {0: [1.0, 0.1 + 0.2, 1.0]}
    lines = [json.loads(line) for line in logs[0][1:]]
    assert lines == [[2, "factor", 3, 1, 0.1 + 0.2], [4, "at", 1], [5, "finish"]]

    def again(carrier: Any, base: int = 1) -> Program:
        yield 0.1
        heard = [carrier.note_factor(3, at, lambda: 0.0) for at in (0, base, 2)]  # what is said now does not count
        carrier.at(1)
        return heard

    assert replay(logs, {0: again}) == results
    with pytest.raises(Divergence, match=r"the log has factor\(3, 1\), the replay factor\(3, 7\)"):
        replay(logs, {0: lambda carrier: again(carrier, 7)})


def test_epochs_are_parted_by_their_notes() -> None:
    def program(carrier: Any) -> Program:
        yield 0.1
        if hasattr(carrier, "epochs"):
            return carrier.epochs()
        for epoch, batches in enumerate([[[1], [2]], [], [[3]]]):
            carrier.note("epoch", {"epoch": epoch})
            for batch in batches:
                carrier.note_fetched(batch)
        return None

    _, logs = record(program=program, n=1)
    log = Log(logs[0])
    assert log.epochs() == [[[1], [2]], [], [[3]]]
    assert log.number_of_epochs() == 3
    assert log.first("epoch") == {"epoch": 0}
    assert log.first("nothing") is None


def test_an_epoch_without_a_batch_has_its_own_meetings() -> None:
    def program(carrier: Any) -> Program:
        yield 0.1
        told = []
        for epoch, batches in enumerate([1, 0, 2]):
            carrier.note("epoch", {"epoch": epoch})
            for _ in range(batches):
                carrier.note_batch()
            for _ in range(2):
                told.append(carrier.meets() if hasattr(carrier, "meets") else None)
                carrier.note_meeting()
            told.append(carrier.meets() if hasattr(carrier, "meets") else None)
        return told

    _, logs = record(program=program, n=1)
    assert replay(logs, {0: program}) == {0: [True, True, False] * 3}


def test_the_cut_last_line_of_a_killed_member_is_left_out() -> None:
    _, logs = record(lambda cluster: cluster.kill(2, at=0.35))
    whole = replay(logs, everybody())
    logs[2].append('[999,"post",1,16,')
    assert replay(logs, everybody()) == whole


def test_a_look_is_written_before_what_it_found_and_not_at_all_where_it_found_nothing() -> None:
    def program(carrier: Any) -> Program:
        if carrier.me == 0:
            yield 0.3
            carrier.post(1, Message(KIND, torch.ones(2)))
            return []
        found: list[float] = []
        while not found:
            yield 0.01
            for _ in carrier.attends():
                found += [x.message.body.sum().item() for x in carrier.take(KIND)]
        carrier.note_meeting()
        return found

    results, logs = record(program=program, n=2)
    assert results == {0: [], 1: [2.0]}
    assert [json.loads(line)[:3] for line in logs[1][1:4]] == [[0, "note", "attend"], [1, "take", KIND], [2, "meet"]]
    assert replay(logs, everybody(program, 2)) == results
    for end in (2, 3):  # killed in the look, and behind it
        assert replay({0: logs[0], 1: logs[1][:end]}, everybody(program, 2)) == {0: []}


# -- replays that stray -----------------------------------------------------------------------------------------------


def tamper(logs: dict[int, list[str]], member: int, name: str, change: Callable[[list[Any]], object]) -> int:
    """Change the tenth event of this name in a log; its index."""
    events = [json.loads(line) for line in logs[member]]
    index = [i for i, event in enumerate(events) if i and event[1] == name][9]
    change(events[index])
    logs[member] = [json.dumps(event) for event in events]
    return sum(event[1] != "note" for event in events[1:index])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("post", lambda e: e.__setitem__(4, 9), r"the log has post\(\d, 16, 9\), the replay post\(\d, 16, 8\)"),
        ("at", lambda e: e.__setitem__(2, 99), r"the log has at\(99\), the replay at\(10\)"),
        ("batch", lambda e: e.__setitem__(1, "step"), r"the log has step\(\), the replay batch\(\)"),
        ("folded", lambda e: e.__setitem__(3, 99), r"the log has folded\(\d, 99\), the replay folded\(\d, \d+\)"),
        ("draw", lambda e: e.__setitem__(0, e[0] + 1), r"as question \d+, the replay draw\('samples', 2\) as question"),
    ],
)
def test_a_tampered_log_is_caught_at_the_event(name: str, change: Callable[[list[Any]], object], words: str) -> None:
    _, logs = record()
    index = tamper(logs, 2, name, change)
    with pytest.raises(Divergence, match=rf"member 2 strays at event {index}: .*{words}"):
        replay(logs, everybody())


def test_a_taken_message_that_nobody_posted_is_named() -> None:
    _, logs = record()
    tamper(logs, 2, "take", lambda event: event[3].extend([event[3][0]] * 1000))
    with pytest.raises(Divergence, match=r"member 2 took message \d+ of kind \d+ of member \d.*no replay has posted"):
        replay(logs, everybody())


def test_a_program_that_does_less_or_more_is_caught() -> None:
    _, logs = record()
    with pytest.raises(
        Divergence, match=r"member \d strays at event \d+: the log has draw\('samples', 2\), the replay"
    ):
        replay(logs, everybody(lambda carrier: life(carrier, STEPS - 1)))
    with pytest.raises(Divergence, match=r"the replay draw\('samples', 2\)"):
        replay(logs, everybody(lambda carrier: life(carrier, STEPS + 1)))


def test_an_error_in_a_replayed_program_comes_through_and_ends_all() -> None:
    _, logs = record()

    def fails(carrier: Any) -> Program:
        yield from life(carrier, 3)
        raise AssertionError("unreachable")

    def dies(carrier: Any) -> Program:
        yield 0.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replay(logs, {**everybody(), 3: dies})


def test_an_error_ends_also_those_who_never_wait() -> None:
    _, logs = record()
    asked = []

    def asks(carrier: Any) -> Program:
        yield 0.0
        try:
            yield from life(carrier)
        finally:
            asked.append(carrier.me)
            with pytest.raises(Stop):
                carrier.now()

    def dies(carrier: Any) -> Program:
        yield 0.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replay(logs, {**everybody(asks), 3: dies})
    assert sorted(asked) == [0, 1, 2]


def test_what_is_no_log_is_refused() -> None:
    _, logs = record(program=lambda carrier: iter_once(), n=2)
    programs = everybody(lambda carrier: iter_once(), 2)
    with pytest.raises(ValueError, match="first line is no header"):
        replay({**logs, 1: []}, programs)
    with pytest.raises(ValueError, match="schema 9"):
        replay({**logs, 1: ['{"schema": 9}']}, programs)
    with pytest.raises(ValueError, match="its line 1 is no JSON"):
        replay({**logs, 1: ["hello"]}, programs)
    with pytest.raises(ValueError, match="its line 2 is no JSON"):
        replay({**logs, 1: [logs[1][0], "[1,", *logs[1][1:]]}, programs)
    with pytest.raises(ValueError, match="written by member 0"):
        replay({**logs, 1: logs[0]}, programs)
    with pytest.raises(ValueError, match="logs of members"):
        replay({0: logs[0]}, programs)


def test_other_threads_are_warned_of() -> None:
    _, logs = record(program=lambda carrier: iter_once(), n=1)
    logs[0][0] = logs[0][0].replace(f'"threads":{torch.get_num_threads()}', '"threads":77')
    with pytest.warns(UserWarning, match="77 torch threads"):
        replay(logs, everybody(lambda carrier: iter_once(), 1))


def iter_once() -> Program:
    yield 0.1
