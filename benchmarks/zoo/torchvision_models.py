"""Every model that torchvision lists, with random weights, at small images where the architecture allows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.zoo.case import Call, Case


def torchvision_cases() -> list[Case]:
    """One case a model; quantizable ones in float, which is what is trained."""
    return [_case(name) for name in torchvision.models.list_models()]


def _case(name: str) -> Case:
    builder = torchvision.models.get_model_builder(name)
    kind = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection" and not name.startswith("ssd"):
        options.update(min_size=128, max_size=128)  # these resize their images, to 800 pixels if nobody says otherwise
    if kind == "detection":
        # Random scores are below the usual threshold, and a detector that detects nothing says nothing.
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
    if kind == "quantization":
        options["quantize"] = False
    if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        options["init_weights"] = False  # their own initialisation is slow
    size = _image_size(name)
    if name.startswith("vit_"):
        options["image_size"] = size

    def build() -> nn.Module:
        model: nn.Module = torchvision.models.get_model(name, **options)
        return model

    return Case("torchvision", name, _family(name, kind), build, *_calls(name, kind, size))


def _family(name: str, kind: str) -> str:
    if kind in ("segmentation", "detection", "optical_flow", "video"):
        return kind
    return re.sub(r"^quantized_", "", name).split("_")[0].rstrip("0123456789") or name


def _image_size(name: str) -> int:
    """The smallest square image that the architecture takes without changing it, or near it."""
    special = {
        "alexnet": 64,
        "inception_v3": 299,
        "quantized_inception_v3": 299,
        "maxvit_t": 224,
        "vit_h_14": 56,
        "ssd300_vgg16": 300,
        "ssdlite320_mobilenet_v3_large": 320,
        "raft_large": 128,
        "raft_small": 128,
    }
    return special.get(name, 64)


def _calls(name: str, kind: str, size: int) -> tuple[Callable[[], Call], Callable[[], Call] | None]:
    if kind == "detection":
        return lambda: (([torch.rand(3, size, size)],), {}), lambda: _detection_call(name, size)
    if kind == "optical_flow":
        return lambda: ((torch.rand(1, 3, size, size), torch.rand(1, 3, size, size)), {"num_flow_updates": 2}), None
    if kind == "video":
        frames, pixels = (16, 224) if name.startswith("mvit") or name == "s3d" else (16, 64)
        return lambda: ((torch.rand(2, 3, frames, pixels, pixels),), {}), None
    return lambda: ((torch.randn(2, 3, size, size),), {}), None


def _detection_call(name: str, size: int) -> Call:
    corner, end = size / 8, size * 5 / 8
    target = {"boxes": torch.tensor([[corner, corner, end, end]]), "labels": torch.tensor([1])}
    if name.startswith("maskrcnn"):
        mask = torch.zeros(1, size, size, dtype=torch.uint8)
        mask[:, size // 8 : size // 2, size // 8 : size // 2] = 1
        target["masks"] = mask
    if name.startswith("keypointrcnn"):
        points = torch.rand(1, 17, 3) * (end - corner) + corner
        points[..., 2] = 1
        target["keypoints"] = points
    # Two images: heads with batch norm over 1 x 1 maps need more than one value a channel.
    return ([torch.rand(3, size, size) for _ in range(2)], [dict(target) for _ in range(2)]), {}
