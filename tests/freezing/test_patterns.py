"""What names, globs, types, instances and predicates select, and what is said when they select nothing."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import freezekit
from freezekit import guard
from freezekit.freezing import PatternError, freeze, unfreeze
from freezekit.freezing.patterns import select
from tests.freezing.cases import Tied


def named(value: Any) -> str:
    """A test's name that is the same in every process: a function's repr holds its address."""
    return getattr(value, "__qualname__", str(value))


def backbone() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 2, 1), bn=nn.BatchNorm2d(2), relu=nn.ReLU()))

    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(2, 2, 1), layer1=nn.Sequential(block(), block()), layer2=block(), head=nn.Linear(2, 2)
        )
    )


LAYER2 = ["layer2.conv.weight", "layer2.conv.bias", "layer2.bn.weight", "layer2.bn.bias"]


@pytest.mark.parametrize(
    ("pattern", "params", "norms"),
    [
        ("layer2", LAYER2, ["layer2.bn"]),
        ("layer2.*", LAYER2, ["layer2.bn"]),
        ("layer2.conv", LAYER2[:2], []),
        ("layer2.conv.weight", LAYER2[:1], []),
        ("head.b*", ["head.bias"], []),
        ("*.conv.bias", ["layer1.0.conv.bias", "layer1.1.conv.bias", "layer2.conv.bias"], []),
        (
            "layer1.[0]",
            [f"layer1.0.{n}" for n in ("conv.weight", "conv.bias", "bn.weight", "bn.bias")],
            ["layer1.0.bn"],
        ),
        (nn.Linear, ["head.weight", "head.bias"], []),
        (lambda name, param: param.ndim == 4 and "layer2" in name, LAYER2[:1], []),
    ],
    ids=named,
)
def test_selects(pattern: Any, params: list[str], norms: list[str]) -> None:
    found = select(backbone(), [pattern])
    assert list(found.params) == params
    assert list(found.norms) == norms


def test_a_type_selects_its_subclasses_and_what_is_inside() -> None:
    found = select(backbone(), [nn.BatchNorm2d])
    assert list(found.norms) == ["layer1.0.bn", "layer1.1.bn", "layer2.bn"]
    assert len(found.params) == 6
    assert select(backbone(), [nn.modules.batchnorm._BatchNorm]).norms.keys() == found.norms.keys()


def test_modules_and_parameters_are_found_by_identity() -> None:
    model = backbone()
    twin = nn.BatchNorm2d(2)  # equal in every value to each batch norm of the model
    assert list(select(model, [model.layer2.bn]).norms) == ["layer2.bn"]
    assert list(select(model, [model.head.bias]).params) == ["head.bias"]
    for stranger in (twin, twin.weight):
        with pytest.raises(PatternError, match="not part of the model"):
            select(model, [stranger])


def test_patterns_add_up_and_none_means_all() -> None:
    model = backbone()
    assert list(select(model, ["stem", "head.bias"]).params) == ["stem.weight", "stem.bias", "head.bias"]
    assert len(select(model, []).params) == len(list(model.parameters()))
    assert len(select(model, []).norms) == 3


def test_statistics_follow_the_layer_or_all_of_its_parameters() -> None:
    model = backbone()
    assert not select(model, ["layer2.bn.weight"]).norms
    assert list(select(model, ["layer2.bn.weight", "layer2.bn.bias"]).norms) == ["layer2.bn"]
    assert list(select(model, [lambda name, p: "layer2.bn" in name]).norms) == ["layer2.bn"]
    assert list(select(nn.Sequential(nn.BatchNorm1d(2, affine=False)), ["0"]).norms) == ["0"]


def test_an_exact_name_is_never_read_as_a_glob() -> None:
    model = nn.ParameterDict({"a[b]": nn.Parameter(torch.zeros(1)), "ab": nn.Parameter(torch.zeros(1))})
    assert list(select(model, ["a[b]"]).params) == ["a[b]"]


def test_tied_parameters_are_one_under_all_names() -> None:
    model = nn.Sequential(OrderedDict(net=Tied()))
    result = freeze(model, "net.back.weight")
    assert not model.net.there.weight.requires_grad
    assert result.params == ("net.there.weight", "net.back.weight")
    assert result.shared == (("net.there.weight", "net.back.weight"),)
    assert "net.there.weight = net.back.weight" in repr(result)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("layr2", r"'layr2' matches no module or parameter of Sequential; near names: 'layer2'"),
        ("layer2.con", r"near names: .*'layer2.conv'"),
        ("bn", r"near names: 'layer1.0.bn', 'layer1.1.bn', 'layer2.bn'"),
        ("layer9.*", r"near names: 'layer"),
        ("zzz", r"top-level names: 'stem', 'layer1', 'layer2', 'head'"),
        ("", r"'' matches no module"),
        ("layer2.relu", r"no parameter that can be trained and no running statistics"),
        (nn.Conv3d, r"no Conv3d .* it has BatchNorm2d, Conv2d, Linear, Sequential"),
        (nn.ReLU, r"no ReLU with parameters"),
        (lambda name, p: False, r"<lambda> selects none of the 16 parameters"),
    ],
    ids=named,
)
def test_nothing_matched_is_an_error_that_helps(pattern: Any, says: str) -> None:
    model = backbone()
    with pytest.raises(PatternError, match=says):
        freeze(model, "stem", pattern)
    assert all(p.requires_grad for p in model.parameters()), "a refused call must change nothing"


def test_wrong_types_are_named() -> None:
    for wrong in (3, int, None):
        with pytest.raises(TypeError, match="patterns must be"):
            freeze(backbone(), wrong)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        freeze([nn.Linear(1, 1)])
    with pytest.raises(PatternError, match="ReLU has no parameter"):
        freeze(nn.ReLU())


def test_integer_parameters_are_left_alone() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert list(select(model, []).params) == ["weight"]
    with pytest.raises(PatternError, match="'codes' has no parameter that can be trained"):
        select(model, ["codes"])


def test_an_exact_module_name_is_never_read_as_a_glob() -> None:
    model = nn.ModuleDict({"a[b]": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    assert list(select(model, ["a[b]"]).params) == ["a[b].weight", "a[b].bias"]


def two_deep() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    return nn.Sequential(OrderedDict(block=block, head=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))


IN_BLOCK = ["block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"]


def test_pairs_of_a_part_mean_its_parameters_and_modules_and_not_what_has_their_name_in_the_model() -> None:
    model = two_deep()
    assert list(select(model, [model.block.named_parameters()]).params) == IN_BLOCK
    assert list(select(model, list(model.block.named_parameters())).params) == IN_BLOCK
    assert list(select(model, [dict(model.block.named_parameters()).items()]).params) == IN_BLOCK
    assert list(select(model, [model.block.named_children()]).norms) == ["block.1"]
    assert list(select(model, [model.named_parameters(prefix="")]).params) == list(dict(model.named_parameters()))
    assert list(select(model, [model.block.named_modules()]).params) == IN_BLOCK
    compiled = nn.Sequential(OrderedDict(module=model))
    assert list(select(compiled, [model.block.named_parameters()]).params) == [f"module.{name}" for name in IN_BLOCK]
    with freeze(model, model.block.named_parameters(), norm="freeze") as frozen:
        unfreeze(model, model.block[1].named_parameters())
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == IN_BLOCK[:2]
    assert frozen.params == tuple(IN_BLOCK)
    with guard(model, torch.optim.SGD(model.parameters())) as held, held.allow(model.block.named_parameters()):
        pass
    freezekit.convert(model, only=model.block.named_children())
    assert type(model.block[0]) is freezekit.FreezableConv2d


def test_pairs_whose_name_is_something_else_too_are_refused_and_tuples_of_two_patterns_are_not_pairs() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(
        PatternError, match=r"^patterns: a pair of '0' and '1.0' may .* or '0' too;\npass the part, .*\.children\(\)"
    ):
        freeze(model, model[1].named_children())
    model.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(PatternError, match=r"'weight' and '0.weight' .*\npass the part's \.parameters\(\), without"):
        freeze(model, model[0].named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert list(select(model, [("0", model[1][1].weight)]).params) == ["0.weight", "0.bias", "1.1.weight"]
    assert list(select(model, [("0", model[1][1])]).params) == ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]
    with pytest.raises(PatternError, match=r"a Parameter of shape \(2, 2\) is not part of the model"):
        freeze(model, nn.Sequential(nn.Linear(2, 2)).named_parameters())


def test_a_predicate_that_gives_a_tensor_is_told_with_its_shape() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"must return True or False;\ngot a Tensor of shape \(3, 2\) for 'weight'$"):
        freeze(model, lambda name, param: param > 0)
    freeze(model, lambda name, param: param.max() < 9)
    assert not model.weight.requires_grad


@pytest.mark.parametrize("answer", ["no", 1, [], nn.Linear(1, 1), torch.tensor(1.0)], ids=type)
def test_a_predicate_that_gives_no_bool_is_named_with_its_answer(answer: Any) -> None:
    def backbone(name: str, param: nn.Parameter) -> Any:
        return answer

    model = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"predicate backbone must return True or False;\ngot .* for 'weight'$"):
        freeze(model, backbone)
    assert model.weight.requires_grad


def test_a_match_of_re_is_yes_and_none_is_no() -> None:
    model = nn.Linear(2, 3)
    freeze(model, lambda name, param: re.match("w", name))
    assert (model.weight.requires_grad, model.bias.requires_grad) == (False, True)


def test_bools_of_numpy_are_bools() -> None:
    model = nn.Linear(2, 3)
    freeze(model, lambda name, param: param.detach().numpy().max() > (-9 if name == "weight" else 9))
    assert (model.weight.requires_grad, model.bias.requires_grad) == (False, True)


@pytest.mark.parametrize("pattern", ["1.running_mean", "*.running_mean", "1.num_batches_tracked"])
def test_a_buffer_is_told_with_what_holds_it(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(PatternError, match=r"'1\.\w+' is a buffer of BatchNorm1d, .*; name '1', which holds its stat"):
        freeze(model, pattern)
    model[0].register_buffer("scale", torch.ones(1))
    with pytest.raises(PatternError, match="'0.scale' is a buffer of Linear, .*; no optimizer moves it"):
        freeze(model, "0.scale")


def test_pairs_of_a_tied_parameter_mean_it_under_any_of_its_names() -> None:
    model = nn.Sequential(OrderedDict(net=Tied()))
    assert list(select(model, [model.net.back.named_parameters()]).params) == ["net.there.weight", "net.back.bias"]
