"""Each weight lives on one stage, an optimizer sees what lives here, and the parts are the whole again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_async.strategies.parts import Parts
from tests.strategies.piped import WIDTH, Piped

SPANS = [range(1), range(1, 3), range(3, 4)]


def _parts(index: int, module: Piped | None = None, **options: Any) -> Parts:
    module = module or Piped(**options)
    return Parts(module, list(module.net), SPANS, index)


def _all_saw(parts: list[Parts]) -> None:
    for part in (parts[0], parts[-1]):
        module = part.module
        x = module.norm(module.embed(torch.ones(2, WIDTH)))  # type: ignore[operator]
        part.saw_call(x, [module.norm], [])


def test_each_entry_of_the_state_is_answered_for_once() -> None:
    parts = [_parts(index) for index in range(3)]
    _all_saw(parts)
    names = [part.names() for part in parts]
    assert sorted(name for found in names for name in found) == sorted(parts[0].module.state_dict())
    assert {"embed.weight", "norm.weight", "norm.running_mean", "net.0.0.weight"} <= names[0]
    assert {"net.1.1.running_var", "net.2.0.bias"} <= names[1]
    assert {"head.weight", "net.3.1.weight"} <= names[2]


def test_buffers_are_their_modules_whoever_takes_their_place() -> None:
    """One that was replaced, or came late, is no other stage's, nor one of what is outside of the blocks."""
    parts = [_parts(index) for index in range(3)]
    _all_saw(parts)
    for part in parts:
        for block in (part.module.net[1], part.module.norm):
            block.register_buffer("late", torch.ones(2))
            block.running_mean = torch.zeros(WIDTH)
    names = [part.names() for part in parts]
    assert sorted(name for found in names for name in found) == sorted(parts[0].module.state_dict())
    assert {"norm.late", "norm.running_mean"} <= names[0]
    assert "net.1.late" in names[1]
    assert [("net.1.late" in part.all_buffers(), "norm.late" in part.all_buffers()) for part in parts] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_what_came_or_grew_on_another_rank_comes_home() -> None:
    part, other = _parts(1), Piped()
    other.net[2].register_buffer("late", torch.ones(2))
    other.norm.running_mean = torch.ones(3 * WIDTH)  # type: ignore[assignment]
    part.take_home(part.module.state_dict() | other.state_dict())
    assert part.module.net[2].late.tolist() == [1.0, 1.0]
    assert torch.equal(part.module.norm.running_mean, other.norm.running_mean)  # type: ignore[arg-type]


def test_weights_of_others_take_no_room_and_come_back() -> None:
    whole = Piped().state_dict()
    part = _parts(1)
    part.send_away()
    state = part.module.state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in whole.items()}
    away = part.module.net[0][0].weight  # type: ignore[index]
    assert away.untyped_storage().size() == away.element_size()
    assert torch.equal(state["net.1.0.weight"], whole["net.1.0.weight"])
    part.take_home(whole)
    assert all(torch.equal(value, whole[name]) for name, value in part.module.state_dict().items())
    assert all(p.is_contiguous() for p in part.module.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_optimizer_keeps_what_lives_here_and_takes_its_part_of_a_whole_state(optimizer: str) -> None:
    whole = Piped(optimizer=optimizer)
    full = whole.configure_optimizers()
    for p in whole.parameters():
        p.grad = torch.ones_like(p) * p.numel()
    full.step()
    state = full.state_dict()
    seen = 0
    for index in range(3):
        part = _parts(index, optimizer=optimizer)
        own = part.module.configure_optimizers()  # type: ignore[operator]
        part.keep_own([own])
        mine = [p for group in own.param_groups for p in group["params"]]
        assert {id(p) for p in mine} == {id(p) for p in part.own()}
        own.load_state_dict(part.own_state(own, state))
        number = {id(p): at for at, p in enumerate(p for group in part.numbering(own) for p in group)}
        for p in mine:
            key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
            assert torch.equal(own.state[p][key], state["state"][number[id(p)]][key])
            seen += 1
        assert [group["lr"] for group in own.param_groups] == [group["lr"] for group in full.param_groups]
    assert seen == len(list(whole.parameters())) + 6  # what is outside lies on both ends until the first batch


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_optimizer_that_knows_names_has_those_of_its_parameters_whoever_adds_more(index: int) -> None:
    part = _parts(index)
    tuned = set(part.module.net[0][0].parameters()) | set(part.module.net[2].parameters())  # type: ignore[index]
    named = list(part.module.named_parameters())
    known, new = ([(name, p) for name, p in named if (p in tuned) is late] for late in (False, True))
    optimizer = torch.optim.SGD(known, 0.1, momentum=0.9)  # type: ignore[arg-type]
    part.keep_own([optimizer])
    with part.whole_groups([optimizer]):
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in known]
        optimizer.add_param_group({"params": new})
    names = {id(p): name for name, p in named}
    params, found = _params_and_names(optimizer)
    assert found == [names[id(p)] for p in params]
    assert {id(p) for p in params} == {id(p) for p in part.own()}
    state = torch.optim.SGD([{"params": known}, {"params": new}], 0.1).state_dict()  # type: ignore[list-item]
    optimizer.load_state_dict(part.own_state(optimizer, state))
    assert _params_and_names(optimizer)[1] == found


