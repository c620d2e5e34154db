"""Every feature of Lightning does what docs/features.md says of it, and the page names them all.

The rows and the runs that show them are in `features/`; `features/table.py` says how they fit together.
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.strategies.features import others, others_more, page
from tests.strategies.features.table import Scene, Verdict
from tests.strategies.ranks import run

TESTS = Path(__file__).resolve().parents[1]
older = pytest.mark.skipif(
    Version(version("lightning")) < Version("2.6.6"), reason="an older Lightning has not all that the page names"
)
SECONDS = 60.0  # on a machine that is busy with other things; a hang would take for ever


def _seen(scene: Scene, folder: Path) -> Any:
    for message in scene.warnings:
        warnings.filterwarnings("ignore", message)
    return scene.run(folder)


@pytest.mark.few(0)
@pytest.mark.parametrize("scene", page.SCENES, ids=lambda scene: scene.name)
def test_each_row_is_true(scene: Scene, tmp_path: Path) -> None:
    first, second = run(2, _seen, scene, tmp_path, timeout=SECONDS)
    wrong = [row for row in scene.rows if row.holds is not None and not row.holds(first, second)]
    assert not wrong, "\n".join(f"{row.of} {row.value}: not `{row.verdict.value}`: {row.words}" for row in wrong)


@pytest.mark.few(0)
@pytest.mark.parametrize("name", others.NAMES)
def test_each_line_is_true_of_the_other_strategies(name: str, tmp_path: Path) -> None:
    first, second = run(2, others.fits, name, tmp_path, timeout=SECONDS)
    wrong = [line for line in others.LINES if not line.cells[name].holds(first, second)]
    assert not wrong, "\n".join(f"{line.of}: not `{line.cells[name]}`" for line in wrong)


@pytest.mark.few(0)
@pytest.mark.parametrize("way", others_more.WAYS)
def test_each_line_is_true_in_the_modes_of_the_other_strategies(way: str, tmp_path: Path) -> None:
    first, second = run(2, others_more.fits, way, tmp_path, timeout=SECONDS)
    wrong = [line for line in others_more.LINES if not line.cells[way].holds(first, second)]
    assert not wrong, "\n".join(f"{line.of} {line.value}: not `{line.cells[way]}`" for line in wrong)


@older
def test_nothing_that_lightning_has_is_missing() -> None:
    assert page.missing() == [], "a feature that no row names: say what becomes of it"


@older
def test_the_page_is_up_to_date() -> None:
    assert page.FILE.read_text(encoding="utf-8") == page.page(), f"renew it: {page.COMMAND}"


def test_each_row_has_one_witness() -> None:
    for _, row in page.rows():
        witnesses = [row.holds is not None, bool(row.shown), row.verdict is Verdict.UNTRIED]
        assert witnesses.count(True) == 1, row
        assert row.words or row.verdict is Verdict.WORKS, row
        assert not row.shown or _exists(row.shown), row


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    return bool(re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE))
