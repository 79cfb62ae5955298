"""Refusals of the ONNX lowering: a clear error each, and the model and every file as before."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_models import make_sparse
from torch import Tensor, nn

from sparsefx.errors import CaptureError, ExportError, NonFiniteError, OptionError, StateError
from sparsefx.passes import lower_onnx as lowering
from sparsefx.passes import onnx_write
from sparsefx.passes.lower_onnx import lower_onnx

INPUT = torch.linspace(-1, 1, 64).reshape(2, 32)


class Net(nn.Module):
    """A sparse layer, a buffer that its forward changes, a cache, and dropout: much that an export could disturb."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = make_sparse(nn.Linear(32, 32))
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, 8).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))
        self.cache: dict[str, Any] = {"x": torch.zeros(3)}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.last = self.cache["x"] = x
        return self.head(self.drop(torch.relu(self.norm(self.layer(x)))))


def snapshot(model: nn.Module) -> Any:
    modules = {
        name: (
            module.training,
            sorted(module.__dict__),
            {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, bool)},
            {k: [(key, id(v)) for key, v in d.items()] for k, d in module.__dict__.items() if isinstance(d, dict)},
        )
        for name, module in model.named_modules()
    }
    tensors = {name: (id(t), t.detach().clone().tolist()) for name, t in model.state_dict(keep_vars=True).items()}
    gradients = {name: (p.requires_grad, None if p.grad is None else p.grad.tolist()) for name, p in model.named_parameters()}
    state = np.random.get_state()  # noqa: NPY002 - the old generator is what an export must leave alone
    return modules, tensors, gradients, torch.get_rng_state().tolist(), repr(state), torch.is_grad_enabled()


