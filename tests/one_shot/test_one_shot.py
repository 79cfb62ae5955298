"""Wanda and SparseGPT: masks and weights against independent references, on every way of reading a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.errors import CaptureError, NonFiniteError, OptionError
from sparsefx.one_shot import SparseGPT, Wanda
from sparsefx.one_shot.layout import as_call, from_matrices, inputs_of, to_matrices
from sparsefx.patterns import parse


def batches(*shape: int, count: int = 3, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Inputs of unequal scale, so that scores by inputs differ from magnitudes.
    scale = torch.rand(shape[1] if len(shape) > 2 else shape[-1], generator=generator) * 3
    scale = scale.reshape(-1, *[1] * (len(shape) - 2)) if len(shape) > 2 else scale
    return [torch.randn(*shape, generator=generator) * scale for _ in range(count)]


def test_wanda_scores_by_the_norms_of_inputs_of_layers_that_are_sparse_already() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = batches(16, 32)
    sparsefx.sparsify(model, algorithm="wanda", calibration=data)
    inputs = torch.cat(data)
    first = parse("2:4").mask(before["0.weight"] * inputs.norm(dim=0))
    hidden = torch.relu(functional.linear(inputs, before["0.weight"] * first, before["0.bias"]))
    second = parse("2:4").mask(before["2.weight"] * hidden.norm(dim=0))
    masks = sparsefx.masks(model)
    assert torch.equal(masks["0.weight"], first)
    assert torch.equal(masks["2.weight"], second)
    assert torch.equal(model[0].weight, before["0.weight"] * first)
    assert not torch.equal(second, parse("2:4").mask(before["2.weight"]))


def test_wanda_without_a_structure_competes_within_each_output() -> None:
    model = nn.Linear(32, 64)
    sparsefx.sparsify(model, pattern="unstructured", density=0.25, algorithm="wanda", calibration=batches(8, 32))
    assert sparsefx.masks(model)["weight"].sum(1).tolist() == [8] * 64


def brain_surgeon(weight: Tensor, gram: Tensor, damping: float, size: int | None, keep: int) -> Tensor:
    """SparseGPT by its definition: for each column, the inverse of what is left of the Hessian is found anew."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(gram))]
    weight = weight.clone()
    columns = weight.shape[1]
    group = columns if size is None else size
    for start in range(0, columns, group):
        losses = torch.stack([weight[:, j] ** 2 / inverses[j][0, 0] for j in range(start, start + group)], dim=1)
        if size is None:
            threshold = losses.flatten().sort(descending=True).values[keep - 1]
            mask = losses >= threshold
        else:
            mask = torch.zeros_like(losses, dtype=torch.bool)
            mask.scatter_(1, losses.argsort(dim=1, descending=True)[:, :keep], True)
        for j in range(start, start + group):
            lost = torch.where(mask[:, j - start], 0, weight[:, j]) / inverses[j][0, 0]
            weight[:, j:] -= lost[:, None] * inverses[j][0]
            weight[~mask[:, j - start], j] = 0
    return weight


@pytest.mark.parametrize(("pattern", "size", "keep"), [("2:4", 4, 2), ("1:4", 4, 1), ("4:8", 8, 4), ("unstructured", None, 256)])
def test_sparsegpt_equals_its_definition(pattern: str, size: int | None, keep: int) -> None:
    weight = torch.randn(16, 32, dtype=torch.float64)
    inputs = torch.cat(batches(40, 32)).double() @ torch.randn(32, 32, dtype=torch.float64)
    gram = inputs.T @ inputs
    method = SparseGPT(block=32)
    found, mask = method.solve(weight, gram, parse(pattern), 0.5)
    torch.testing.assert_close(found, brain_surgeon(weight, gram, 0.01, size, keep))
    assert torch.equal(found != 0, mask)


def test_blocks_of_columns_change_nothing_but_the_order_of_sums() -> None:
    weight = torch.randn(8, 96, dtype=torch.float64)
    inputs = torch.randn(200, 96, dtype=torch.float64)
    narrow, wide = (SparseGPT(block=block).solve(weight, inputs.T @ inputs, parse("2:4"), 0.5) for block in (16, 96))
    assert torch.equal(narrow[1], wide[1])
    torch.testing.assert_close(narrow[0], wide[0])


