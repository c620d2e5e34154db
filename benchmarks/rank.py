"""One rank's process: it imports a function, calls it, and leaves the result in the launcher's folder.

Standard input is the lifeline: it is open as long as the launcher lives, and when it closes this process ends at once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

FOLDER = "RANKS_FOLDER"


def say(word: str) -> None:
    """Tell the launcher something (one line), for example that training has begun."""
    with _file("words").open("a", encoding="utf-8") as words:
        words.write(f"{word}\n")


def main(what: str, arguments: str) -> int:
    """Call the function and write down what came of it."""
    threading.Thread(target=_end_with_launcher, name="lifeline", daemon=True).start()
    module, _, name = what.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        _write({"value": function(**json.loads(arguments))})
    except BaseException as error:  # whatever ends a rank is its result
        _write({"error": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
        return 1
    return 0


def _write(outcome: dict[str, Any]) -> None:
    text = json.dumps(outcome)
    partial = _file("partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(_file("json"))


def _file(kind: str) -> Path:
    return Path(os.environ[FOLDER], f"{os.environ['RANK']}.{kind}")


def _end_with_launcher() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock, held here, would abort the interpreter's own end
        pass
    os._exit(2)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
