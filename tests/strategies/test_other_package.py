"""What docs/troubleshooting.md says of classes of `pytorch_lightning` beside ours is what a user sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning_utilities.core import rank_zero

from lightning_async import GossipRingStrategy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
LOG = rank_zero.log
OTHER: Any = pytest.importorskip("pytorch_lightning")
rank_zero.log = LOG  # which the import turns to that package's, for all that this process does from then on
QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}


def plain(text: str) -> str:
    """Without what differs from run to run, and without line breaks."""
    return re.sub(r"0x[0-9a-f]+", "0x", "".join(text.split()))


def told(beginning: str) -> list[str]:
    """The sentences on the page that begin so, up to where they break off."""
    blocks = [block for block in PAGE.read_text(encoding="utf-8").split("\n\n") if block.startswith("    ")]
    return [plain(block).removesuffix("...") for block in blocks if plain(block).startswith(plain(beginning))]


def test_our_class_in_the_other_trainer() -> None:
    (sentence,) = told("ValueError: You selected an invalid strategy name: `strategy=<lightning_async")
    with pytest.raises(ValueError) as refused:
        OTHER.Trainer(strategy=GossipRingStrategy(), **QUIET)
    assert plain(f"ValueError: {refused.value}").startswith(sentence)


def test_our_name_in_the_other_trainer() -> None:
    sentence, *_ = told("ValueError: You selected an invalid strategy name: `strategy='gossip_ring'`")
    with pytest.raises(ValueError) as refused:
        OTHER.Trainer(strategy="gossip_ring", **QUIET)
    assert (
        plain(f"ValueError: {refused.value}").replace("pytorch_lightning.", "lightning.pytorch.").startswith(sentence)
    )


def test_the_other_module_in_our_trainer() -> None:
    (sentence,) = told("TypeError: `model` must be")
    other = type("Net", (OTHER.LightningModule,), {})()
    with pytest.raises(TypeError) as refused:
        L.Trainer(strategy=GossipRingStrategy(), **QUIET).fit(other)
    assert plain(f"TypeError: {refused.value}") == sentence
