"""The public functions together, on small models of every kind of layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx

# These tests look at gradients of sparsified models; they do not train them.
pytestmark = pytest.mark.filterwarnings("ignore:this model was sparsified and is being trained")


class Functional(nn.Module):
    """Weights used without a layer module: F.linear on a bare parameter, a matmul, a tied pair, MultiheadAttention, LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Parameter(torch.randn(32, 32) / 6)
        self.matrix = nn.Parameter(torch.randn(32, 48) / 6)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.lstm = nn.LSTM(48, 32, batch_first=True)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.bare) @ self.matrix
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.lstm(x)[0]
        return self.second(functional.relu(self.first(x)))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.ConvTranspose2d(64, 32, 2, stride=2),
        nn.Dropout(0.3),
        nn.Conv2d(32, 24, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def build(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    if kind == "convolutions":
        return convolutions(), (torch.randn(4, 3, 8, 8),)
    if kind == "functional":
        return Functional(), (torch.randn(2, 5, 32),)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 6, 32),)


KINDS = ["convolutions", "functional", "transformer"]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_outputs_equal_the_untouched_class_with_masked_weights(kind: str, mode: str, with_inputs: bool) -> None:
    model, inputs = build(kind)
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, example_inputs=inputs if with_inputs else None)
    masks = sparsefx.masks(model)
    assert masks
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    for net in (model, dense):
        net.train(mode == "train")
    torch.manual_seed(1)
    expected = dense(*inputs)
    torch.manual_seed(1)
    assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_zeroing_a_participating_weight_changes_the_output(kind: str) -> None:
    model, inputs = build(kind)
    sparsefx.sparsify(model, example_inputs=inputs)
    model.eval()
    for name, _mask in sparsefx.masks(model).items():
        weight = model.get_parameter(name)
        with torch.no_grad():
            before = model(*inputs)
            keep = weight.clone()
            row = weight.abs().flatten().argmax()
            weight.view(-1)[row] = 0
            assert not torch.equal(model(*inputs), before), name
            weight.copy_(keep)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_program_and_module_agree_bit_for_bit(kind: str, mode: str) -> None:
    model, inputs = build(kind)
    sparsefx.sparsify(model, example_inputs=inputs)
    model.train(mode == "train")
    buffers = copy.deepcopy(dict(model.named_buffers()))
    program = sparsefx.graph(model)
    assert all(torch.equal(value, dict(model.named_buffers())[name]) for name, value in buffers.items())
    assert "sparsefx" in program.code or "masked" in str(program.graph)

    def run(net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        for name, value in buffers.items():
            dict(model.named_buffers())[name].copy_(value)
        torch.manual_seed(5)
        output = net(*inputs)
        output.square().sum().backward()
        return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = run(model)
    output, others = run(program)
    assert torch.equal(output, expected)
    assert gradients.keys() == others.keys()
    assert len(gradients) == len(list(model.parameters()))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


def test_all_kinds_of_layers_are_decided_with_reasons() -> None:
    model, inputs = build("convolutions")
    sparsefx.sparsify(model, example_inputs=inputs)
    report = {layer.name: layer for layer in sparsefx.audit(model).layers}
    assert list(report) == ["0", "3", "4", "5", "6", "8", "11"]
    assert {name for name, layer in report.items() if layer.sparse} == {"3", "4", "6", "8", "11"}
    assert "16" in report["0"].reason
    assert "3 " in report["0"].reason
    assert report["5"].reason
    assert report["6"].reduction_axis == 0
    assert report["8"].reduction_axis == 1
    assert all(layer.flops for layer in report.values())
    assert all(layer.density == 0.5 for layer in report.values() if layer.sparse)
    assert report["8"].flops == 2 * 4 * 24 * 32 * 16 * 16


def test_functional_uses_are_seen_with_inputs() -> None:
    model, inputs = build("functional")
    report = {layer.parameter: layer for layer in sparsefx.audit(model, example_inputs=inputs).layers}
    for name in ("bare", "matrix", "attention.in_proj_weight", "attention.out_proj.weight", "first.weight"):
        assert report[name].sparse, report[name].reason
    assert report["matrix"].reduction_axis == 0
    assert "second.weight" not in report or not report["second.weight"].sparse or report["second.weight"].call_sites
    lstm = report["lstm.weight_ih_l0"]
    assert lstm.sparse or lstm.reason


def test_unused_looking_weights_are_listed_without_inputs() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Parameter(torch.randn(32, 32))
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x @ self.hidden
            return self.layer(x)

    assert "hidden" in sparsefx.audit(Opaque()).unseen
    assert not sparsefx.audit(Opaque(), example_inputs=(torch.ones(2, 32),)).unseen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "8"}, {"8"}),
        ({"include": ["3", "8"]}, {"3", "8"}),
        ({"include": nn.Linear}, {"11"}),
        ({"exclude": nn.Conv2d}, {"6", "11"}),
        ({"include": lambda name, module: isinstance(module, nn.Conv2d) and module.groups > 1}, {"3", "4"}),
        ({"include": "[36]", "exclude": "6"}, {"3"}),
    ],
)
def test_include_and_exclude(options: dict[str, Any], expected: set[str]) -> None:
    model, _ = build("convolutions")
    sparsefx.sparsify(model, **options)
    assert {name.removesuffix(".weight") for name in sparsefx.masks(model)} == expected
    reasons = {layer.name: layer.reason for layer in sparsefx.audit(model).layers if not layer.sparse}
    assert all(reasons.values())


