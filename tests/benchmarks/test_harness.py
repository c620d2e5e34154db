"""The harness: tables that cannot lie by omission, turns that interleave, ranks that can be frozen and killed alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from benchmarks.__main__ import benchmarks, machine, main
from benchmarks.launch import Ranks
from benchmarks.repeat import repeat
from benchmarks.store import Held
from benchmarks.table import Claim, Role, Row, Table
from tests.benchmarks.jobs import counts_for_ever, counts_in_the_store, environment, fails_on_1, sends_for_ever
from tests.strategies.ranks import FORK

LIMIT = Row("sum of rates", Role.LIMIT, {"share": 1.0})
CONTROL = Row("alone", Role.CONTROL, {"share": 0.99, "messages": 0})
RESULT = Row("gossip", Role.RESULT, {"share": 0.975, "spread": float("nan")})


class TestTable:
    def test_aligns_and_marks_what_is_missing(self) -> None:
        table = Table("four ranks", [LIMIT, CONTROL, RESULT], claims=[Claim("share at least 0.95", True)])
        lines = table.text().splitlines()
        assert lines[2].split() == ["share", "messages", "spread"]
        assert lines[3].split() == ["sum", "of", "rates", "limit", "1.000", "-", "-"]
        assert len({line.index(role.value) for line, role in zip(lines[3:], list(Role)[:2], strict=False)}) == 1
        assert lines[-1] == "met      share at least 0.95"

    @pytest.mark.parametrize("missing", [LIMIT, CONTROL, RESULT])
    def test_refuses_to_stand_alone(self, missing: Row) -> None:
        with pytest.raises(ValueError, match=missing.role.value):
            Table("t", [row for row in (LIMIT, CONTROL, RESULT) if row is not missing])

    def test_a_missing_control_needs_a_reason(self) -> None:
        assert "no control: nothing is sent" in Table("t", [LIMIT, RESULT], no_control="nothing is sent").text()

    def test_a_broken_claim_shows(self) -> None:
        table = Table("t", [LIMIT, CONTROL, RESULT], claims=[Claim("a", True), Claim("b", False)])
        assert not table.met
        assert "NOT MET  b" in table.text()

    def test_json_has_no_nan(self) -> None:
        json.dumps(Table("t", [LIMIT, CONTROL, RESULT]).plain(), allow_nan=False)


class TestRepeat:
    def test_variants_take_turns(self) -> None:
        order: list[str] = []

        def variant(name: str) -> Any:
            return lambda: order.append(name) or {"x": 1.0}

        repeat({name: variant(name) for name in "abc"}, 3)
        assert "".join(order) == "abcbcacab"

    def test_ratios_are_made_per_turn(self) -> None:
        slow, fast = iter([1.0, 10.0, 100.0]), iter([2.0, 20.0, 300.0])
        turns = repeat({"slow": lambda: {"rate": next(slow)}, "fast": lambda: {"rate": next(fast)}}, 3)
        ratio = turns.ratio("fast", "slow", "rate")
        assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 3.0)
        assert turns.of("slow", "rate").median == 10.0

    def test_no_turns(self) -> None:
        with pytest.raises(ValueError, match="at least 1 turn"):
            repeat({"a": dict}, 0)


SAMPLE = '''"""A sample.\n\nMore."""
from benchmarks.table import Claim, Role, Row, Table
def run(quick):
    rows = [Row("a", role, {"share": 1.0}) for role in (Role.LIMIT, Role.CONTROL, Role.RESULT)]
    return Table("sample", rows, claims=[Claim("is quick", quick)])
'''


class TestCommand:
    def test_finds_benchmarks_without_importing_them(self, tmp_path: Path) -> None:
        (tmp_path / "one.py").write_text('"""One.\n\nMore."""\nraise SystemError\ndef run(quick): ...\n')
        (tmp_path / "no_benchmark.py").write_text('"""Two."""\ndef other(): ...\n')
        assert benchmarks(tmp_path) == {"one": "One."}

    def test_runs_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "sample_benchmark.py").write_text(SAMPLE)
        monkeypatch.setattr("benchmarks.__path__", [str(tmp_path)])
        monkeypatch.setattr("benchmarks.__main__.FOLDER", tmp_path)
        assert main(["sample_benchmark"]) == 1
        assert "NOT MET  is quick" in capsys.readouterr().out
        assert main(["sample_benchmark", "--quick", "--json", "out.json"]) == 0
        record = json.loads(Path("out.json").read_text())
        assert record["rows"][1] == {"name": "a", "role": "control", "cells": {"share": 1.0}}
        assert record["machine"] == machine()
        assert str(tmp_path) not in json.dumps(record)
        sys.modules.pop("benchmarks.sample_benchmark")

    def test_list_and_unknown_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--list"]) == 0
        with pytest.raises(SystemExit):
            main(["no_such_benchmark"])
        assert "no_such_benchmark" in capsys.readouterr().err


def test_a_held_port_is_given_to_nobody_and_a_store_may_listen_there() -> None:
    with closing(Held()) as held, ExitStack() as others:
        given = [others.enter_context(closing(Held())).port for _ in range(200)]
        assert held.port not in given
        assert len(set(given)) == 200
        server = TCPStore("127.0.0.1", held.port, is_master=True, wait_for_workers=False)
        assert TCPStore("127.0.0.1", held.port, is_master=False).add("visits", 1) == 1
        del server


class TestRanks:
    def test_every_rank_returns(self) -> None:
        with Ranks(environment, 3, arguments={"more": 7}) as ranks:
            assert ranks.values(timeout=30) == [{"rank": rank, "world": 3, "more": 7} for rank in range(3)]

    def test_one_failure_is_told_and_stays_one(self) -> None:
        with Ranks(fails_on_1, 2) as ranks:
            outcomes = ranks.outcomes(timeout=30)
            assert (outcomes[0].value, outcomes[1].error) == ("fine", "OSError: no more paper")
            with pytest.raises(RuntimeError, match=r"(?s)rank 1: OSError: no more paper.*Traceback"):
                ranks.values(timeout=1)

    def test_freeze_resume_kill(self) -> None:
        with Ranks(counts_for_ever, 2) as ranks:
            for rank in (0, 1):
                ranks.wait_for(rank, "begun", timeout=30)
            ranks.stop(1)
            ranks.wait_for(0, str(len(ranks.heard(0)) + 5), timeout=10)
            frozen = ranks.heard(1)
            ranks.wait_for(0, str(len(ranks.heard(0)) + 15), timeout=10)
            assert ranks.heard(1) == frozen
            ranks.resume(1)
            ranks.wait_for(1, str(len(frozen) + 3), timeout=10)
            ranks.kill(0)
            outcomes = ranks.outcomes(timeout=0.3)
            assert outcomes[0].error == "ended by SIGKILL, without a result"
            assert outcomes[1].error == "still running at the time limit, killed"

    @pytest.mark.few(0)
    def test_a_rank_is_struck_in_the_middle_of_a_message(self) -> None:
        with Ranks(sends_for_ever, 2) as ranks:
            for rank in (0, 1):
                ranks.wait_for(rank, "begun", timeout=60)
            ranks.strike(0, signal.SIGSTOP, timeout=10)
            assert ranks.heard(0)[-2:] == ["on its way", "midway"]
            ranks.resume(0)
            ranks.wait_for(0, str(sum(word == "on its way" for word in ranks.heard(0)) + 3), timeout=10)
            ranks.strike(0, signal.SIGKILL, timeout=10)
            assert ranks.heard(0)[-2:] == ["on its way", "midway"]
            with pytest.raises(TimeoutError, match=r"rank 1 sent no long message within 0\.1 s"):
                ranks.strike(1, signal.SIGSTOP, timeout=0.1)
            ranks.kill(1)
            assert ranks.outcomes(timeout=10)[0].error == "ended by SIGKILL, without a result"

    def test_waiting_is_bounded(self) -> None:
        with Ranks(counts_for_ever, 1) as ranks:
            with pytest.raises(TimeoutError, match="did not say 'never'"):
                ranks.wait_for(0, "never", timeout=0.1)
            ranks.kill(0)
            with pytest.raises(RuntimeError, match="ended before it said"):
                ranks.wait_for(0, "never", timeout=10)

    @pytest.mark.few(0)
    def test_the_store_outlives_rank_0(self) -> None:
        with Ranks(counts_in_the_store, 2, store=True) as ranks:
            for rank in (0, 1):
                ranks.wait_for(rank, "1", timeout=60)
            ranks.kill(0)
            ranks.wait_for(1, str(len(ranks.heard(1)) + 5), timeout=10)

    def test_ranks_end_with_their_launcher(self) -> None:
        mine, theirs = FORK.Pipe(duplex=False)
        with mine, theirs:
            launcher = FORK.Process(target=_launches, args=(theirs,))
            launcher.start()
            pid = mine.recv() if mine.poll(30) else None
            launcher.kill()
            launcher.join()
        assert pid is not None
        end = time.monotonic() + 10
        while _alive(pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not _alive(pid)
        (folder,) = Path(tempfile.gettempdir()).glob("ranks-*")
        shutil.rmtree(folder)  # its owner could not

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            Ranks(environment, 0)
        with pytest.raises(ValueError, match="cannot be imported"):
            Ranks(lambda: None, 1)


def _launches(out: Connection) -> None:
    with Ranks(counts_for_ever, 1) as ranks:
        ranks.wait_for(0, "begun", timeout=30)
        out.send(ranks._processes[0].pid)
        signal.pause()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
