"""Real architectures, end to end through the public API: sparse at rest in every use, dense gradients, nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsefx
from tests.passes.test_real_models import CASES, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:this model was sparsified"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def _mask_rcnn() -> Case:
    """In training mode its outputs are losses, which all layers reach."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64
    )
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 10:40, 10:40] = 1
    target = {"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    return model, ([torch.rand(3, 64, 64)], [target]), {}


def _case(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, args, kwargs = _mask_rcnn() if name == "mask_rcnn" else CASES[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)  # heads that start at zero would hide what comes before them
    return model.train(name == "mask_rcnn"), args, kwargs


def _run(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _backward(model: nn.Module, args: Any, kwargs: Any) -> None:
    outputs = _run(model, args, kwargs)
    generator = torch.Generator().manual_seed(2)
    sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs if o.is_floating_point()).backward()  # type: ignore[union-attr]


NAMES = [*CASES, "mask_rcnn"]


@pytest.mark.parametrize("name", NAMES)
def test_every_use_is_sparse_and_every_participating_weight_counts(name: str) -> None:
    model, args, kwargs = _case(name)
    dense, keys = copy.deepcopy(model), list(model.state_dict())
    sparsefx.sparsify(model, example_inputs=(args, kwargs))
    assert list(model.state_dict()) == keys
    masks = sparsefx.masks(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    _backward(model, args, kwargs)  # to choose weights that no ReLU hides from the output
    with torch.no_grad():
        for key, mask in masks.items():
            dense.get_parameter(key).mul_(mask)
        for buffer_name, value in model.named_buffers():
            value.copy_(buffers[buffer_name])
        expected = _run(model, args, kwargs)
        assert _same(expected, _run(dense, args, kwargs))
        # A detector takes a second for each run: of its weights every fourth is tried, in all parts of it.
        for key in list(masks)[:: 4 if name == "mask_rcnn" else 1]:
            weight = model.get_parameter(key)
            assert weight.grad is not None
            place = (weight * weight.grad).abs().flatten().argmax()
            before = weight.flatten()[place].clone()
            weight.view(-1)[place] = 0
            for buffer_name, value in model.named_buffers():
                value.copy_(buffers[buffer_name])
            assert not _same(_run(model, args, kwargs), expected), key
            weight.view(-1)[place] = before


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_dense(name: str) -> None:
    model, args, kwargs = _case(name)
    sparsefx.sparsify(model, example_inputs=(args, kwargs))
    _backward(model, args, kwargs)
    without = [
        key
        for key, mask in sparsefx.masks(model).items()
        if not bool(model.get_parameter(key).grad[~mask].any())  # type: ignore[index]
    ]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_all_ones_masks_are_bit_exact(name: str) -> None:
    model, args, kwargs = _case(name)
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, pattern="unstructured", density=1.0, example_inputs=(args, kwargs))
    assert all(bool(mask.all()) for mask in sparsefx.masks(model).values())
    with torch.no_grad():
        assert _same(_run(model, args, kwargs), _run(dense, args, kwargs))
