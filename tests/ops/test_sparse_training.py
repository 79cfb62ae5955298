"""Linear layers that train on a sparse kernel, with the reference kernel in the place of a GPU's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx import training_backend
from sparsefx.errors import OptionError, StateError
from sparsefx.ops.masked import masked_linear
from sparsefx.ops.semi_structured_product import KERNELS, Cutlass, Operands, ProductKernel, Reference, kernels_of_device
from sparsefx.ops.sparse_training import kernel_of, pack_masked, sparse_linear
from sparsefx.report import LayerReport
from sparsefx.training_backend import install_backend

Operations = Sequence[Callable[[], object]]


def sparse_wins(operations: Operations) -> list[float]:
    for operation in operations:
        operation()
    return [2.0, *(1.0 for _ in operations[1:])]


def dense_wins(operations: Operations) -> list[float]:
    return [1.0, *(2.0 for _ in operations[1:])]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def trained(
    model: nn.Module,
    timer: Callable[[Operations], list[float]] = sparse_wins,
    kernels: tuple[ProductKernel, ...] = (Reference(),),
    inputs: Tensor | None = None,
) -> tuple[LayerReport, ...]:
    """Sparsify, and install what a GPU would get."""
    sparsefx.sparsify(model, pattern="2:4-transposable")
    rows = sparsefx.audit(model).layers
    return install_backend(model, rows, inputs, kernels=kernels, timer=timer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_masked_op(dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = torch.randn(24, 32, generator=generator).to(dtype)
    mask = sparsefx.patterns.parse("2:4-transposable").mask(weight)
    found = []
    for linear in (lambda *given: sparse_linear(*given, "reference"), masked_linear):
        data = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        own, bias = weight.clone().requires_grad_(), torch.ones(24, dtype=dtype).requires_grad_()
        result = linear(data, own, mask, bias)
        result.square().sum().backward()
        found.append((result, data.grad, own.grad, bias.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)
    assert bool((found[0][2] != 0).logical_and(~mask).any())  # dense, where the mask leaves out too


def test_gradients_are_right_by_finite_differences(generator: torch.Generator) -> None:
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    mask = sparsefx.patterns.parse("2:4-transposable").mask(weight)
    masked = (weight * mask).requires_grad_()
    data = torch.randn(3, 8, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(8, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda one, b: sparse_linear(one, masked.detach(), mask, b, "reference"), (data, bias))


def test_second_derivatives_are_refused(generator: torch.Generator) -> None:
    weight = torch.randn(8, 8, generator=generator)
    mask = sparsefx.patterns.parse("2:4-transposable").mask(weight)
    data = torch.randn(3, 8, generator=generator).requires_grad_()
    result = sparse_linear(data, weight, mask, None, "reference")
    (first,) = torch.autograd.grad(result.square().sum(), data, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kernel", ["reference", "cutlass"])
def test_the_op_is_known_to_compilers(kernel: str, generator: torch.Generator) -> None:
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    mask = sparsefx.patterns.parse("2:4-transposable").mask(weight)
    torch.library.opcheck(pack_masked, (weight, mask, torch.bfloat16, kernel), test_utils=("test_schema", "test_faketensor"))
    both = pack_masked(weight, mask, torch.bfloat16, kernel)
    assert torch.equal(KERNELS[kernel].unpack(Operands(*both[:2]), 128), weight * mask)
    assert torch.equal(KERNELS[kernel].unpack(Operands(*both[2:]), 64), (weight * mask).t())


def test_training_is_that_of_masked_dense_layers() -> None:
    losses = []
    for sparse in (True, False):
        model = network()
        if sparse:
            rows = trained(model)
            assert [row.backend for row in rows] == ["sparse_tensor_cores (reference, not measured)"] * 2
        else:
            sparsefx.sparsify(model, pattern="2:4-transposable")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        sparsefx.attach(model, optimizer, total_steps=20)
        generator = torch.Generator().manual_seed(0)
        data, target = torch.randn(8, 32, generator=generator), torch.randn(8, 16, generator=generator)
        for _ in range(20):
            loss = functional.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def followed(*models: nn.Module) -> None:
    """Attach a runtime, without which training is warned of."""
    for model in models:
        sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that run on a sparse kernel from now on."""
    calls: list[str] = []
    product = Reference.product
    monkeypatch.setattr(Reference, "product", lambda *given: calls.append("product") or product(*given))
    return calls


def test_where_it_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), torch.randn(4, 32)
    trained(model)
    followed(model)
    calls = counted(monkeypatch)
    model(data).sum().backward()
    assert len(calls) == 3  # two forward products and one gradient: the first layer's inputs need none
    assert type(model[0]) is nn.Linear
    calls.clear()
    model.eval()(data)
    model.train()
    torch.export.export(model, (data,))
    assert calls == []
    assert torch.equal(model.eval()(data), sparsefx.graph(model)(data))


