"""Scenes: plugins, and how processes come to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import (
    AsyncCheckpointIO,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    LayerSync,
    MixedPrecision,
    Precision,
    TorchCheckpointIO,
    TorchSyncBatchNorm,
)

from tests.strategies.features.fits import Fitted, alike, fit, heard
from tests.strategies.features.table import Row, Scene, Verdict, refused, shown, untried, works
from tests.strategies.stores import Elsewhere

SECTION = "Plugins"


class NoSync(LayerSync):
    """A layer synchronisation of the user's."""

    def apply(self, model: Any) -> Any:
        return model

    def revert(self, model: Any) -> Any:
        return model


def plugged(folder: Path) -> dict[str, Any]:
    def saves(name: str, io: Any) -> Fitted:
        saver = ModelCheckpoint(folder / name, filename="end")
        found = fit(callbacks=[saver], plugins=[io], enable_checkpointing=True, max_epochs=1)
        return Fitted(found, files=sorted(p.name for p in (folder / name).glob("*")))

    (folder / "objects").mkdir(exist_ok=True)
    store = Elsewhere(str(folder / "objects"))

    def dtype(plugin: Precision) -> Fitted:
        return fit(plugins=[plugin], max_epochs=1, look=lambda t, m: str(next(m.parameters()).dtype))

    return {
        "torch": saves("torch", TorchCheckpointIO()),
        "async": saves("async", AsyncCheckpointIO()),
        "own": Fitted(saves("own", store), objects=[Path(name).name for name in store.names()]),
        "double": dtype(DoublePrecision()),
        "half": dtype(HalfPrecision("bf16-true")),
        "mixed": dtype(MixedPrecision("bf16-mixed", "cpu")),
        "base": dtype(Precision()),
        "elastic": fit(plugins=[TorchElasticEnvironment()], max_epochs=1),
        "layers": heard(lambda: fit(plugins=[NoSync()])),
        "batchnorm": heard(lambda: fit(plugins=[TorchSyncBatchNorm()])),
        "fsdp": heard(lambda: fit(plugins=[FSDPPrecision("bf16-mixed")])),
    }


def _of(a: Any, b: Any, key: str, dtype: str) -> bool:
    return bool(alike(a[key], b[key]) and {*a[key].looked} == {f"torch.{dtype}"})


LAYERS = "`sync_batchnorm=True` waits for all ranks in every forward pass"
SHARDS = "`FSDPPrecision` belongs to another strategy, which cuts the weights into shards; use `precision=...` instead"
PLUGGED = Scene(
    SECTION,
    plugged,
    [
        works("TorchCheckpointIO", "", lambda a, b: a["torch"].files == ["end.ckpt", "end.ckpt.ranks"]),
        works("AsyncCheckpointIO", "", lambda a, b: alike(a["async"], b["async"]) and "end.ckpt" in a["async"].files),
        works(
            "CheckpointIO",
            "a class of the user's",
            lambda a, b: "end.ckpt" in a["own"].objects and sum(".rank" in name for name in a["own"].objects) == 2,
            "the files of the ranks go through it too",
        ),
        works("DoublePrecision", "", lambda a, b: _of(a, b, "double", "float64")),
        works("HalfPrecision", '"bf16-true"', lambda a, b: _of(a, b, "half", "bfloat16")),
        works("MixedPrecision", '"bf16-mixed"', lambda a, b: _of(a, b, "mixed", "float32")),
        works("Precision", "", lambda a, b: _of(a, b, "base", "float32")),
        works(
            "plugins",
            "a cluster environment",
            lambda a, b: alike(a["elastic"], b["elastic"]),
            "torchrun's; SLURM's signals [too](progress.md#checkpoints), [others](launching.md)",
        ),
        refused("LayerSync", "", LAYERS, key="layers"),
        refused("TorchSyncBatchNorm", "", LAYERS, key="batchnorm"),
        refused("FSDPPrecision", "", SHARDS, key="fsdp"),
    ],
    warnings=["Checkpoint directory", ".*AsyncCheckpointIO.*"],
)

FOREIGN = "belongs to another strategy, which cuts the weights into shards; use `precision=...` instead"
PLUGINS_TEST = "strategies/test_refusals.py::test_precision_plugins_of_other_strategies"
LAUNCHERS = "strategies/test_launchers.py"
ELSEWHERE: list[Row] = [
    shown("DeepSpeedPrecision", "", Verdict.REFUSED, f"`DeepSpeedPrecision` {FOREIGN}", PLUGINS_TEST),
    shown("XLAPrecision", "", Verdict.REFUSED, f"`XLAPrecision` {FOREIGN}", PLUGINS_TEST),
    shown(
        "TransformerEnginePrecision",
        "",
        Verdict.REFUSED,
        "`precision='transformer-engine'` combines its scales over all ranks at every step; use "
        "`precision='bf16-true'`, or 'bf16-mixed'",
        "strategies/test_refusals.py::test_precision_that_exchanges_scales",
    ),
    untried("XLACheckpointIO", "", "needs a TPU"),
    untried("BitsandbytesPrecision", "", "needs a GPU"),
    untried("accelerator", '"gpu", "mps", "tpu", "hpu"', "nothing but CPUs was there"),
    shown(
        "strategy",
        '"gossip_ring"',
        Verdict.WORKS,
        "processes started by Lightning",
        f"{LAUNCHERS}::test_popen_by_name_and_a_child_that_fails_is_named_by_rank_0",
    ),
    shown(
        "strategy",
        '"gossip_ring_fork"',
        Verdict.WORKS,
        "the caller's module holds the consensus afterwards",
        f"{LAUNCHERS}::test_fork_gives_the_caller_the_consensus",
    ),
    shown(
        "strategy",
        '"gossip_ring_spawn"',
        Verdict.WORKS,
        "the same",
        f"{LAUNCHERS}::test_spawn_gives_the_caller_the_consensus",
    ),
    shown("num_nodes", "2", Verdict.WORKS, "by torchrun", "strategies/test_nodes.py::test_two_nodes_by_torchrun"),
    shown(
        "compile",
        "a compiled module, or a layer of one",
        Verdict.WORKS,
        'tried with `backend="aot_eager"`, and a layer with `"inductor"`, the default, which needs a C++ compiler. Of '
        "`nn.Sequential` itself `layer.compile()` compiles nothing in torch 2.13. `self.log` in a compiled "
        "`training_step` fails in torch 2.13, whatever the strategy: log in `on_train_batch_end`",
        "strategies/test_features.py::test_torch_compile",
    ),
]

SCENES = [PLUGGED]
