"""Scenes: what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)

from tests.strategies.features.fits import Fitted, held_out, maker, samples
from tests.strategies.features.table import Scene, untried, works
from tests.strategies.lit import Lit

SECTION = "Logging"


class Own(Profiler):
    """Counts what it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def start(self, action_name: str) -> None:
        self.count += 1

    def stop(self, action_name: str) -> None:
        pass


def profilers(folder: Path) -> dict[str, Any]:
    def of(profiler: Any) -> Fitted:
        one = maker(profiler=profiler, max_epochs=1, default_root_dir=folder)
        one.fit(Lit(), samples(), held_out())
        return Fitted(
            text=one.profiler.summary(), kind=type(one.profiler).__name__, count=getattr(one.profiler, "count", 0)
        )

    kinds = {
        "simple": "simple",
        "advanced": "advanced",
        "pytorch": PyTorchProfiler(dirpath=folder, filename="trace"),
        "None": None,
        "own": Own(),
    }
    kinds |= {"to file": SimpleProfiler(folder, "simple"), "advanced to file": AdvancedProfiler(folder, "advanced")}
    found: dict[str, Any] = {name: of(profiler) for name, profiler in kinds.items()}
    return {**found, "files": sorted(p.name for p in folder.glob("*")), "pass": PassThroughProfiler.__name__}


PROFILERS = Scene(
    SECTION,
    profilers,
    [
        works("profiler", '"simple"', lambda a, b: all("run_training_batch" in one["simple"].text for one in (a, b))),
        works("profiler", '"advanced"', lambda a, b: all(one["advanced"].kind == "AdvancedProfiler" for one in (a, b))),
        works("profiler", '"pytorch"', lambda a, b: a["pytorch"].kind == "PyTorchProfiler"),
        works("profiler", "None", lambda a, b: a["None"].kind == "PassThroughProfiler"),
        works("PassThroughProfiler", "", lambda a, b: a["None"].kind == a["pass"]),
        works("PyTorchProfiler", "", lambda a, b: any(name.startswith("fit-trace") for name in a["files"])),
        works(
            "SimpleProfiler", "with `dirpath`", lambda a, b: {"fit-simple-0.txt", "fit-simple-1.txt"} <= {*a["files"]}
        ),
        works(
            "AdvancedProfiler",
            "with `dirpath`",
            lambda a, b: {"fit-advanced-0.txt", "fit-advanced-1.txt"} <= {*a["files"]},
        ),
        works("Profiler", "a class of the user's", lambda a, b: a["own"].count > 10),
        untried("XLAProfiler", "", "needs a TPU"),
    ],
    warnings=[".*"],
)


SCENES = [PROFILERS]
