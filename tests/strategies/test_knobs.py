"""Every knob of every strategy and callback refuses what it cannot be when it is made, by a sentence with its name."""

from __future__ import annotations

import inspect
import math
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import TorchCheckpointIO

import lightning_async
from lightning_async import AsyncStrategy, Incremental, callbacks

THING = object()
PROBES: dict[str, Any] = {
    "[]": [],
    "{}": {},
    "()": (),
    "set": set(),
    "object": THING,
    "class": int,
    "function": len,
    "bytes": b"x",
    "word": "nonsense",
    "number as text": "3",
    "empty": "",
    "-1": -1,
    "0": 0,
    "1": 1,
    "3": 3,
    "-0.5": -0.5,
    "0.5": 0.5,
    "1.5": 1.5,
    "40.0": 40.0,
    "nan": math.nan,
    "inf": math.inf,
    "complex": 1j,
    "True": True,
    "False": False,
    "None": None,
    "[1]": [1],
    "[1.5]": [1.5],
    "[True]": [True],
    "[word]": ["nonsense"],
    "[None]": [None],
    "tuple": (1, 2),
    "{0: 2}": {0: 2},
    "{word: 1}": {"nonsense": 1},
    "{0: word}": {0: "nonsense"},
    "{0: None}": {0: None},
    "{0: [[0, 2]]}": {0: [[0, 2]]},
    "{0: [1, 2]}": {0: [1, 2]},
    "tensor": torch.zeros(2),
    "no time": timedelta(0),
    "a minute": timedelta(minutes=1),
    "device": torch.device("cpu"),
    "[device]": [torch.device("cpu")],
    "environment": LightningEnvironment(),
    "accelerator": CPUAccelerator(),
    "io": TorchCheckpointIO(),
    "precision": Precision(),
    "Incremental": Incremental(),
}
"""Of every kind something, by its name in the tables below."""

COUNT = {"1", "3"}
COUNT_OR_0 = COUNT | {"0"}
PART = {"1", "0.5"}
ABOVE_0 = {"1", "3", "0.5", "1.5", "40.0"}
AT_LEAST_0 = ABOVE_0 | {"0"}
WORDS: set[str] = set()
"""Nothing but words that are none of the probes."""
TEXT = {"word", "number as text"}
OPTIONAL = {"None"}

SHARED: dict[str, set[str]] = {
    "at_meeting": WORDS,
    "balance": {"Incremental"} | OPTIONAL,
    "buffers": WORDS,
    "saves": WORDS,
    "meet_every": COUNT | OPTIONAL,
    "grace": AT_LEAST_0 | {"inf"},
    "interface": TEXT | OPTIONAL,
    "staging": OPTIONAL,
    "silence": ABOVE_0 - {"40.0"},
    "patience": {"3", "40.0", "inf"},
    "meeting_timeout": ABOVE_0 | {"inf"},
    "waiting_timeout": ABOVE_0 | {"inf"},
    "record": TEXT | OPTIONAL,
    "folder": TEXT | OPTIONAL,
    "inner_threads": COUNT | OPTIONAL,
    "inner": OPTIONAL,
    "inner_size": COUNT | OPTIONAL,
    "start_method": WORDS,
    "timeout": {"a minute"} | OPTIONAL,  # as Lightning takes it
    "process_group_backend": OPTIONAL,
    "accelerator": {"accelerator"} | OPTIONAL,
    "parallel_devices": {"[device]"} | OPTIONAL,
    "cluster_environment": {"environment"} | OPTIONAL,
    "checkpoint_io": {"io"} | OPTIONAL,
    "precision_plugin": {"precision"} | OPTIONAL,
    "by_rank": COUNT_OR_0,
    "shards": COUNT | OPTIONAL,
    "mirror_every": COUNT | OPTIONAL,
    "max_delay": COUNT | OPTIONAL,
    "wire": WORDS,
    "mode": WORDS,
    "block": WORDS,  # multiples of 8
    "min_size": COUNT_OR_0,
}
"""Which probes a knob of this name may be."""