def test_copies_and_pickles_run_on_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), torch.randn(4, 32)
    trained(model)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    calls = counted(monkeypatch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(whole, weights_only=False)):
        with torch.no_grad():
            twin[0].weight.mul_(2)
            assert torch.equal(twin[0](data), functional.linear(data, twin[0].weight, twin[0].bias))
            assert not torch.equal(twin[0](data), model[0](data))
    assert len(calls) == 9


def test_finalize_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    trained(model)
    sparsefx.finalize(model)
    calls = counted(monkeypatch)
    assert kernel_of(model[0]) == ""
    model(torch.randn(4, 32))
    assert calls == []


def test_layers_that_stay_dense_say_why() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16), nn.Conv1d(16, 16, 1))
    rows = trained(model, kernels=(Cutlass(),))
    assert rows[0].backend.startswith("dense: cutlass takes float16, bfloat16, int8, and the weight is float32")
    assert "is no nn.Linear but a Conv1d" in rows[2].backend
    low = network().bfloat16()
    assert "32n outputs and 64n inputs" in trained(low, kernels=(Cutlass(),))[0].backend


def test_the_timer_decides(generator: torch.Generator) -> None:
    data = torch.randn(6, 32, generator=generator)
    model = network()
    rows = trained(model, dense_wins, inputs=data)
    assert [row.backend for row in rows] == ["dense: the dense layer is as fast: 0.50 of its speed with reference"] * 2
    assert kernel_of(model[0]) == ""
    model = network()
    rows = trained(model, sparse_wins, inputs=data)
    assert [row.backend for row in rows] == ["sparse_tensor_cores (reference)"] * 2
    assert kernel_of(model[0]) == "reference"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_audit_tells(generator: torch.Generator) -> None:
    model = network()
    rows = trained(model, sparse_wins, inputs=torch.randn(6, 32, generator=generator))
    text = str(sparsefx.report.Audit(rows))
    assert "Sparse, and trained by" in text
    assert "sparse_tensor_cores (reference)" in text


def test_compiled_in_one_graph() -> None:
    model, data = network(), torch.randn(8, 32)
    trained(model)
    twin = copy.deepcopy(model)
    followed(model, twin)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = model(data)
    expected.sum().backward()
    result = compiled(data)
    result.sum().backward()
    torch.testing.assert_close(result, expected)
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), torch.randn(8, 32)
    trained(model)
    plain = network()
    sparsefx.sparsify(plain, pattern="2:4-transposable")
    followed(model, plain)
    calls = counted(monkeypatch)
    results = []
    for one in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            result = one(data)
        result.float().sum().backward()
        results.append((result, one[0].weight.grad))
    assert len(calls) == 3
    assert results[0][0].dtype == torch.bfloat16
    assert results[0][1].dtype == torch.float32
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(OptionError, match="backend='cuda' was given; expected 'sparse_tensor_cores'"):
        sparsefx.sparsify(network(), pattern="2:4-transposable", backend="cuda")
    with pytest.raises(OptionError, match="expected '2:4-transposable'"):
        sparsefx.sparsify(network(), backend="sparse_tensor_cores")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_changed() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="torch sees no NVIDIA GPU here"):
        sparsefx.sparsify(model, pattern="2:4-transposable", backend="sparse_tensor_cores")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not sparsefx.masks(model)


def test_sparsify_installs_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_backend, "why_no_kernels", lambda: "")
    monkeypatch.setattr(training_backend, "kernels_of_device", lambda: (Reference(),))
    model = network()
    sparsefx.sparsify(model, pattern="2:4-transposable", backend="sparse_tensor_cores")
    assert kernel_of(model[0]) == "reference"
    assert "Sparse, and trained by" in str(sparsefx.audit(model))
    assert all(not row.backend for row in sparsefx.audit(sparsefx.finalize(model)).layers)

    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training_backend, "choose_training_kernels", fail)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        sparsefx.sparsify(model, pattern="2:4-transposable", backend="sparse_tensor_cores")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert kernel_of(model[0]) == ""
    assert not sparsefx.masks(model)


@pytest.mark.skipif(not kernels_of_device(), reason="no GPU with Sparse Tensor Cores")
def test_training_on_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).cuda().bfloat16()
    plain = copy.deepcopy(model)
    sparsefx.sparsify(plain, pattern="2:4-transposable")
    sparsefx.sparsify(model, pattern="2:4-transposable", backend="sparse_tensor_cores")
    assert all(kernel_of(layer) for layer in (model[0], model[2]))
    data = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    for one in (model, plain):
        one(data).square().mean().backward()
    torch.testing.assert_close(model(data), plain(data), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, rtol=5e-2, atol=1e-4)
