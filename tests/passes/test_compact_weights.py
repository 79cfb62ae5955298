"""The compact encoding: smaller, standard, bit-equal when run, and undone bit for bit."""

from __future__ import annotations

import errno
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import make_sparse, sparsify_by_hand
from torch import nn
from typer.testing import CliRunner

import sparsefx
from sparsefx.cli import app
from sparsefx.errors import ExportError, OptionError
from sparsefx.onnx_audit import audit_onnx
from sparsefx.onnx_files import compact_onnx, densify_onnx
from sparsefx.passes import onnx_write
from sparsefx.passes.compact_weights import compact, decode, densify, encode
from sparsefx.passes.lower_onnx import lower_onnx


class Net(nn.Module):
    """A convolution and linear layers on two and on three axes, so that groups lie along axis 1 and along axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 96, 3, padding=1)
        self.tokens = nn.Linear(96, 128)
        self.head = nn.Linear(128, 64)
        self.small = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.small(torch.relu(self.head(self.tokens(tokens).mean(1))))


LARGE = {"conv.weight", "tokens.weight", "head.weight"}


def both(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, torch.Tensor]:
    """The same sparse net exported plain and compact, and an input."""
    model = Net().eval()
    sparsify_by_hand(model)
    model, x = model.to(dtype), torch.randn(2, 64, 6, 6).to(dtype)
    lower_onnx(model, x, folder / "plain.onnx", samples=1)
    lower_onnx(model, x, folder / "compact.onnx", samples=1, weights="compact")
    return folder / "plain.onnx", folder / "compact.onnx", x


def run(path: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 17 / 32), (torch.float16, 9 / 16)])
def test_smaller_bit_equal_and_restored_to_the_plain_file(tmp_path: Path, dtype: torch.dtype, share: float) -> None:
    plain, packed, x = both(tmp_path, dtype)
    size, weights = torch.finfo(dtype).bits // 8, 64 * 96 * 9 + 96 * 128 + 128 * 64
    assert plain.stat().st_size - packed.stat().st_size > weights * size * (1 - share) - 5000
    onnx.checker.check_model(str(packed), full_check=True)
    assert run(plain, x).tobytes() == run(packed, x).tobytes()
    report = densify_onnx(packed)
    assert set(report.weights) == LARGE
    assert packed.read_bytes() == plain.read_bytes()


def test_runtimes_fold_the_decoders(tmp_path: Path) -> None:
    _, packed, _ = both(tmp_path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(packed), options, providers=["CPUExecutionProvider"])
    ops = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert ops.isdisjoint({"ScatterElements", "BitShift", "BitwiseAnd", "Expand"})


def test_only_standard_ops_and_metadata_travel(tmp_path: Path) -> None:
    _, packed, _ = both(tmp_path)
    model = onnx.load(packed)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    values = next(tensor for tensor in model.graph.initializer if tensor.name == "tokens.weight.values")
    assert {entry.key: entry.value for entry in values.metadata_props}["sparsefx.axis"] == "0"


def test_small_and_dense_weights_stay_plain(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 64), nn.Linear(64, 64))
    make_sparse(model[0])
    report = lower_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx", weights="compact")
    names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert {"0.weight", "1.weight", "2.weight"} <= names
    assert not any("compact" in check for check in report.checks)


def test_the_audit_measures_compact_weights_and_names_the_remedy(tmp_path: Path) -> None:
    plain, packed, _ = both(tmp_path)
    before = {weight.name: weight for weight in audit_onnx(plain)}
    for weight in audit_onnx(packed):
        assert (weight.pattern, weight.axis, weight.density) == (
            before[weight.name].pattern,
            before[weight.name].axis,
            before[weight.name].density,
        )
        assert weight.encoding == ("compact" if weight.name in LARGE else "plain")
        assert ("run sparsefx densify first" in weight.reason) is (weight.name in LARGE)
        parts = [t for t in onnx.load(packed).graph.initializer if t.name in (f"{weight.name}.values", f"{weight.name}.codes")]
        assert sum(len(part.raw_data) for part in parts) == (weight.bytes["compact"] if parts else 0)


def test_negative_zeros_of_weight_times_mask_do_not_stand_in_the_way(tmp_path: Path) -> None:
    model = nn.Linear(64, 128)
    with torch.no_grad():
        model.weight.mul_(torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16))
    assert bool((model.weight == 0).logical_and(torch.signbit(model.weight)).any())
    report = lower_onnx(model, torch.randn(2, 64), tmp_path / "m.onnx", weights="compact")
    assert "1 compact weights give back the plain ones bit for bit" in report.checks


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["float32", "float16", "float64", "int8", "bfloat16"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_every_bit_comes_back(dtype: str, before: int, groups: int, behind: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = generator.integers(-3, 4, size=(before, groups, 4, behind)).astype(kind)
    rank = generator.random(values.shape).argsort(axis=2)
    values[rank >= 2] = 0
    array = values.reshape(before, groups * 4, behind)
    encoded = encode(array, 1)
    if encoded is None:
        assert array.size % 8
    else:
        assert encoded.values.nbytes + encoded.codes.nbytes == array.nbytes // 2 + array.size // 8
        assert decode(encoded, array.shape).tobytes() == array.tobytes()


def test_what_cannot_be_encoded_without_loss_is_not() -> None:
    assert encode(np.array([[1, 2, 3, 0, 1, 0, 0, 0]], np.float32), 1) is None
    assert encode(np.array([[1, -0.0, -0.0, 0, 1, 0, 0, 0]], np.float32), 1) is None
    assert encode(np.array([[1, 2, 0, 0, 1, 0]], np.float32), 1) is None
    tagged = np.array([[1, -0.0, 0, 0, 1, 0, 0, 0]], np.float32)
    encoded = encode(tagged, 1)
    assert encoded is not None
    assert decode(encoded, (1, 8)).tobytes() == tagged.tobytes()


def test_a_file_that_lost_its_metadata_is_restored(tmp_path: Path) -> None:
    plain, packed, _ = both(tmp_path)
    model = ir.load(packed)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.metadata_props.clear()
    assert set(densify(model)) == LARGE
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(plain).graph.initializer}
    for name in LARGE:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        assert tensor.numpy().tobytes() == stored[name].tobytes()


def test_ops_that_look_alike_are_left_alone(tmp_path: Path) -> None:
    _, packed, _ = both(tmp_path)
    model = ir.load(packed)
    shifts = model.graph.initializers["sparsefx.compact.shifts"]
    shifts.const_value = ir.Tensor(np.array([[6, 4, 2, 0]], np.uint8), name=shifts.name)
    assert densify(model) == ()


def test_a_foreign_file_is_compacted_and_restored(tmp_path: Path) -> None:
    plain, packed, x = both(tmp_path)
    content = plain.read_bytes()
    report = compact_onnx(plain, tmp_path / "out.onnx")
    assert plain.read_bytes() == content
    assert report.bytes == (tmp_path / "out.onnx").stat().st_size < report.bytes_before
    assert (tmp_path / "out.onnx").read_bytes() == packed.read_bytes()
    assert run(tmp_path / "out.onnx", x).tobytes() == run(plain, x).tobytes()


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    _, packed, _ = both(tmp_path)
    content = packed.read_bytes()
    assert compact_onnx(packed).weights == ()
    assert packed.read_bytes() == content
    model = ir.load(packed)
    assert compact(model) == ()


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    plain, _, _ = both(tmp_path)
    onnx.save(onnx.load(plain), tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    (tmp_path / "elsewhere").mkdir()
    compact_onnx(tmp_path / "e.onnx", tmp_path / "elsewhere" / "e.onnx")
    assert set(densify_onnx(tmp_path / "elsewhere" / "e.onnx").weights) == LARGE
    stored = {t.name: t.raw_data for t in onnx.load(tmp_path / "elsewhere" / "e.onnx").graph.initializer}
    assert stored == {t.name: t.raw_data for t in onnx.load(plain).graph.initializer}


def test_an_older_opset_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 13]> g (float[2, 4] x) => (float[2, 4] y) {y = Relu(x)}')
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match="has opset 13, and the compact encoding needs 18"):
        compact_onnx(tmp_path / "old.onnx")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    plain, _, _ = both(tmp_path)
    content = plain.read_bytes()
    (tmp_path / "half.onnx").write_bytes(content[: len(content) // 2])
    for wrong, text in (("half.onnx", "not an ONNX file"), ("none.onnx", "no such file")):
        with pytest.raises(ExportError, match=text):
            densify_onnx(tmp_path / wrong)
    with pytest.raises(ExportError, match="does not exist"):
        densify_onnx(plain, tmp_path / "no" / "m.onnx")
    assert plain.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact.onnx", "half.onnx", "plain.onnx"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed, _ = both(tmp_path)
    content = packed.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_write.os, "fsync", full)
    for change in (densify_onnx, lambda path: compact_onnx(tmp_path / "plain.onnx", path)):
        with pytest.raises(ExportError, match=r"No space left on device; free some space"):
            change(packed)
    assert packed.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact.onnx", "plain.onnx"]


def test_compact_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_write, "LARGEST_SINGLE_FILE", 1000)
    model = make_sparse(nn.Linear(128, 128))
    report = lower_onnx(model, torch.randn(2, 128), tmp_path / "m.onnx", weights="compact", samples=1)
    (data,) = tmp_path.glob("*.data")
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size + data.stat().st_size < 128 * 128 * 4 * 0.6
    (row,) = audit_onnx(tmp_path / "m.onnx")
    assert (row.encoding, row.pattern) == ("compact", "2:4")
    assert densify_onnx(tmp_path / "m.onnx").weights == ("weight",)
    assert audit_onnx(tmp_path / "m.onnx")[0].eligible


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'plain', 'compact'"):
        sparsefx.export_onnx(nn.Linear(16, 8), torch.randn(2, 16), tmp_path / "m.onnx", weights="packed")  # type: ignore[arg-type]


def test_command_line(tmp_path: Path) -> None:
    plain, packed, _ = both(tmp_path)
    runner = CliRunner()
    made = runner.invoke(app, ["compact", str(plain), "--out", str(tmp_path / "c.onnx")])
    assert (made.exit_code, "3 weights rewritten" in made.stdout) == (0, True)
    assert runner.invoke(app, ["densify", str(tmp_path / "c.onnx")]).exit_code == 0
    assert (tmp_path / "c.onnx").read_bytes() == plain.read_bytes()
    missing = runner.invoke(app, ["densify", str(tmp_path / "none.onnx")])
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    assert packed.exists()