def test_finalize_leaves_ordinary_layers() -> None:
    model, inputs = build("transformer")
    plain = copy.deepcopy(model)
    sparsefx.sparsify(model, example_inputs=inputs)
    masks = sparsefx.masks(model)
    expected = model.eval()(*inputs)
    final = sparsefx.finalize(model)
    assert final is model
    assert torch.equal(model(*inputs), expected)
    assert not any("_sparsefx" in key for module in model.modules() for key in module.__dict__)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert len(ours._load_state_dict_post_hooks) == len(theirs._load_state_dict_post_hooks)
        assert len(ours._load_state_dict_pre_hooks) == len(theirs._load_state_dict_pre_hooks)
    assert not sparsefx.masks(model)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_all_ones_masks_change_nothing() -> None:
    model, inputs = build("convolutions")
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, pattern="unstructured", density=1.0, example_inputs=inputs)
    for net in (model, dense):
        torch.manual_seed(2)
        net(*inputs).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a.grad, b.grad), name


def test_global_threshold_is_one_over_all_layers() -> None:
    model, _inputs = build("convolutions")
    dense = copy.deepcopy(model)
    sparsefx.sparsify(model, pattern="unstructured:global", density=0.2)
    masks = sparsefx.masks(model)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * total)
    kept = torch.cat([dense.get_parameter(name).detach().abs()[mask] for name, mask in masks.items()])
    dropped = torch.cat([dense.get_parameter(name).detach().abs()[~mask] for name, mask in masks.items()])
    assert kept.min() >= dropped.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).to(dtype)
    sparsefx.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 32, dtype=dtype)).square().sum().backward()
        optimizer.step()
    for name, mask in sparsefx.masks(model).items():
        groups = mask.view(mask.shape[0], -1, 4).sum(-1)
        assert bool((groups == 2).all())
        assert not model.get_parameter(name)[~mask].any()


def test_autocast_runs_on_sparse_weights() -> None:
    model, inputs = build("transformer")
    sparsefx.sparsify(model, example_inputs=inputs)
    dense = copy.deepcopy(model)
    sparsefx.finalize(dense)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.eval()(*inputs), dense.eval()(*inputs))


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.compile, nn.DataParallel], ids=["Sequential", "compile", "DataParallel"])
def test_the_audit_of_a_wrapper_is_that_of_what_is_inside(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    sparsefx.sparsify(model, pattern="unstructured", density=0.1, exclude="2")
    assert sparsefx.audit(wrap(model)).to_json() == sparsefx.audit(model).to_json()


def test_the_audit_tells_of_a_layer_that_was_replaced() -> None:
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    model[2] = nn.Linear(32, 16)
    row = sparsefx.audit(model).layers[1]
    assert row.shape == (16, 32)
    assert not row.sparse
    assert "was replaced" in row.reason
