"""Lowering to sparse kernels, with the reference kernel and timers that say what a GPU would."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.acceleration import accelerate_with
from sparsefx.errors import CaptureError, EligibilityError, OptionError, StateError, VerificationError
from sparsefx.ops.semi_structured_layers import SemiStructuredLinear, SemiStructuredPointwise, quantize_rows
from sparsefx.ops.semi_structured_product import KERNELS, CuSparseLt, Cutlass, Operands, Reference, kernels_of_device
from sparsefx.passes.acceleration_report import Acceleration

Operations = Sequence[Callable[[], object]]
REFERENCE = (Reference(),)


def sparse_wins(operations: Operations) -> list[float]:
    for operation in operations:
        operation()
    return [3e-6, *(2e-6 for _ in operations[1:])]


def dense_wins(operations: Operations) -> list[float]:
    return [2e-6, *(3e-6 for _ in operations[1:])]


def run(model: nn.Module, inputs: Any, timer: Any = sparse_wins, kernels: Any = REFERENCE, **options: Any) -> Acceleration:
    return accelerate_with(model, inputs, kernels=kernels, timer=timer, **options)


class Network(nn.Module):
    """1 x 1 convolutions with and without a stride, a 3 x 3 one, and Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(16, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 64, 1, bias=False)
        self.down = nn.Conv2d(64, 32, 1, stride=2)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = self.down(functional.relu(self.wide(self.stem(image))))
        return self.head(functional.relu(self.hidden(features.mean((2, 3)))))


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return sparsefx.finalize(sparsefx.sparsify(Network(), **options))


def reasons(report: Acceleration) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers}


def test_layers_are_replaced_where_sparse_is_faster() -> None:
    model, image = network(), torch.randn(2, 16, 9, 9)
    before = copy.deepcopy(model)
    report = run(model, image)
    assert report.accelerated == ("wide", "down", "hidden", "head")
    assert isinstance(report.model.wide, SemiStructuredPointwise)
    assert isinstance(report.model.hidden, SemiStructuredLinear)
    assert type(report.model) is Network
    assert "3x3 filters" in reasons(report)["stem"]
    torch.testing.assert_close(report.model(image), model.eval()(image))
    assert report.largest_difference < 1e-5
    assert "4 of 5 Linear/Conv2d layers run on Sparse Tensor Cores" in str(report)
    assert "3.0 -> 2.0 us, 1.50x; reference" in str(report)
    assert '"accelerated": true' in report.to_json()
    assert {layer.name: layer.rows for layer in report.layers} == {"stem": 0, "wide": 162, "down": 162, "hidden": 2, "head": 2}
    for (name, one), (_, other) in zip(before.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert type(model.wide) is nn.Conv2d


def test_convolutions_give_channels_last_without_copies() -> None:
    report = run(network(), torch.randn(2, 16, 9, 9))
    result = report.model.wide(torch.randn(2, 32, 5, 5).to(memory_format=torch.channels_last))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_replaced_where_dense_is_faster() -> None:
    model, image = network(), torch.randn(2, 16, 9, 9)
    report = run(model, image, dense_wins)
    assert report.accelerated == ()
    assert reasons(report)["hidden"] == "the dense layer is as fast: 0.67 of its speed with reference"
    assert torch.equal(report.model(image), model.eval().to(memory_format=torch.channels_last)(image))
    assert run(model, image, minimum_gain=1.6).accelerated == ()


def test_equal_layers_are_measured_once() -> None:
    asked: list[int] = []

    def timer(operations: Operations) -> list[float]:
        asked.append(len(operations))
        return sparse_wins(operations)

    model = sparsefx.sparsify(nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))))
    assert len(run(model, torch.randn(4, 32), timer).accelerated) == 6
    assert asked == [2]


