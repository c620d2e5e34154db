"""The law over an interruption: every position of the epoch is completed exactly once, by any members."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from lightning_async.data.ledger import Audit, audit
from lightning_async.data.opening import usable
from lightning_async.data.order import Order
from lightning_async.data.ranges import Range, each, joined
from lightning_async.data.resume import Interrupted, State, as_ranges, as_tensor, unite
from lightning_async.data.share import Balance, Share, make_share
from lightning_async.transport.virtual import VirtualCluster
from tests.data.epoch_bench import FakeBoard, Member, at_once, begin, crew, run


class Known:
    """Ranges that are done."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.ranges = list(ranges)

    def done(self) -> list[Range]:
        return self.ranges


def doubles(result: Audit) -> int:
    return sum(amount for _, amount in result.double)


def missing(result: Audit) -> int:
    return sum(amount for _, amount in result.missing)


def some_members(rng: random.Random, balance: Balance, world: int, **options: Any) -> tuple[FakeBoard, list[Member]]:
    """Members of which some are slow."""
    return crew(
        [rng.choice([0.05, 0.2, 1.0, 3.0]) for _ in range(world)],
        ahead=rng.choice([0, 1, 5]),
        latency=rng.choice([0.0, 0.01, 0.7]),
        beat=rng.choice([0.0, 0.5]),
        balance=balance,
        **options,
    )


def interrupted(
    rng: random.Random, balance: Balance, world: int, total: int, done: list[Range], **o: Any
) -> list[Range]:
    """What is done of the epoch when it is interrupted, at some time or other."""
    board, members = some_members(rng, balance, world, **o)
    begin(members, total, done=done)
    shares = run(board, members, until=rng.random() * 1.2 * total / 8 / sum(1 / m.seconds for m in members))
    return [*done, *(r for share in shares for r in share.done())]


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_claimed_positions_are_completed_exactly_once_over_interruptions(first: int) -> None:
    for seed in range(first, first + 15):
        rng = random.Random(seed)
        total, done = rng.randint(5, 900), list[Range]()
        for _ in range(rng.randint(1, 3)):
            done = interrupted(rng, "claim", rng.randint(1, 5), total, done)
            assert not audit([Known(done)], total).double, f"seed {seed}"
            if total - missing(audit([Known(done)], total)) > total - 5:
                break  # so few are left that some may come again
        world = rng.randint(1, 5)
        board, members = some_members(rng, "claim", world, batches=[rng.choice([1, 4, 8, 16]) for _ in range(world)])
        left = missing(audit([Known(done)], total))
        begin(members, total, done=done)
        result = audit([Known(done), *run(board, members)], total)
        assert not result.missing, f"seed {seed}: {result}"
        assert doubles(result) == 0 if left >= world or not left else doubles(result) <= left, f"seed {seed}: {result}"
        assert not left or all(m.trained for m in members), f"seed {seed}: a member had no batch"


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_equal_shares_go_on_too_and_repeat_only_what_pads_them(first: int) -> None:
    for seed in range(first, first + 15):
        rng = random.Random(seed)
        total, before, after = rng.randint(5, 900), rng.randint(1, 5), rng.randint(1, 5)
        total -= total % before  # nothing is padded before the interruption
        done = interrupted(rng, "equal", before, max(before, total), [])
        board, members = some_members(rng, "equal", after)
        begin(members, max(before, total), done=done)
        left = missing(audit([Known(done)], max(before, total)))
        shares = run(board, members)
        result = audit([Known(done), *shares], max(before, total))
        assert not result.missing, f"seed {seed}: {result}"
        assert len({len(m.trained) for m in members}) == 1, f"seed {seed}: not equal"
        assert sum(len(m.trained) for m in members) - left == (-left) % after, f"seed {seed}: {result}"


@pytest.mark.parametrize("balance", ["claim", "equal"])
@pytest.mark.parametrize("first", range(0, 40, 20))
def test_dropped_ends_are_dropped_once(balance: Balance, first: int) -> None:
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        before, after = rng.randint(1, 5), rng.randint(1, 5)
        total = rng.randint(8 * max(before, after), 900)
        done = interrupted(rng, balance, before, total, [], drop_last=True)
        left = missing(audit([Known(done)], total))
        board, members = some_members(rng, balance, after, drop_last=True)
        begin(members, total, done=done)
        result = audit([Known(done), *run(board, members)], total)
        assert all(len(m.trained) % 8 == 0 for m in members)
        assert missing(result) < (8 if balance == "claim" else 8 * max(before, after)), f"seed {seed}: {result}"
        assert not left // 8 or all(m.trained for m in members), f"seed {seed}: a member had no batch"
        assert balance == "equal" or doubles(result) < 8 * after, f"seed {seed}: {result}"


