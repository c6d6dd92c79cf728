"""Finds the clients' packages, which `make clients` puts beside the environment, and makes them work offline."""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Read when the packages are imported: nothing is fetched, and nothing is written to the user's folders.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / "freezekit-clients"))

_kept: list[torch.library.Library] = []  # a library takes its operators away when it is freed


@cache
def missing(client: str) -> str:
    """Why a client cannot be used; "" if it can.

    >>> missing("no_such_package")
    'no_such_package is not installed: run `make clients`'
    """
    for name in dict.fromkeys([client, "torchvision"]):  # most clients import torchvision
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: run `make clients`"
    _torchvision_without_its_binary()
    return ""


@cache
def _torchvision_without_its_binary() -> None:
    """Gives torchvision what its detectors need, where its binary belongs to another build of torch.

    The wheel on PyPI is for torch with CUDA. Beside a CPU build the rest of torchvision imports once its operators have
    a schema, and runs once non-maximum suppression has a function; its own Python code for RoI align is to be compiled
    at the first call, which would take longer than all else here.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    places = [Path(spec.origin).with_name(f"_C{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    # Loaded here ahead of torchvision, which takes a binary that cannot be loaded for none.
    if any(_loads(place) for place in places if place.exists()):
        return
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(operators)
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes.nms = _nms
    roi_align: Any = importlib.import_module("torchvision.ops.roi_align")
    roi_align._roi_align = roi_align._roi_align.__wrapped__


def _loads(binary: Path) -> bool:
    try:
        ctypes.CDLL(str(binary))
    except OSError:
        return False
    return True


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold, by falling score."""
    operators: Any = importlib.import_module("torchvision.ops")
    order = scores.argsort(descending=True, stable=True)
    overlaps = operators.box_iou(boxes[order], boxes[order]) > iou_threshold
    kept = torch.zeros(len(order), dtype=torch.bool)
    for i in range(len(order)):
        kept[i] = not (overlaps[i] & kept).any()
    return order[kept]