def test_the_fastest_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Reference):
        @property
        def name(self) -> str:
            return "other"

    model = sparsefx.sparsify(nn.Sequential(nn.Linear(32, 32)))
    monkeypatch.setitem(KERNELS, "other", Other())
    report = run(model, torch.randn(4, 32), lambda operations: [3.0, 2.0, 1.0], (Reference(), Other()))
    assert report.layers[0].kernel == "other"


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Reference):
        def product(self, rows: Tensor, operands: Operands, bias: Tensor | None, algorithm: int) -> Tensor:
            return super().product(rows, operands, bias, algorithm) * 1.001

    model = sparsefx.sparsify(nn.Sequential(nn.Linear(32, 32)))
    monkeypatch.setitem(KERNELS, "reference", Wrong())
    assert "more than rounding" in reasons(run(model, torch.randn(4, 32), kernels=(Wrong(),)))["0"]


def test_a_kernel_that_loses_weights_is_not_used() -> None:
    class Lossy(Reference):
        def pack(self, weight: Tensor) -> Operands:
            return super().pack(weight.roll(1, 0))

    model = sparsefx.sparsify(nn.Sequential(nn.Linear(32, 32)))
    assert "did not give the packed weight back" in reasons(run(model, torch.randn(4, 32), kernels=(Lossy(),)))["0"]