@contextmanager
def unchanged(model: nn.Module, directory: Path) -> Iterator[None]:
    before = snapshot(model), {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    yield
    assert snapshot(model) == before[0]
    assert {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before[1]
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def model() -> Net:
    net = Net().train()
    net.norm.eval()
    net(INPUT).square().sum().backward()
    net.cache["x"] = torch.zeros(3)
    net.last = None
    return net


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an earlier file")
    return path


def test_success_leaves_the_model_as_it_was_too(model: Net, tmp_path: Path) -> None:
    before = snapshot(model)
    lower_onnx(model, INPUT, tmp_path / "m.onnx")
    assert snapshot(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_compiled_model_and_compiled_module(model: Net, tmp_path: Path) -> None:
    wrapped = lower_onnx(torch.compile(model, backend="eager"), INPUT, tmp_path / "wrapped.onnx")
    model.compile(backend="eager")
    before = snapshot(model)
    inside = lower_onnx(model, INPUT, tmp_path / "inside.onnx")
    assert snapshot(model) == before
    assert [w.name for w in wrapped.initializers] == [w.name for w in inside.initializers] == ["layer.weight", "head.weight"]


def test_an_earlier_file_is_replaced_and_its_permissions_stay(model: Net, old: Path) -> None:
    old.chmod(0o640)
    lower_onnx(model, INPUT, old)
    assert old.stat().st_mode & 0o777 == 0o640
    assert len(old.read_bytes()) > 1000


def test_a_link_is_followed(model: Net, old: Path) -> None:
    link = old.with_name("link.onnx")
    link.symlink_to(old.name)
    lower_onnx(model, INPUT, link)
    assert link.is_symlink()
    assert len(old.read_bytes()) > 1000


def test_nothing_is_printed(model: Net, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    lower_onnx(model, INPUT, tmp_path / "m.onnx", dynamic_shapes=({0: "batch"},))
    with pytest.raises(ExportError):
        lower_onnx(Branching(), INPUT, tmp_path / "b.onnx")
    assert capfd.readouterr() == ("", "")


def test_meta_device(tmp_path: Path, old: Path) -> None:
    meta = nn.Linear(32, 8, device="meta")
    with unchanged(nn.Linear(1, 1), tmp_path), pytest.raises(StateError, match="weight is on the meta device"):
        lower_onnx(meta, INPUT, old)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight(model: Net, old: Path, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        model.head.weight[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"head\.weight holds NaN or infinity"):
        lower_onnx(model, INPUT, old)
    assert old.read_bytes() == b"an earlier file"


def test_model_that_torch_export_refuses(model: Net, old: Path, tmp_path: Path) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    branching = Branching()
    with (
        unchanged(branching, tmp_path),
        pytest.raises(ExportError, match=r"torch\.export refuses the model: .*branches") as caught,
    ):
        lower_onnx(branching, INPUT, old)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (torch.zeros(2, 31), CaptureError, r"does not run on the example inputs \(float32\[2, 31\]\)"),
        ((INPUT, INPUT), CaptureError, "does not run on the example inputs"),
        ({"wrong": INPUT}, CaptureError, "wrong"),
        ("text", CaptureError, r"does not run on the example inputs \(str\)"),
        ({3: INPUT}, CaptureError, "does not run on the example inputs"),
    ],
)
def test_wrong_example_inputs(model: Net, old: Path, tmp_path: Path, inputs: Any, error: type[Exception], text: str) -> None:
    with unchanged(model, tmp_path), pytest.raises(error, match=text):
        lower_onnx(model, inputs, old)


@pytest.mark.parametrize("options", [{"opset": 17}, {"opset": 1000}, {"opset": "20"}, {"samples": 0}, {"tolerance": -1.0}])
def test_options_outside_their_range(model: Net, old: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with unchanged(model, tmp_path), pytest.raises(OptionError, match="was given; expected"):
        lower_onnx(model, INPUT, old, **options)


def test_paths_that_cannot_be_written(model: Net, tmp_path: Path) -> None:
    with unchanged(model, tmp_path):
        with pytest.raises(ExportError, match="this is a directory"):
            lower_onnx(model, INPUT, tmp_path)
        with pytest.raises(ExportError, match="does not exist; create it first"):
            lower_onnx(model, INPUT, tmp_path / "no" / "m.onnx")


def test_unwritable_directory(model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write anywhere
    with pytest.raises(ExportError, match="no permission to write here"):
        lower_onnx(model, INPUT, tmp_path / "m.onnx")


def _raise(error: BaseException) -> Callable[..., Any]:
    def raiser(*_: Any, **__: Any) -> Any:
        raise error

    return raiser


def test_disk_full_while_writing(model: Net, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_write.os, "fsync", _raise(OSError(errno.ENOSPC, "No space left on device")))
    with unchanged(model, tmp_path), pytest.raises(ExportError, match="No space left on device; free some space"):
        lower_onnx(model, INPUT, old)


def test_disk_full_for_real(model: Net, old: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with unchanged(model, tmp_path), pytest.raises(ExportError, match="File too large; free some space"):
            lower_onnx(model, INPUT, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_interrupt(model: Net, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(onnx_write.os, place, _raise(KeyboardInterrupt()))
    with unchanged(model, tmp_path), pytest.raises(KeyboardInterrupt):
        lower_onnx(model, INPUT, old)


def test_weights_changed_behind_their_mask(model: Net, old: Path) -> None:
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
    with pytest.raises(ExportError, match=r"layer\.weight: 512 weights that its 2:4 mask excludes are not zero"):
        lower_onnx(model, INPUT, old)
    assert old.read_bytes() == b"an earlier file"


def test_mask_along_the_wrong_axis(old: Path) -> None:
    wrong = make_sparse(nn.Linear(32, 32), axis=0)
    with pytest.raises(ExportError, match=r"weight: its mask is 2:4 along axis 0 of the parameter, and Gemm .* its other axis"):
        lower_onnx(wrong, INPUT, old)
    assert old.read_bytes() == b"an earlier file"


def _damage(change: Callable[[ir.Model], None]) -> Callable[..., Any]:
    """The real translation, and then a fault, as a wrong graph rewrite would make it."""
    translate = lowering._translate

    def damaged(*arguments: Any) -> Any:
        model, sources = translate(*arguments)
        change(model)
        return model, sources

    return damaged


def _densify(model: ir.Model) -> None:
    value = model.graph.initializers["layer.weight"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() + np.float32(1e-9), name="layer.weight")


def _rescale(model: ir.Model) -> None:
    value = model.graph.initializers["layer.weight"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.01), name="layer.weight")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_densify, r"layer\.weight: 2:4 in the model, but not in the file along axis 1 of Gemm .*: 256 of 256 groups"),
        (_rescale, r"output 'output' on the example inputs: the file is off by .* more than the 0.0001 allowed"),
    ],
)
def test_a_faulty_graph_is_not_written(
    model: Net, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[ir.Model], None], text: str
) -> None:
    monkeypatch.setattr(lowering, "_translate", _damage(change))
    with unchanged(model, tmp_path), pytest.raises(ExportError, match=text):
        lower_onnx(model, INPUT, old)


def test_a_promise_that_is_not_in_the_file(old: Path) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_sparse(nn.Linear(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.layer.weight * (1 + x.mean()))

    with pytest.raises(ExportError, match=r"layer\.weight: the file reads it by Mul only"):
        lower_onnx(Computed(), INPUT, old)
    assert old.read_bytes() == b"an earlier file"


def test_random_model_cannot_be_checked(old: Path, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    noisy = Noisy()
    with unchanged(noisy, tmp_path), pytest.raises(ExportError, match="draws random numbers"):
        lower_onnx(noisy, INPUT, old)


def test_python_number_among_the_outputs(old: Path) -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 1, 3

    with pytest.raises(ExportError, match="returns a Python number or text"):
        lower_onnx(Counting(), INPUT, old)


def test_float8_is_refused_with_a_remedy(old: Path) -> None:
    model = nn.Linear(32, 8)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ExportError, match=r"weight is float8_e4m3fn.*export model.float\(\)"):
        lower_onnx(model, INPUT, old)


def test_dynamic_size_that_the_model_bounds(old: Path) -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(3, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.positions[: x.shape[0]]

    with pytest.raises(ExportError, match=r"bound the sizes with torch\.export\.Dim"):
        lower_onnx(Bounded(), INPUT, old, dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert lower_onnx(Bounded(), INPUT, old, dynamic_shapes=({0: "rows"},)).samples == 4


def test_external_data_above_the_limit_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_write, "LARGEST_SINGLE_FILE", 1000)
    net = make_sparse(nn.Linear(64, 64))
    inputs = torch.randn(2, 64)
    first = lower_onnx(net, inputs, tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.data")
    assert first.bytes == (tmp_path / "m.onnx").stat().st_size + data.stat().st_size > 64 * 64 * 4
    content = (tmp_path / "m.onnx").read_bytes(), data.read_bytes()
    monkeypatch.setattr(onnx_write.os, "replace", _raise(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ExportError, match="Input/output error"):
        lower_onnx(make_sparse(nn.Linear(64, 64)), inputs, tmp_path / "m.onnx")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "m.onnx", data])
    assert ((tmp_path / "m.onnx").read_bytes(), data.read_bytes()) == content