@pytest.mark.parametrize("first", range(0, 30, 15))
def test_a_death_after_the_interruption_is_repeated_or_reported(first: int) -> None:
    for seed in range(first, first + 15):
        rng = random.Random(seed)
        total = rng.randint(100, 900)
        done = interrupted(rng, "claim", rng.randint(1, 5), total, [])
        board, members = some_members(rng, "claim", rng.randint(2, 5))
        board.beat = 0.0  # each death is known with its last word
        if missing(audit([Known(done)], total)) < 5:
            continue
        begin(members, total, done=done)
        dead = rng.randrange(len(members))
        shares = run(board, members, {dead: rng.random() * total / 8 / sum(1 / m.seconds for m in members)})
        result = audit([Known(done), *shares], total)
        assert not result.double, f"seed {seed}: {result}"
        survivors = [m.share for k, m in enumerate(members) if k != dead]
        assert {share.abandoned() for share in survivors} == {missing(result)}, f"seed {seed}: {result}"


def life(share: Share, begin: dict[str, Any], seconds: float, stop: Any) -> Generator[Any, None, list[Range]]:
    """A member on the virtual cluster, with one batch fetched ahead."""
    share.begin_epoch(0, **begin)
    queue = [(yield from share.next_batch(8))]
    while queue[0] is not None and not stop():
        queue.append((yield from share.next_batch(8)))
        yield seconds
        queue.pop(0)
        share.completed()
    return share.done()


def on_cluster(
    rng: random.Random,
    balance: Balance,
    world: int,
    begin: dict[str, Any],
    *,
    until: float = math.inf,
    dies: float = -1,
) -> list[Share]:
    """The shares of all members after a run with stragglers, until it is interrupted; the last member may die."""
    cluster = VirtualCluster(world, seed=rng.randrange(10**6))
    shares = [make_share(balance, carrier, batch=8) for carrier in cluster.carriers]
    speeds = [rng.choice([1.0, 1.0, 4.0]) for _ in shares]
    lives = [life(s, begin, seconds, lambda: cluster.time >= until) for s, seconds in zip(shares, speeds, strict=True)]
    if dies >= 0:
        cluster.kill(world - 1, at=dies)
    cluster.run(dict(enumerate(lives)))
    cluster.advance(60.0)
    return shares


@pytest.mark.parametrize("seed", range(30))
def test_law_holds_on_the_virtual_cluster(seed: int) -> None:
    rng = random.Random(seed)
    balance: Balance = "claim" if seed % 3 else "equal"
    total, before, after = 60 * rng.randint(2, 12), rng.randint(1, 5), rng.randint(1, 5)
    epoch = {"total": total, "digest": 3}
    shares = on_cluster(rng, balance, before, epoch, until=rng.random() * total / 8 / before)
    done = Known(r for share in shares for r in share.done())
    left = missing(audit([done], total))
    dies = rng.random() * left / 8 / after if balance == "claim" and after > 1 and seed % 2 else -1
    shares = on_cluster(rng, balance, after, {**epoch, "done": done.ranges}, dies=dies)
    result = audit([done, *shares], total)
    assert missing(result) <= (shares[0].abandoned() if dies >= 0 else 0), f"{result}"
    assert doubles(result) == (0 if balance == "claim" else -left % after), f"{result}"


def finished(share: Share, **begin: Any) -> list[int]:
    share.begin_epoch(0, **begin)
    found = []
    while (batch := at_once(share.next_batch(8))) is not None:
        found += batch
        share.completed()
    return found


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_what_is_left_out_is_no_part_of_what_a_member_has_done(balance: Balance) -> None:
    _, members = crew([1.0], balance=balance)
    found = finished(members[0].share, total=20, done=[(3, 4), (18, 2)])
    assert found == [*range(3), *range(7, 18)]
    assert members[0].share.done() == [(0, 3), (7, 11)]
    assert members[0].share.dry


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_an_epoch_of_which_all_is_done_is_over(balance: Balance) -> None:
    _, members = crew([1.0], balance=balance)
    assert finished(members[0].share, total=20, done=[(0, 20)]) == []
    assert members[0].share.dry


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_a_few_samples_come_again_until_each_member_has_a_batch(balance: Balance) -> None:
    board, members = crew([1.0] * 4, balance=balance)
    begin(members, 20, done=[(0, 18)])
    run(board, members)
    assert sorted(p for m in members for p in m.trained) == [18, 18, 19, 19]
    assert all(m.trained for m in members)


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_members_with_other_ideas_of_what_is_done_are_refused(balance: Balance) -> None:
    _, members = crew([1.0, 1.0], balance=balance)
    members[0].share.begin_epoch(0, total=40, done=[(0, 8)])
    members[1].share.begin_epoch(0, total=40, done=[(0, 9)])
    at_once(members[0].share.next_batch(8))
    with pytest.raises(ValueError, match="disagree on the order of epoch 0"):
        at_once(members[1].share.next_batch(8))


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_the_same_done_in_other_ranges_is_no_other_idea(balance: Balance) -> None:
    _, members = crew([1.0, 1.0], balance=balance)
    members[0].share.begin_epoch(0, total=40, done=[(0, 8), (4, 6)])
    members[1].share.begin_epoch(0, total=40, done=[(8, 2), (0, 8)])
    assert all(at_once(m.share.next_batch(8)) for m in members)


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_the_limit_leaves_the_first_positions(balance: Balance) -> None:
    board, members = crew([1.0, 1.0], balance=balance)
    begin(members, 100, limit=48)
    assert audit(run(board, members), 48).holds
    begin(members, 100, 1, limit=48, done=[(0, 20), (60, 10)])
    assert audit([Known([(0, 20)]), *run(board, members)], 48).holds


