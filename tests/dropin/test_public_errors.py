"""Malformed calls of all that is public: the exception is the one that a user expects, its text says what was wrong.

conv2d and its gradients have their table in test_bad_input.py, the other layers as functions in test_layer_errors.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import freezekit as fk
from freezekit.backends import current_backend
from freezekit.conversion import SWAPS
from tests.dropin import test_bad_input, test_layer_errors
from tests.dropin.public_calls import CALLS, Call


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))


@pytest.mark.parametrize("bad", CALLS, ids=str)
def test_public_functions(bad: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = model()
    before = fk.freeze_state(net)
    with pytest.raises(Exception) as caught:
        bad.call(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert type(caught.value) is bad.kind, repr(caught.value)
    missing = [text for text in bad.says if text not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"
    assert fk.freeze_state(net) == before
    assert not any(tmp_path.iterdir())
    assert current_backend() == "auto"


# What is public beside the package's own names, the operators and the layers.
ELSEWHERE = {
    "FreezeOut", "Guard", "UpdateNorm", "choices", "clear_choices", "conv2d_bias_grad", "conversion_report",
    "current_backend", "dump_choices", "fusion_report", "is_held", "load_choices", "load_freeze_state", "rewrap",
}  # fmt: skip


def test_all_that_is_public_is_among_them() -> None:
    layers = {kind.__name__ for kind in SWAPS.values()}
    convolutions = {"conv2d", "conv2d_dgrad", "conv2d_wgrad"}  # test_bad_input.py
    switch = {"enable", "disable", "enabled", "is_enabled"}  # without arguments; tests/enabled/test_switch.py
    assert {call.public for call in CALLS} == set(fk.__all__) - layers - switch - {"schedules"} | ELSEWHERE
    assert set(fk.functional.__all__) == set(test_layer_errors.ARGUMENTS) | convolutions | {"conv2d_bias_grad"}
    assert len(test_bad_input.TABLE) + len(test_bad_input.PUBLIC) >= 60
    assert len(CALLS) >= 60


CONV: list[dict[str, Any]] = [
    dict(in_channels=4, out_channels=6, kernel_size=3, groups=4),
    dict(in_channels=4, out_channels=6, kernel_size=3, groups=0),
    dict(in_channels=4, out_channels=6, kernel_size=3, padding_mode="mirror"),
    dict(in_channels=4, out_channels=6, kernel_size=-3),
    dict(in_channels="4", out_channels=6, kernel_size=3),
    dict(in_channels=4, out_channels=6),
]
BATCH_NORM: list[dict[str, Any]] = [{}, dict(num_features="a"), dict(num_features=-1), dict(num_features=2, epsilon=1)]
# Layer of torch.nn -> settings that its constructor refuses.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    **{f"Conv{d}d": CONV for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": [c for c in CONV if "padding_mode" not in c] for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": BATCH_NORM for d in (1, 2, 3)},
    "LayerNorm": [{}, dict(normalized_shape="a"), dict(normalized_shape=-1), dict(normalized_shape=4, gamma=1)],
    "GroupNorm": [{}, dict(num_groups=3, num_channels=4), dict(num_groups=2, num_channels="a")],
    "Hardtanh": [dict(min_val=1.0, max_val=-1.0), dict(min_val="a"), dict(low=1)],
    "Dropout": [dict(p=-0.1), dict(p=1.5), dict(p="a"), dict(rate=0.5)],
}


@pytest.mark.parametrize("stock", SWAPS, ids=lambda kind: kind.__name__)
def test_constructing_a_layer(stock: type[nn.Module]) -> None:
    """As the stock layer does, word by word; what it takes, its stand-in takes."""
    ours = SWAPS[stock]
    for settings in (*SETTINGS.get(stock.__name__, []), dict(nonsense=1)):
        with pytest.raises(Exception) as wanted:
            stock(**settings)
        with pytest.raises(Exception) as found:
            ours(**settings)
        assert type(found.value) is type(wanted.value), settings
        assert re.sub(r"\bFreezable", "", str(found.value)) == str(wanted.value), settings
