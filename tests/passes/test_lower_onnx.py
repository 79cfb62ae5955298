"""Lowering to ONNX: what the file holds, along which axes, and that it computes what the model computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_models import make_sparse, randomise_norms, sparsify_by_hand
from torch import Tensor, nn

from sparsefx.passes.lower_onnx import lower_onnx
from sparsefx.passes.onnx_report import ExportedWeight, ExportReport
from sparsefx.sparse_parameter import remove_records


def by_source(report: ExportReport) -> dict[str, list[ExportedWeight]]:
    found: dict[str, list[ExportedWeight]] = {}
    for weight in report.initializers:
        found.setdefault(weight.source, []).append(weight)
    return found


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, groups, a transposed one, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False)
        self.grouped_norm = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc = nn.Linear(16, 8)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(image)))
        x = x + torch.relu(self.grouped_norm(self.grouped(x)))
        x = self.depthwise(torch.relu(self.up_norm(self.up(x))))
        return self.fc(x.mean((2, 3)))


def test_conv_net_keeps_two_of_four_through_batch_norm_folding(tmp_path: Path) -> None:
    model = randomise_norms(ConvNet())
    make_sparse(model.grouped)
    make_sparse(model.up, axis=0)
    make_sparse(model.fc)
    report = lower_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", dynamic_shapes={"image": {0: "batch"}})
    rows = by_source(report)
    assert [(rows[n][0].op, rows[n][0].axis, rows[n][0].pattern) for n in ("grouped.weight", "up.weight", "fc.weight")] == [
        ("Conv", 1, "2:4"),
        ("ConvTranspose", 0, "2:4"),
        ("Gemm", 1, "2:4"),
    ]
    assert rows["first.weight"][0].pattern == ""
    assert rows["first.weight"][0].tensor_core_reason == "3 values along axis 1 are not a multiple of 4"
    assert "with 2 groups" in rows["grouped.weight"][0].tensor_core_reason
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert 0 < report.largest_relative_error < 1e-5
    assert report.samples == 4
    assert any("another dynamic size (float32[3, 3, 8, 8])" in check for check in report.checks)
    assert set(tensors_of(tmp_path / "m.onnx")) >= {name for name, _ in model.named_parameters() if "norm" not in name}


def test_linear_on_three_axes_is_named_and_lies_along_the_reduction_axis(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Net()
    names = sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 5, 32), tmp_path / "m.onnx")
    assert [(w.name, w.source, w.op, w.axis, w.shape, w.pattern) for w in report.initializers] == [
        ("a.weight", "a.weight", "MatMul", 0, (32, 64), "2:4"),
        ("b.weight", "b.weight", "MatMul", 0, (64, 16), "2:4"),
    ]
    assert names == ["a.weight", "b.weight"]
    stored = tensors_of(tmp_path / "m.onnx")
    np.testing.assert_array_equal(stored["a.weight"], model.a.weight.detach().numpy().T)
    tensor = next(t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.name == "b.weight")
    assert {entry.key: entry.value for entry in tensor.metadata_props} == {
        "sparsefx.source": "b.weight",
        "sparsefx.axis": "0",
        "sparsefx.pattern": "2:4",
        "sparsefx.density": "0.500000",
    }


def test_a_parameter_read_both_ways_keeps_both_orientations(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.w) + x @ self.w

    model = Net()
    make_sparse(model, "w")
    report = lower_onnx(model, torch.randn(2, 3, 16), tmp_path / "m.onnx")
    assert {(w.name, w.pattern) for w in report.initializers} == {("w.transposed", "2:4"), ("w", "")}
    assert any("1 further use sums over the other axis" in check for check in report.checks)


def test_shared_layer_and_tied_weights_are_stored_once_and_verified(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))

    model = Net()
    make_sparse(model.a)
    report = lower_onnx(model, torch.randn(3, 64), tmp_path / "m.onnx")
    assert len(report.initializers) == 3
    assert {w.pattern for w in report.initializers} == {"2:4"}
    assert sum(array.shape == (64, 64) for array in tensors_of(tmp_path / "m.onnx").values()) == 1


def test_equal_small_weights_that_the_optimizer_merges_are_still_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].load_state_dict(model[0].state_dict())
    sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx")
    assert sum("2:4 in the file" in check for check in report.checks) == 2


def test_attention_parts_and_recurrent_weights(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.lstm = nn.LSTM(32, 16, batch_first=True)
            self.gru = nn.GRU(32, 16, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            y, _ = self.attention(x, memory, memory)
            return self.lstm(y)[0], {"both": self.gru(y)[0]}

    model = Net()
    make_sparse(model.attention, "in_proj_weight")
    for name in ("weight_ih_l0", "weight_hh_l0"):
        make_sparse(model.lstm, name)
        make_sparse(model.gru, name)
        make_sparse(model.gru, f"{name}_reverse")
    report = lower_onnx(model, (torch.randn(2, 4, 32), torch.randn(2, 6, 32)), tmp_path / "m.onnx")
    rows = by_source(report)
    assert [(w.name, w.pattern, w.op) for w in rows["attention.in_proj_weight"]] == [
        ("attention.in_proj_weight.1", "2:4", "MatMul"),
        ("attention.in_proj_weight.2", "2:4", "MatMul"),
    ]
    assert [(w.op, w.axis, w.pattern) for w in rows["lstm.weight_ih_l0"]] == [("LSTM", 2, "2:4")]
    assert rows["gru.weight_hh_l0+gru.weight_hh_l0_reverse"][0].pattern == "2:4"
    assert "no sparse kernel" in rows["lstm.weight_hh_l0"][0].tensor_core_reason
    assert [output.name for output in report.outputs] == ["output.0", "output.1.both"]


def test_transformer_encoder_with_frozen_weights_avoids_the_fused_path(tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval().requires_grad_(False)
    names = sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 5, 32), tmp_path / "m.onnx")
    assert sum(w.pattern == "2:4" for w in report.initializers) == len(names) == 3
    assert torch.backends.mha.get_fastpath_enabled()


def test_resnet18_every_eligible_weight_is_two_of_four(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = randomise_norms(torchvision.models.resnet18()).to(memory_format=torch.channels_last)
    names = sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / "m.onnx", samples=2)
    rows = by_source(report)
    assert len(names) == 20
    assert all(rows[name][0].pattern == "2:4" for name in names)
    assert sum(not w.tensor_core_reason for w in report.initializers) == 20
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


def test_vision_transformer(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=8)
    names = sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 3, 32, 32), tmp_path / "m.onnx", samples=2)
    assert {w.source for w in report.initializers if w.pattern == "2:4"} == set(names)
    assert {w.name for w in report.initializers} == {w.source for w in report.initializers}


def test_bert_takes_keywords_and_names_its_sizes_and_outputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=32,
    )
    model = transformers.BertForSequenceClassification(config)
    names = sparsify_by_hand(model)
    sizes = {0: "batch", 1: "tokens"}
    inputs = {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    report = lower_onnx(
        model, inputs, tmp_path / "m.onnx", dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}, samples=2
    )
    assert {w.source for w in report.initializers if w.pattern == "2:4"} == set(names)
    assert [output.name for output in report.outputs] == ["logits"]
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [(i.name, [d.dim_param for d in i.type.tensor_type.shape.dim]) for i in graph.input] == [
        ("input_ids", ["batch", "tokens"]),
        ("attention_mask", ["batch", "tokens"]),
    ]
    assert any("int64[3, 13]" in check for check in report.checks)


def test_half_precision_within_its_looser_tolerance(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 16)).half()
    sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 16, 8, 8).half(), tmp_path / "m.onnx")
    assert report.tolerance == 2e-2
    assert [w.pattern for w in report.initializers] == ["2:4", "2:4"]


@pytest.mark.parametrize(
    ("pattern", "measured", "density"),
    [
        ("unstructured", "", 0.5),
        ("1:4", "2:4", 0.25),
        ("4:8", "4:8", 0.5),
        ("2:4-transposable", "2:4-transposable", 0.5),
        ("block:1x8", "", 0.5),
        ("channel", "", 0.5),
    ],
)
def test_other_patterns_are_verified_too(tmp_path: Path, pattern: str, measured: str, density: float) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    make_sparse(model[0], pattern=pattern)
    report = lower_onnx(model, torch.randn(2, 32), tmp_path / "m.onnx")
    assert any(check.startswith(f"0.weight: {pattern} in the file") for check in report.checks)
    assert (report.initializers[0].pattern, report.initializers[0].density) == (measured, pytest.approx(density))


def test_a_finalized_model_is_measured(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    make_sparse(model[0])
    remove_records(model[0])
    report = lower_onnx(model, torch.randn(2, 32), tmp_path / "m.onnx")
    assert [w.pattern for w in report.initializers] == ["2:4", ""]
    assert "1 weights without a record are 2:4 in the model, and so in the file along the reduction axis" in report.checks


def test_a_layer_that_eval_mode_does_not_read_is_said_to_be_left_out(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Any:
            return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)

    model = Net()
    sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx")
    assert "auxiliary.weight: not read in eval mode, so it is not in the file" in report.checks


def test_an_output_that_is_always_zero_is_said_to_prove_little(tmp_path: Path) -> None:
    model = nn.Linear(16, 8)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    report = lower_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx")
    assert report.checks[-1] == "output 'output' is zero or not finite on every sample, so that comparing it proves little"


def test_report_reads_as_a_table(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    sparsify_by_hand(model)
    text = str(lower_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx"))
    assert "0.weight  Gemm  1     8x16   2:4      0.500    eligible" in text
    assert "onnxruntime equals the model on random sample 2 (float32[2, 16])" in text
    assert "allowed 0.0001" in text


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_opset(tmp_path: Path, opset: int) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.GELU(), nn.Flatten(), nn.Linear(64, 8))
    report = lower_onnx(model, torch.randn(2, 16, 4, 4), tmp_path / "m.onnx", opset=opset)
    assert report.opset == opset
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import}[""] == opset


def test_same_model_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from torch import nn; from sparsefx.passes.lower_onnx import lower_onnx\n"
        "torch.set_num_threads(1); torch.manual_seed(0)\n"
        "layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n"
        "lower_onnx(nn.Sequential(layer, nn.Linear(16, 8)), torch.randn(2, 5, 16), sys.argv[1], dynamic_shapes=({0: 'batch'},))\n"
    )
    contents = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.onnx"
        subprocess.run(
            [sys.executable, "-c", script, str(path)],
            check=True,
            env={
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "OMP_NUM_THREADS": "1",
                "HOME": str(tmp_path),
            },
        )
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert str(Path.cwd()).encode() not in contents[0]


def test_one_value_that_is_clipped_twice_keeps_both_pairs_of_bounds(tmp_path: Path) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.low, self.high = (nn.Buffer(torch.tensor(bound)) for bound in (-0.1, 0.1))

        def forward(self, data: Tensor) -> Tensor:
            data = self.layer(data)
            near = torch.minimum(torch.maximum(data, self.low), self.high)
            far = torch.minimum(torch.maximum(data, 5 * self.low), 5 * self.high)
            return near + torch.tanh(far)

    report = lower_onnx(Clipped(), torch.randn(4, 16), tmp_path / "m.onnx")
    assert all(output.largest_absolute <= 1e-6 for output in report.outputs)
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node].count("Clip") == 2
