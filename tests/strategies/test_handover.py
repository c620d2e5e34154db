"""The call is answered once, with one tensor; anything else is refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_async.strategies.compat import Leash
from lightning_async.strategies.handover import HandedOver, Handover
from tests.strategies.piped import WIDTH, Piped

X = torch.ones(2, WIDTH)


class Listed(Piped):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(self.net)  # type: ignore[assignment]

    def configure_stages(self) -> list[nn.Module]:
        return [self.embed, *self.net]


def _twice(x: Tensor) -> Tensor:
    return 2 * x


@pytest.fixture
def leash() -> Iterator[Leash]:
    found = Leash(None)  # type: ignore[arg-type]
    yield found
    found.restore()


def test_a_sequence_gives_what_it_is_told(leash: Leash) -> None:
    module = Piped()
    handover = Handover(module, "net")
    handover.take(leash)
    with handover.answering(_twice):
        assert torch.equal(module.net(X), 2 * X)
    leash.restore()
    assert module.net(X).shape == X.shape


def test_the_first_of_a_list_gives_it_and_the_others_pass_it_on(leash: Leash) -> None:
    module = Listed()
    handover = Handover(module, "net")
    handover.take(leash)
    x = X
    with handover.answering(_twice):
        for block in module.net:
            x = block(x)
    assert torch.equal(x, 2 * X)


def test_blocks_run_as_they_are_inside(leash: Leash) -> None:
    module = Listed().eval()
    with torch.no_grad():
        expected = X
        for block in module.net:
            expected = block(expected)
        handover = Handover(module, "net")
        handover.take(leash)
        with handover.answering(lambda x: handover.run(handover.blocks, x)):
            assert torch.equal(module.net[0](X), expected)
        alone = X
        for block in handover.as_they_are():
            alone = block(alone)
        assert torch.equal(alone, expected)


def test_a_method_may_name_the_blocks() -> None:
    module = Listed()
    assert Handover(module, None).blocks == [module.embed, *module.net]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (None, "say where the stages are"),
        ("nett", "`stages='nett'` names nothing in Piped; it has these sequences: 'net'"),
        ("head", "must name an `nn.Sequential` or an `nn.ModuleList`"),
    ],
)
def test_what_names_no_blocks(stages: str | None, sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        Handover(Piped(), stages)


@pytest.mark.parametrize(("blocks", "sentence"), [([], "must hold modules"), ([3], "must hold modules, got .'int'")])
def test_what_is_no_list_of_blocks(blocks: list[object], sentence: str) -> None:
    module = LightningModule()
    module.configure_stages = lambda: blocks
    with pytest.raises(MisconfigurationException, match=sentence):
        Handover(module, None)


def test_the_same_block_twice() -> None:
    module = Piped()
    module.net.append(module.net[0])
    with pytest.raises(MisconfigurationException, match="holds the same module twice"):
        Handover(module, "net")


def test_a_call_must_come_once(leash: Leash) -> None:
    module = Piped()
    handover = Handover(module, "net")
    handover.take(leash)
    with pytest.raises(MisconfigurationException, match="has not called `net`"), handover.answering(_twice):
        pass
    with pytest.raises(MisconfigurationException, match="calls `net` twice"), handover.answering(_twice):
        module.net(module.net(X))
    with pytest.raises(MisconfigurationException, match="was called outside of a step"):
        module.net(X)


@pytest.mark.parametrize("arguments", [(), (X, X), ([X],)])
def test_a_call_takes_one_tensor(leash: Leash, arguments: tuple[object, ...]) -> None:
    module = Piped()
    handover = Handover(module, "net")
    handover.take(leash)
    with pytest.raises(MisconfigurationException, match="must be called with one tensor"), handover.answering(_twice):
        module.net(*arguments)


def test_no_code_of_the_users_catches_the_end_of_its_step(leash: Leash) -> None:
    module = Piped()
    handover = Handover(module, "net")
    handover.take(leash)

    def end(x: Tensor) -> Tensor:
        raise HandedOver

    def step() -> None:
        with suppress(Exception):
            module.net(X)

    with pytest.raises(HandedOver), handover.answering(end):
        step()