class Reading(nn.Module):
    """Reads weights of layers outside of them, in each of the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.tied = nn.Linear(32, 32, bias=False)
        self.functional = nn.Linear(32, 32)
        self.inspected = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.plain = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tied(functional.embedding(tokens, self.tied.weight))
        hidden = functional.linear(hidden, self.functional.weight)
        hidden = self.inspected(hidden.to(self.inspected.weight.dtype))
        return self.plain(self.attention(hidden, hidden, hidden)[0])


def test_weights_that_others_read_stay() -> None:
    model = sparsefx.sparsify(Reading())
    with torch.no_grad():  # which sparsify leaves dense, since an embedding reads it
        model.tied.weight.masked_fill_(~sparsefx.patterns.parse("2:4").mask(model.tied.weight), 0)
    report = run(model, torch.randint(0, 32, (2, 5)))
    assert report.accelerated == ("plain",)
    told = reasons(report)
    assert "torch.nn.functional.embedding reads its weight outside the layer" in told["tied"]
    assert "torch.nn.functional.linear reads its weight" in told["functional"]
    assert "dtype" in told["inspected"]
    assert "multi_head_attention_forward" in told["attention.out_proj"]
    assert "was not called on the example inputs" in told["unused"]


def test_the_fused_encoder_layer_keeps_its_weights() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = sparsefx.sparsify(nn.Sequential(layer, nn.Linear(32, 32)))
    report = run(model, torch.randn(2, 5, 32))
    assert report.accelerated == ("1",)
    assert "nn.TransformerEncoderLayer reads its weight itself" in reasons(report)["0.linear1"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(32, 32, 1, padding=1), "1x1 convolution with padding"),
        (nn.Conv2d(32, 32, 1, groups=2), "2 groups"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 1)), "its weight is computed"),
        (nn.Conv2d(32, 32, 1), "of the groups of four hold more than two values"),
        (nn.Conv2d(12, 32, 1), "12 inputs is not a multiple of 8"),
    ],
)
def test_layers_that_do_not_fit_say_why(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer, nn.Conv2d(32, 32, 1))
    with torch.no_grad():
        model[1].weight.masked_fill_(~sparsefx.patterns.parse("2:4").mask(model[1].weight), 0)
    report = run(model, torch.randn(1, layer.in_channels, 4, 4))
    assert reason in reasons(report)["0"]
    assert report.accelerated == ("1",)


def test_include_exclude_and_rules_of_shapes() -> None:
    model, image = network(), torch.randn(2, 16, 9, 9)
    assert run(model, image, include="wide").accelerated == ("wide",)
    assert run(model, image, exclude=nn.Linear).accelerated == ("wide", "down")
    with pytest.raises(EligibilityError, match="matches"):
        run(model, image, include="nothing")
    told = reasons(run(model, image, kernels=(CuSparseLt(), Cutlass())))
    assert "cusparselt takes float16, bfloat16, int8, and the weight is float32" in told["wide"]
    low = reasons(run(model, image, kernels=(CuSparseLt(), Cutlass()), include="head", dtype=torch.bfloat16))
    assert "16n outputs and 16n inputs; this one has 10 and 48" in low["head"]


def test_options_and_models_that_are_refused() -> None:
    image = torch.randn(2, 16, 9, 9)
    with pytest.raises(EligibilityError, match="no layer of this model can run on Sparse Tensor Cores"):
        run(Network(), image)
    with pytest.raises(OptionError, match=r"expected torch\.float16, torch\.bfloat16 or torch\.int8"):
        run(network(), image, dtype=torch.float32)
    with pytest.raises(OptionError, match="minimum_gain=0"):
        run(network(), image, minimum_gain=0)
    with pytest.raises(CaptureError, match="Pass inputs that the model accepts"):
        run(network(), torch.randn(2, 3))


def test_a_model_that_breaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(Reference):
        def product(self, rows: Tensor, operands: Operands, bias: Tensor | None, algorithm: int) -> Tensor:
            result = super().product(rows, operands, bias, algorithm)
            return result if len(rows) != 4 else result / 0

    model = sparsefx.sparsify(nn.Sequential(nn.Linear(32, 32)))
    monkeypatch.setitem(KERNELS, "reference", Overflowing())
    with pytest.raises(VerificationError, match="NaN or infinity"):
        run(model, torch.randn(4, 32), kernels=(Overflowing(),))
    assert type(model[0]) is nn.Linear


def test_int8_keeps_zeros_and_is_near(generator: torch.Generator) -> None:
    model, image = network().bfloat16(), torch.randn(2, 16, 9, 9, generator=generator).bfloat16()
    report = run(model, image, dtype=torch.int8)
    assert report.accelerated == ("wide", "down", "hidden", "head")
    assert report.largest_difference < 0.05
    layer = report.model.hidden
    assert layer.compressed().values.dtype == torch.int8
    assert bool(((layer.weight == 0) | (model.hidden.weight != 0)).all())
    torch.testing.assert_close(layer.weight, model.hidden.weight.float(), rtol=0, atol=float(layer.scale.max()) / 2 + 1e-6)
    values, factors = quantize_rows(torch.zeros(2, 8))
    assert not values.any()
    assert torch.equal(factors, torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_what_is_saved_is_compressed_and_loads(dtype: torch.dtype | None) -> None:
    model, image = network(), torch.randn(2, 16, 9, 9)
    if dtype is not None:
        model, image = model.bfloat16(), image.bfloat16()
    report = run(model, image, dtype=dtype)
    saved = io.BytesIO()
    torch.save(report.model.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert "hidden.weight" not in state
    compressed = sum(state[f"hidden.{name}"].nbytes for name in ("values", "codes"))
    if dtype == torch.bfloat16:
        assert compressed == model.hidden.weight.nbytes * 9 / 16
    twin = copy.deepcopy(report.model)
    for buffer in (twin.hidden.packed, twin.wide.packed):
        buffer.zero_()
    place = twin.hidden.packed.data_ptr()
    twin.load_state_dict(state)
    assert twin.hidden.packed.data_ptr() == place
    assert torch.equal(twin(image), report.model(image))
    dense = sparsefx.load_accelerated(network().to(image.dtype), state)
    if not kernels_of_device():
        assert type(dense.hidden) is nn.Linear
    torch.testing.assert_close(dense.hidden.weight, report.model.hidden.weight.to(image.dtype))
    torch.testing.assert_close(dense.down.weight.flatten(1), report.model.down.weight.to(image.dtype))


def test_a_state_that_does_not_fit_is_refused() -> None:
    report = run(network(), torch.randn(2, 16, 9, 9))
    state = report.model.state_dict()
    with pytest.raises(StateError, match="does not fit Sequential"):
        sparsefx.load_accelerated(nn.Sequential(nn.Linear(4, 4)), state)
    with pytest.raises(StateError, match=r"convert the model with \.to\(torch\.float32\) first"):
        sparsefx.load_accelerated(network().bfloat16(), state)
    with pytest.raises(RuntimeError, match=r"Missing key.*hidden\.codes"):
        report.model.load_state_dict({name: value for name, value in state.items() if name != "hidden.codes"})
    with pytest.raises(RuntimeError, match="load it into the model it was saved from"):
        report.model.load_state_dict({**state, "hidden.values": state["hidden.values"][:8]})


def test_it_compiles_in_one_graph() -> None:
    report = run(network(), torch.randn(2, 16, 9, 9))
    compiled = torch.compile(report.model, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 3):
        image = torch.randn(count, 16, 9, 9)
        torch.testing.assert_close(compiled(image), report.model(image))


def test_transformers_conv1d() -> None:
    layers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    model = nn.Sequential(layers.Conv1D(48, 32))
    sparsefx.sparsify(model, example_inputs=torch.randn(1, 4, 32))
    report = run(model, torch.randn(1, 4, 32))
    assert report.accelerated == ("0",)
    data = torch.randn(3, 2, 32)
    torch.testing.assert_close(report.model(data), model(data))
    dense = sparsefx.load_accelerated(nn.Sequential(layers.Conv1D(48, 32)), report.model.state_dict())
    torch.testing.assert_close(dense(data), model(data))


def test_filters_of_other_dimensions_may_stand_beside() -> None:
    model = sparsefx.sparsify(nn.Sequential(nn.Conv3d(16, 32, 1), nn.Flatten(3), nn.Conv2d(32, 32, 1)), exclude="0")
    data = torch.randn(1, 16, 2, 3, 4)
    report = run(model, data)
    assert report.accelerated == ("2",)
    torch.testing.assert_close(report.model(data), model(data))


def test_a_layer_at_two_places_stays_one() -> None:
    layer = nn.Linear(32, 32)
    report = run(sparsefx.sparsify(nn.Sequential(layer, nn.ReLU(), layer)), torch.randn(3, 32))
    assert report.accelerated == ("0",)
    assert report.layers[0].rows == 6
    assert report.model[0] is report.model[2]
    assert isinstance(report.model[2], SemiStructuredLinear)


def test_a_model_that_is_one_layer() -> None:
    model, data = sparsefx.sparsify(nn.Linear(32, 32)), torch.randn(3, 32)
    report = run(model, data)
    assert isinstance(report.model, SemiStructuredLinear)
    assert torch.equal(report.model(data), model(data))
    assert torch.equal(sparsefx.load_accelerated(nn.Linear(32, 32), report.model.state_dict())(data), model(data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(StateError, match=r"torch sees no NVIDIA GPU here.*sparsefx\.export_onnx"):
        sparsefx.accelerate(network(), torch.randn(2, 16, 9, 9))


@pytest.mark.skipif(not kernels_of_device(), reason="no GPU with Sparse Tensor Cores")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_on_the_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    model = sparsefx.sparsify(model).cuda().bfloat16()
    data = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    report = sparsefx.accelerate(model, data, dtype=dtype, minimum_gain=0.01)
    assert len(report.accelerated) == 2
    assert report.largest_difference < 0.05
    kind = next(report.model.parameters()).dtype
    captured, graph = data.to(kind), torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = report.model(captured)
        with torch.cuda.graph(graph):
            result = report.model(captured)
        graph.replay()
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(torch.compile(report.model)(captured), expected, rtol=2e-2, atol=2e-2)
    loaded = sparsefx.load_accelerated(copy.deepcopy(model).to(kind), report.model.state_dict())
    torch.testing.assert_close(loaded(captured), expected, rtol=2e-2, atol=2e-2)
