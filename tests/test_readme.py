"""What the README says was measured, the page that it links to has measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"\| (?P<what>.+?) \| (?P<figure>.+?) \| \[\w+\]\((?P<page>docs/results/\w+\.md)\) \|")
NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?![\d]|\.\d)")


def rows() -> list[re.Match[str]]:
    measured = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Measured\n")[2].partition("\n## ")[0]
    lines = [line for line in measured.splitlines() if line.startswith("| ")][2:]
    found = [ROW.fullmatch(line) for line in lines]
    assert all(found), "a row of the table without a page"
    return [row for row in found if row]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["what"].replace(" ", "-"))
def test_each_figure_stands_on_its_page(row: re.Match[str]) -> None:
    """To the digits that the README gives it."""
    on_page = [float(number) for number in NUMBER.findall((ROOT / row["page"]).read_text(encoding="utf-8"))]
    for figure in NUMBER.findall(row["figure"]):
        digits = len(figure.partition(".")[2])
        assert any(f"{number:.{digits}f}" == figure for number in on_page), f"{figure} is not in {row['page']}"