@pytest.mark.parametrize("balance", ["claim", "equal"])
def test_of_two_limits_the_openers_counts(balance: Balance) -> None:
    board, members = crew([1.0, 1.0], balance=balance)
    members[1].share.begin_epoch(0, total=100, digest=7, limit=64)
    begin(members, 100, limit=32)
    assert audit(run(board, members), 64).holds


@pytest.mark.parametrize(
    ("left", "unit", "used"),
    [(0, 1, 0), (1, 1, 4), (4, 1, 4), (9, 1, 9), (7, 8, 0), (8, 8, 32), (39, 8, 32), (41, 8, 40)],
)
def test_every_member_has_a_batch_or_the_epoch_is_over(left: int, unit: int, used: int) -> None:
    assert usable(left, members=4, unit=unit) == used


def order(n: int = 20, epoch: int = 0) -> Order:
    return Order(SequentialSampler(range(n)), epoch=epoch)


def left(total: int, done: Any) -> int:
    return total - len(set(each(done)))


class Interruption:
    """A run of one member that is interrupted, and the next one."""

    def __init__(self, batches: int, epoch: int = 2) -> None:
        self.heard: list[str] = []
        self.share = crew([1.0])[1][0].share
        made = order(epoch=epoch)
        mine = Interrupted(self.heard.append)
        self.share.begin_epoch(epoch, total=20, done=mine.begin(made, left))
        for _ in range(batches):
            at_once(self.share.next_batch(8))
            self.share.completed()
        self.state = mine.state(self.share)
        self.next = Interrupted(self.heard.append)
        self.next.load(self.state)


def test_state_is_what_was_done_of_the_epoch() -> None:
    state = Interruption(2).state
    assert state["epoch"] == 2
    assert state["done"].tolist() == [[0, 16]]
    assert state["done"].dtype == torch.int64


def test_the_interrupted_epoch_goes_on_whatever_the_trainer_believes() -> None:
    for believed in (0, 1, 2):
        made = order(epoch=believed)
        assert Interruption(1).next.begin(made, left) == [(0, 8)]
        assert made.epoch == 2


def test_a_finished_epoch_is_followed_by_the_next_one() -> None:
    made = order(epoch=2)
    assert Interruption(3).next.begin(made, left) == []
    assert made.epoch == 3


def test_a_later_epoch_is_begun_from_its_beginning() -> None:
    made = order(epoch=3)
    assert Interruption(1).next.begin(made, left) == []
    assert made.epoch == 3


def test_only_one_epoch_goes_on() -> None:
    begun = Interruption(1).next
    begun.begin(order(epoch=2), left)
    assert begun.begin(order(epoch=2), left) == [(0, 8)]  # a new iterator over the same epoch
    assert begun.begin(order(epoch=3), left) == []


def test_another_order_begins_anew_with_a_sentence() -> None:
    case = Interruption(1)
    assert case.next.begin(order(30, epoch=2), left) == []
    assert "epoch 2 begins anew: its order is not the one of the checkpoint" in case.heard[0]


def test_a_second_interruption_knows_of_the_first() -> None:
    first = Interruption(1)
    share = crew([1.0])[1][0].share
    share.begin_epoch(2, total=20, done=first.next.begin(order(epoch=2), left))
    at_once(share.next_batch(8))
    share.completed()
    assert share.done() == [(8, 8)]
    assert as_ranges(first.next.state(share)["done"]) == [(0, 16)]


def state(epoch: int, *ranges: Range) -> State:
    return {"epoch": epoch, "done": as_tensor(ranges)}


def test_union_counts_what_several_tell_once() -> None:
    made = unite([state(1, (0, 8), (20, 4)), state(1, (0, 8), (8, 4)), state(0, (50, 4)), state(1)])
    assert made["epoch"] == 1
    assert made["done"].tolist() == [[0, 12], [20, 4]]


def test_state_is_tensors_and_numbers(tmp_path: Any) -> None:
    torch.save(Interruption(1).state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert joined(as_ranges(loaded["done"])) == [(0, 8)]