def test_sparsegpt_loses_less_than_magnitude_and_wanda() -> None:
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    data = [batch @ mixing for batch in batches(64, 64, count=8)]
    inputs, errors = torch.cat(data), {}
    dense = nn.Linear(64, 64)
    for algorithm in ("static", "wanda", "sparsegpt"):
        model = nn.Linear(64, 64)
        model.load_state_dict(dense.state_dict())
        calibration = None if algorithm == "static" else data
        sparsefx.sparsify(model, algorithm=algorithm, calibration=calibration)
        errors[algorithm] = float((model(inputs) - dense(inputs)).square().mean().detach())
    assert errors["sparsegpt"] < errors["wanda"] < errors["static"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 8), (2, 3, 16)),
        (nn.Conv1d(16, 8, 3, padding=1, stride=2), (2, 16, 9)),
        (nn.Conv2d(16, 8, 3), (2, 16, 6, 7)),
        (nn.Conv2d(16, 8, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)), (2, 16, 7, 8)),
        (nn.Conv2d(16, 8, 3, padding="same", dilation=2), (2, 16, 6, 6)),
        (nn.Conv2d(32, 8, 3, groups=2, padding=1), (2, 32, 5, 5)),
        (nn.Conv2d(16, 8, 1), (16, 5, 5)),
        (nn.Conv3d(16, 8, 2), (1, 16, 3, 4, 3)),
    ],
)
def test_inputs_times_matrices_are_the_outputs(layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsefx.one_shot.layout._VALUES_AT_A_TIME", 100)
    names = {
        nn.Linear: functional.linear,
        nn.Conv1d: functional.conv1d,
        nn.Conv2d: functional.conv2d,
        nn.Conv3d: functional.conv3d,
    }
    options = [] if isinstance(layer, nn.Linear) else [layer.stride, layer.padding, layer.dilation, layer.groups]
    x, weight = torch.randn(shape), layer.weight
    call = as_call(names[type(layer)], (x, weight, layer.bias, *options), {})
    assert call is not None
    matrices = to_matrices(weight, call)
    products = torch.cat([part @ matrices.mT for part in inputs_of(call)], dim=1).movedim(0, 1).flatten(1)
    wanted = (
        layer(x) if isinstance(layer, nn.Linear) else layer(x if len(shape) > layer.weight.dim() - 1 else x[None]).movedim(1, -1)
    )
    torch.testing.assert_close(products + layer.bias, wanted.reshape(products.shape))
    assert torch.equal(from_matrices(matrices, weight, call), weight)


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_convolutions_have_their_groups_along_input_channels(algorithm: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=2)
    )
    sparsefx.sparsify(model, algorithm=algorithm, calibration=batches(4, 3, 9, 9))
    for name in ("3.weight", "4.weight"):
        weight = model.get_parameter(name)
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(2).max() == 2
        assert torch.equal(weight != 0, sparsefx.masks(model)[name])
    assert len(sparsefx.masks(model)) == 2


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (6, 1), (12, 2), (16, 1)])
def test_padded_groups_of_convolutions_end_at_each_place_of_the_kernel(channels: int, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 16, 3, groups=groups), nn.ReLU(), nn.Conv2d(16, 8, (1, 2)))
    calibration = batches(4, channels, 9, 9)
    with torch.no_grad():
        norms = functional.unfold(torch.cat(calibration), 3).square().sum((0, 2)).sqrt().view(groups, 1, -1, 3, 3)
        scores = (model[0].weight.abs().view(groups, -1, *model[0].weight.shape[1:]) * norms).flatten(0, 1)
    eligibility = sparsefx.Eligibility(multiple=1)
    sparsefx.sparsify(model, pattern="2:4-padded", algorithm="wanda", calibration=calibration, eligibility=eligibility)
    assert torch.equal(sparsefx.masks(model)["0.weight"], parse("2:4-padded").mask(scores))
    assert (model[2].weight.unflatten(1, (-1, 4)) != 0).sum(2).max() == 2


