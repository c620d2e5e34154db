"""`python -m lightning_async.cli` is the `lightning-async` command, for those without its script on their path."""

from __future__ import annotations

import sys

from lightning_async.cli import main

if __name__ == "__main__":
    sys.exit(main())