def _params_and_names(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[str]]:
    params, names = ([x for group in optimizer.param_groups for x in group[key]] for key in ("params", "param_names"))
    return params, names


def test_the_first_batch_says_what_lies_before_the_call() -> None:
    first, last = _parts(0), _parts(2)
    for part, stays in ((first, "embed"), (last, "head")):
        optimizer = part.module.configure_optimizers()  # type: ignore[operator]
        part.keep_own([optimizer])
        module = part.module
        part.saw_call(module.norm(module.embed(torch.ones(2, WIDTH))), [], [optimizer])  # type: ignore[operator]
        kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in ("embed", "head"):
            inside = {id(p) for p in getattr(module, name).parameters()}
            assert inside <= kept if name == stays else not inside & kept


def test_gradients_that_would_be_lost() -> None:
    last = _parts(2)
    module = last.module
    x = module.embed(torch.ones(2, WIDTH))  # type: ignore[operator]
    last.saw_call(x, [], [])
    module.head(torch.ones(2, WIDTH)).sum().backward()  # type: ignore[operator]
    last.refuse_strays()
    x.sum().backward()
    with pytest.raises(MisconfigurationException, match=r"`embed\.weight` is used before the call"):
        last.refuse_strays()


def test_who_is_told_to_thaw_in_a_second_fit() -> None:
    """On the first stage a gradient that was not in the first batch may be of another stage too: that is no thaw."""
    first = _parts(0)
    module = first.module
    module.embed.requires_grad_(False)  # type: ignore[operator,union-attr]
    first.saw_call(module.embed(torch.ones(2, WIDTH)), [], [])  # type: ignore[operator]
    module.net[3](torch.ones(2, WIDTH)).sum().backward()  # type: ignore[index]
    with pytest.raises(MisconfigurationException, match=r"`net\.3\.1\.weight` is used before the call .*another"):
        first.refuse_strays()
    module.zero_grad()
    module.embed.requires_grad_()  # type: ignore[operator,union-attr]
    module.embed(torch.ones(2, WIDTH)).sum().backward()  # type: ignore[operator]
    with pytest.raises(MisconfigurationException, match=r"`embed\.weight` is trained before the call .*second `fit`"):
        first.refuse_strays()


def test_replicas_average_real_numbers() -> None:
    module = Piped()
    module.net[1].wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    for index in (0, 2):
        _parts(index, module).refuse_unreal()
    with pytest.raises(MisconfigurationException, match=r"`net\.1\.wave` is trained in torch\.complex64"):
        _parts(1, module).refuse_unreal()
    module.net[1].wave.requires_grad_(False)
    _parts(1, module).refuse_unreal()


def test_weights_in_two_places() -> None:
    tied = Piped()
    tied.net[3][1] = tied.net[1][1]
    with pytest.raises(
        MisconfigurationException, match=r"shared between stages 1 and 2: tied weights must live in one"
    ):
        _parts(0, tied)
    outside = Piped()
    outside.head = nn.Linear(WIDTH, WIDTH)
    outside.head.weight = outside.net[0][0].weight
    with pytest.raises(
        MisconfigurationException, match=r"`head\.weight` is shared between stage 0 and what is outside"
    ):
        _parts(0, outside)
    inside = Piped()
    inside.net[2][0].weight = inside.net[1][0].weight
    _parts(0, inside)  # both live in stage 1