OWN: dict[str, dict[str, set[str]]] = {
    "AdaptiveShrink": {
        "law": WORDS,
        "beta": PART,
        "rate": AT_LEAST_0,
        "power": AT_LEAST_0,
        "knee": AT_LEAST_0,
        "healthy": COUNT_OR_0 | OPTIONAL,
    },
    "AsyncGlobalStrategy": {
        "local_steps": COUNT,
        "pace": COUNT,
        "attenuation": WORDS,
        "strength": AT_LEAST_0 | OPTIONAL,
        "on_late": WORDS,
        "accuracy_weight": TEXT,  # the name of a metric
        "outer": OPTIONAL,
        "outer_lr": ABOVE_0,
        "outer_momentum": {"0", "0.5"},
    },
    "CyclicDelayStrategy": {
        "token": WORDS,
        "push": WORDS,
        "scale": WORDS,
        "strength": AT_LEAST_0 | OPTIONAL,
        "compensation": WORDS,
        "compensation_strength": AT_LEAST_0 | OPTIONAL,
        "max_accumulate": COUNT | OPTIONAL,
        "warm_up": COUNT_OR_0,
    },
    "DelayStats": {"k": ABOVE_0},
    "DelayedPipelineStrategy": {
        "stages": TEXT | OPTIONAL,
        "split": {"[]", "[1]"},  # [] for one stage
        "shrink": PART,
        "semantics": WORDS,
        "order": WORDS,
        "compensate": WORDS,
        "anneal": COUNT,
        "clip": WORDS,
        "replicas": COUNT,
        "baseline": WORDS,
    },
    "GossipRingStrategy": {
        "period": COUNT | OPTIONAL,
        "topology": WORDS,
        "mixing": {"0.5"} | OPTIONAL,
    },
    "Incremental": {"parts": COUNT, "partition": WORDS, "nominal": {"[1]", "[1.5]", "tuple"}, "memory": PART},
    "LazySignStrategy": {
        "rule": WORDS,
        "compress": WORDS,
        "compressor": WORDS,
        "scale": WORDS,
        "stretch": {"1", "0.5", "1.5"} | OPTIONAL,
        "exact": {"[]", "()", "[word]"},
        "form": WORDS,
        "news": WORDS,
        "history": COUNT,
        "history_weights": {"[1]", "[1.5]"} | OPTIONAL,
        "threshold": AT_LEAST_0,
        "error_weight": AT_LEAST_0,
        "max_skip": COUNT_OR_0,
        "deadline": AT_LEAST_0 | OPTIONAL,
        "ahead": COUNT_OR_0,
        "warm_up": COUNT_OR_0,
        "threads": COUNT,
    },
    "SignGradients": {"first": {"3"}},
    "SpeedFaults": {
        "step_seconds": AT_LEAST_0,
        "slow": {"{}", "{0: 2}"} | OPTIONAL,
        "schedule": {"{}", "{0: [[0, 2]]}"} | OPTIONAL,
        "repeat": COUNT | OPTIONAL,
        "stall": {"{}", "{0: [1, 2]}"} | OPTIONAL,
        "sigma": AT_LEAST_0,
        "freeze": {"{}", "{0: [1, 2]}"} | OPTIONAL,
        "fail": {"{}", "{0: 2}"} | OPTIONAL,
        "seed": COUNT_OR_0 | {"-1"},
        "hold_gil": {"True", "False"},
    },
    "SpreadStats": {"depth": COUNT_OR_0, "every": ABOVE_0 | {"inf"} | OPTIONAL},
    "TrafficStats": {},
}

WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("CyclicDelayStrategy", "strength"): {"scale": "delay"},
    ("CyclicDelayStrategy", "compensation_strength"): {"compensation": "lr"},
    ("CyclicDelayStrategy", "warm_up"): {"max_accumulate": 8},
    ("LazySignStrategy", "history_weights"): {"history": 1},
    ("SpeedFaults", "slow"): {"step_seconds": 0.02},
    ("SpeedFaults", "schedule"): {"step_seconds": 0.02},
    ("SpeedFaults", "sigma"): {"step_seconds": 0.02},
    ("SpeedFaults", "repeat"): {"step_seconds": 0.02, "schedule": {0: [(0, 2.0)]}},
}
"""What a knob has no meaning without."""


def classes() -> list[type]:
    found = [getattr(room, name) for room in (lightning_async, callbacks) for name in room.__all__]
    kinds = {c for c in found if isinstance(c, type) and issubclass(c, (AsyncStrategy, *KINDS)) and c != AsyncStrategy}
    return sorted(kinds, key=lambda c: c.__name__)


KINDS = (lightning_async.DelayedPipelineStrategy, callbacks.SignGradients.__mro__[1], Incremental)
"""Strategies that are no AsyncStrategy, callbacks, and the knobs of a knob."""
CASES = [(kind, knob) for kind in classes() for knob in inspect.signature(kind).parameters]
NAMES = [f"{kind.__name__}-{knob}" for kind, knob in CASES]


def allowed(kind: type, knob: str) -> set[str]:
    own = OWN[kind.__name__]
    return own[knob] if knob in own else SHARED[knob]


def make(kind: type, knob: str, probe: str, **others: Any) -> None:
    kind(**{knob: PROBES[probe], **WITH.get((kind.__name__, knob), {}), **others})


def not_refused(kind: type, knob: str, **others: Any) -> list[str]:
    """The probes that this knob cannot be, and that are not refused by a sentence with its name."""
    trouble = []
    for name in PROBES.keys() - allowed(kind, knob):
        try:
            make(kind, knob, name, **others)
        except Exception as error:
            expected = isinstance(error, (ValueError, TypeError, MisconfigurationException))
            if not expected or f"`{knob}`" not in str(error):
                trouble.append(f"{knob}: {name}: {type(error).__name__}: {error}")
        else:
            trouble.append(f"{knob}: {name}: taken")
    return trouble


@pytest.mark.parametrize(("kind", "knob"), CASES, ids=NAMES)
def test_what_a_knob_cannot_be(kind: type, knob: str) -> None:
    assert not_refused(kind, knob) == []


@pytest.mark.parametrize(("kind", "knob"), CASES, ids=NAMES)
def test_what_a_knob_may_be(kind: type, knob: str) -> None:
    for name in allowed(kind, knob):
        make(kind, knob, name)


VARIANTS = {
    "push_sum": (lightning_async.GossipRingStrategy, {"mode": "push_sum"}),
    "sync": (lightning_async.GossipRingStrategy, {"mode": "sync"}),
    "none": (lightning_async.GossipRingStrategy, {"mode": "none"}),
    "SGWU": (lightning_async.AsyncGlobalStrategy, {"mode": "sync"}),
    "gradient": (lightning_async.CyclicDelayStrategy, {"push": "gradient"}),
    "late signs": (lightning_async.LazySignStrategy, {"deadline": 0.1}),
    "numbers": (lightning_async.LazySignStrategy, {"compressor": "none"}),
}
"""The same knobs beside another one that chooses the algorithm."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_no_knob_can_be(variant: str) -> None:
    kind, others = VARIANTS[variant]
    knobs = inspect.signature(kind).parameters.keys() - others.keys()
    assert [word for knob in knobs for word in not_refused(kind, knob, **others)] == []


def test_all_are_asked() -> None:
    assert [kind.__name__ for kind in classes()] == sorted(OWN)
    known = {knob for kind, knob in CASES}
    assert known >= SHARED.keys()
    for kind in classes():
        assert inspect.signature(kind).parameters.keys() >= OWN[kind.__name__].keys()
