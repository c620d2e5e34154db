"""The ready configs: in a wheel they lie inside the package, in a checkout (also an editable one) beside it."""

from __future__ import annotations

from pathlib import Path

GROUPS = ("strategies", "callbacks")
SUFFIX = ".yaml"


def names() -> list[str]:
    """All configs, as `group/name`."""
    return sorted(f"{group}/{file.stem}" for group in GROUPS for file in (_root() / group).glob(f"*{SUFFIX}"))


def read(name: str) -> str:
    """The text of one config; KeyError, with a sentence, for a name that is none."""
    wanted = name.removesuffix(SUFFIX)
    if wanted not in names():
        raise KeyError(f"there is no config {name!r}; there are: {', '.join(names())}")
    group, _, short = wanted.partition("/")
    return (_root() / group / f"{short}{SUFFIX}").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """A config's first paragraph, which says what it is for."""
    lines = [line.lstrip("# ") for line in read(name).splitlines()]
    return " ".join(lines[: lines.index("")])


def _root() -> Path:
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent
