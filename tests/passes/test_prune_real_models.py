"""Channel pruning on models of the zoos, with biases and statistics that are not trivial."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@torch.no_grad()
def _damaged(model: nn.Module) -> nn.Module:
    """Half of all filters emptied; biases and statistics random."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif parameter.dim() >= 2 and "embed" not in name:
            parameter[torch.rand(parameter.shape[0]) < 0.5] = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
    return model.eval()


def _outputs(made: Any) -> Tensor:
    found: Tensor = made.logits if hasattr(made, "logits") else made
    return found


def _check(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], at_most: float) -> None:
    plan = sparsefx.channel_plan(model, (args, kwargs), multiple=1)
    small = sparsefx.apply_channel_plan(model, plan)
    with torch.no_grad():
        expected, made = _outputs(model(*args, **kwargs)), _outputs(small(*args, **kwargs))
        scale = expected.abs().max()
        assert float((made - expected).abs().max() / scale) <= 1e-5
    wide = copy.deepcopy(model).double()
    narrow = sparsefx.apply_channel_plan(wide, plan)
    args = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in args)
    with torch.no_grad():
        expected, made = _outputs(wide(*args, **kwargs)), _outputs(narrow(*args, **kwargs))
    assert float((made - expected).abs().max() / expected.abs().max()) <= 1e-10
    assert plan.report.parameters_after / plan.report.parameters <= at_most


@pytest.mark.parametrize(
    ("name", "at_most"),
    [
        ("resnet18", 0.55),
        ("mobilenet_v2", 0.5),
        ("shufflenet_v2_x0_5", 0.65),
        ("googlenet", 0.6),
    ],
)
def test_convolutional_networks(name: str, at_most: float) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    model = _damaged(getattr(torchvision.models, name)(num_classes=10, **options))
    _check(model, (torch.randn(2, 3, 64, 64),), {}, at_most)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_transformers(kind: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
    if kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **small))
    _damaged(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # One head (of a group of two) is not read any more.
            if name.endswith(("attention.output.dense.weight", "o_proj.weight")):
                parameter[:, : 8 if kind == "bert" else 16] = 0
    _check(model, (), {"input_ids": torch.randint(10, 99, (2, 7))}, 0.85)
    report = sparsefx.channel_plan(model, {"input_ids": torch.randint(10, 99, (2, 7))}, multiple=1).report
    heads = [row for row in report.layers if row.weight.endswith(("query.weight", "q_proj.weight"))]
    assert [row.outputs_after for row in heads] == [24, 24] if kind == "bert" else [16, 16]