def first_norms(inputs: list[Tensor]) -> Tensor:
    return torch.cat(inputs).norm(dim=0)


class Ways(nn.Module):
    """Weights read by functions, shared modules, attention, and a transposed product."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Parameter(torch.randn(32, 32))
        self.shared = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.shared(self.shared(x)), self.bare)
        return self.norm(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_weights_are_found_by_their_uses(algorithm: str) -> None:
    model = Ways().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    data = [batch.reshape(4, 8, 32) for batch in batches(32, 32)]
    state = torch.get_rng_state()
    dense = copy.deepcopy(model).eval()
    sparsefx.sparsify(model, algorithm=algorithm, calibration=data, example_inputs=data[0])
    assert set(sparsefx.masks(model)) == {"bare", "shared.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    # The last projection was masked by what enters it once all before it is sparse.
    inside = copy.deepcopy(model).eval()
    seen: list[Tensor] = []
    with torch.no_grad():
        inside.attention.out_proj.weight.copy_(torch.eye(32))
        inside.attention.out_proj.bias.zero_()
        inside.attention.register_forward_hook(lambda module, given, result: seen.append(result[0].flatten(0, 1)))
        for batch in data:
            inside(batch)
    dense_out = dense.attention.out_proj.weight.detach()
    if algorithm == "wanda":
        wanted = parse("2:4").mask(dense_out * first_norms(seen))
        assert float((wanted == sparsefx.masks(model)["attention.out_proj.weight"]).float().mean()) > 0.99


def test_the_masks_stay_in_training_and_export(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsefx.sparsify(model, algorithm="sparsegpt", calibration=batches(8, 32))
    masks = sparsefx.masks(model)
    assert sparsefx.audit(model).settings["algorithm"] == "sparsegpt"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsefx.attach(model, optimizer, total_steps=2)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert all(torch.equal(masks[name], model.get_parameter(name) != 0) for name in masks)
    report = sparsefx.export_onnx(model, torch.randn(2, 32), tmp_path / "m.onnx")
    assert [weight.pattern for weight in report.initializers] == ["2:4", "2:4"]


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_causal_language_models(algorithm: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=64, **sizes))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=1)
    )
    data = [{"input_ids": torch.randint(0, 60, (2, 12))} for _ in range(2)]
    for model, count in ((llama, 14), (gpt2, 8)):
        sparsefx.sparsify(model, algorithm=algorithm, calibration=data, example_inputs=data[0])
        masks = sparsefx.masks(model)
        assert len(masks) == count
        assert all(float(mask.float().mean()) == 0.5 for mask in masks.values())


def test_one_block_is_looked_at_at_a_time_and_runs_stop_after_it() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    model = nn.Sequential(*(Counting(16, 16) for _ in range(4)))
    largest = [0]

    class Watched(Wanda):
        alive: ClassVar[set[int]] = set()

        def empty(self, columns: int, like: Tensor) -> Tensor:
            statistic = super().empty(columns, like)
            self.alive.add(id(statistic))
            largest[0] = max(largest[0], len(self.alive))
            return statistic

        def solve(self, weight: Tensor, statistic: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            self.alive.discard(id(statistic))
            return super().solve(weight, statistic, *rest)

    names = [f"{layer}.weight" for layer in range(4)]
    sparsefx.one_shot.solve(
        model, names, pattern=parse("2:4"), density=0.5, method=Watched(), calibration=batches(8, 16, count=1)
    )
    assert largest == [1]
    # One run to see the order, then runs up to the layer after the one that is looked at.
    assert Counting.calls == 4 + 2 + 3 + 4 + 4


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("rows", [0, 1])
def test_experts_that_no_token_reaches_are_masked_by_magnitude(algorithm: str, pattern: str, rows: int) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.experts[0](x) + self.experts[1](x[:rows] * 0).sum(0))

    model = Experts()
    weight = model.experts[1].weight.detach().clone()
    sparsefx.sparsify(model, pattern=pattern, algorithm=algorithm, calibration=batches(4, 16))
    mask = sparsefx.masks(model)["experts.1.weight"]
    if (algorithm, pattern) != ("wanda", "unstructured"):  # which compares within each output
        assert torch.equal(mask, parse(pattern).mask(weight))
    assert float(mask.float().mean()) == 0.5
    assert torch.equal(model.experts[1].weight, weight * mask)


def test_a_convolution_that_got_no_rows_is_masked_by_magnitude() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.none = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.all(x) + self.none(x[:0]).sum()

    model = Rows()
    weight = model.none.weight.detach().clone()
    sparsefx.sparsify(model, algorithm="sparsegpt", calibration=batches(4, 16, 5, 5))
    mask = sparsefx.masks(model)["none.weight"]
    assert torch.equal(mask, parse("2:4").mask(weight))
    assert torch.equal(model.none.weight, weight * mask)


@pytest.mark.parametrize(
    ("calibration", "options", "error", "text"),
    [
        (None, {}, OptionError, "calibration=NoneType; expected batches"),
        ([], {}, OptionError, "held no batch"),
        (torch.randn(2, 32), {}, OptionError, "calibration=Tensor; expected batches"),
        ([torch.randn(2, 7)], {}, CaptureError, r"does not run on the calibration batch \(float32\[2, 7\]\)"),
        ([torch.full((2, 32), float("nan"))], {}, NonFiniteError, "0.weight: its inputs .* hold NaN"),
        ([torch.randn(2, 32), torch.full((2, 32), float("inf"))], {}, NonFiniteError, "hold NaN or infinity"),
        ([torch.randn(2, 32)], {"pattern": "2:4-transposable"}, OptionError, "cannot be used with pattern"),
        ([torch.randn(2, 32)], {"algorithm": "static"}, OptionError, "'static' uses none; .*wanda, sparsegpt do"),
    ],
)
def test_refusals_leave_the_model_as_it_was(calibration: Any, options: Any, error: type[Exception], text: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        sparsefx.sparsify(model, calibration=calibration, **{"algorithm": "sparsegpt", **options})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sparsefx.masks(model) == {}


def test_a_failure_in_a_later_block_puts_the_first_back() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * float("inf"))

    model = Late()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"b\.weight"):
        sparsefx.sparsify(model, algorithm="wanda", calibration=batches(4, 16))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_cannot_be_watched_are_named() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(16, 16)})
    model.forward = lambda x: model["lstm"](x)[0]  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match=r"lstm.weight_ih_l0.*exclude="):
        sparsefx.sparsify(model, algorithm="wanda", calibration=[torch.randn(3, 2, 16)])


def test_labels_in_batches_are_left_out_and_generators_are_read_once() -> None:
    plain, labelled = nn.Linear(16, 16), nn.Linear(16, 16)
    labelled.load_state_dict(plain.state_dict())
    data = batches(4, 16)
    sparsefx.sparsify(plain, algorithm="wanda", calibration=data)
    sparsefx.sparsify(labelled, algorithm="wanda", calibration=([batch, torch.zeros(4)] for batch in data))
    assert torch.equal(plain.weight, labelled.weight)


def test_a_method_with_options() -> None:
    model, data = nn.Linear(32, 32), batches(8, 32)
    weight = model.weight.detach().clone()
    sparsefx.sparsify(model, algorithm=SparseGPT(damping=0.5), calibration=data)
    inputs = torch.cat(data).double()
    wanted, _ = SparseGPT(damping=0.5).solve(weight, inputs.T @ inputs, parse("2:4"), 0.5)
    torch.testing.assert_close(model.weight.detach(), wanted)
    assert sparsefx.audit(model).settings["algorithm"] == "sparsegpt"


@pytest.mark.parametrize("make", [lambda: SparseGPT(damping=0), lambda: SparseGPT(block=100)])
def test_options_out_of_range(make: Callable[[], SparseGPT]) -> None:
    with pytest.raises(OptionError, match="a multiple of 16"):
        make()
