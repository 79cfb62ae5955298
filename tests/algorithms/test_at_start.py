"""SNIP, GraSP and SynFlow against their formulas; the model is as before, whatever happens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.algorithms import GraSP, SynFlow
from sparsefx.errors import CaptureError, NonFiniteError, OptionError
from tests.training import batches, loss_of, small_net

DATA = batches(2, seed=4)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def global_mask(scores: list[Tensor], density: float) -> list[Tensor]:
    return sparsefx.patterns.parse("unstructured:global").masks(scores, density)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:global"])
def test_snip_ranks_gradient_times_weight_over_all_layers(pattern: str) -> None:
    model = small_net()
    twin = copy.deepcopy(model)
    sum_of_losses = torch.stack([loss_of(twin, batch) for batch in DATA]).sum()
    gradients = torch.autograd.grad(sum_of_losses, [twin[0].weight, twin[5].weight])
    scores = [(g * w).detach() for g, w in zip(gradients, (twin[0].weight, twin[5].weight), strict=True)]
    sparsefx.sparsify(model, pattern=pattern, density=0.1, algorithm="snip", calibration=DATA, loss_fn=loss_of)
    masks = list(sparsefx.masks(model).values())
    for mask, wanted in zip(masks, global_mask(scores, 0.1), strict=True):
        assert float((mask == wanted).float().mean()) > 0.999  # sums of gradients round differently in another order
    assert sum(int(mask.sum()) for mask in masks) == round(0.1 * (4608 + 2048))


def test_grasp_is_weight_times_hessian_times_gradient() -> None:
    torch.manual_seed(1)
    batch = torch.randn(8, 16)
    model = net().double()

    def loss_at(first: Tensor, last: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(batch.double(), first, model[0].bias))
        return (nn.functional.linear(hidden, last, model[2].bias) - batch.double()).square().mean()

    weights = (model[0].weight.detach(), model[2].weight.detach())
    gradients = torch.func.grad(loss_at, argnums=(0, 1))(*weights)
    hessian = torch.func.hessian(loss_at, argnums=(0, 1))(*weights)
    products = [sum(torch.einsum("abcd,cd->ab", hessian[i][j], gradients[j]) for j in (0, 1)) for i in (0, 1)]
    scores = [(weight * product).detach() for weight, product in zip(weights, products, strict=True)]
    lowest = min(float(score.min()) for score in scores)
    wanted = global_mask([score - lowest for score in scores], 0.25)
    sparsefx.sparsify(
        model, pattern="unstructured", density=0.25, algorithm=GraSP(), calibration=[batch.double()], loss_fn=square_loss
    )
    for mask, expected in zip(sparsefx.masks(model).values(), wanted, strict=True):
        assert torch.equal(mask, expected)


def test_synflow_in_one_round_is_the_product_of_absolute_weights_along_paths() -> None:
    model = net()
    linear = nn.Sequential(model[0], model[2])  # no activation: flow is a product of matrices
    first, last = model[0].weight.detach().double().abs(), model[2].weight.detach().double().abs()
    scores = [first * last.sum(0).unsqueeze(1), last * (first.sum(1) + model[0].bias.detach().double().abs())]
    wanted = global_mask(scores, 0.3)
    sparsefx.sparsify(linear, pattern="unstructured", density=0.3, algorithm=SynFlow(rounds=1), example_inputs=torch.zeros(1, 16))
    for mask, expected in zip(sparsefx.masks(linear).values(), wanted, strict=True):
        assert torch.equal(mask, expected)


def test_synflow_empties_no_layer_where_snip_does() -> None:
    def deep() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(6)])

    model = sparsefx.sparsify(
        deep(), pattern="unstructured:global", density=0.03, algorithm="synflow", example_inputs=torch.zeros(1, 16)
    )
    counts = [int(mask.sum()) for mask in sparsefx.masks(model).values()]
    assert sum(counts) == round(0.03 * 6 * 256)
    assert min(counts) > 0
    x = torch.ones(1, 16)
    for layer in model:
        x = x @ layer.weight.detach().abs().T
    assert float(x.sum()) > 0, "some path goes through all layers"


@pytest.mark.parametrize("algorithm", ["snip", "grasp", "synflow"])
def test_the_model_is_as_before_but_for_its_zeros(algorithm: str) -> None:
    model = small_net().train()
    model.add_module("6", nn.Dropout(0.5))
    model[1].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sparsefx.sparsify(
        model, pattern="2:4", algorithm=algorithm, calibration=iter(DATA), loss_fn=loss_of, example_inputs=DATA[0][0]
    )
    masks = sparsefx.masks(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] * masks[name] if name in masks else state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model[1].weight.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[5].weight.grad is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "no calibration and loss_fn"),
        ({"calibration": DATA}, "no loss_fn"),
        ({"calibration": [], "loss_fn": loss_of}, "without any batch"),
        ({"calibration": DATA, "loss_fn": lambda model, batch: model(batch[0])}, r"of shape \(8, 16\)"),
        ({"calibration": DATA, "loss_fn": lambda model, batch: 3.0}, "returned a float"),
        ({"calibration": DATA, "loss_fn": lambda model, batch: torch.tensor(1.0)}, "needs no gradient"),
    ],
)
def test_missing_or_wrong_data_is_told_and_nothing_changes(options: dict[str, Any], word: str) -> None:
    model = small_net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=word):
        sparsefx.sparsify(model, algorithm="snip", **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    sparsefx.sparsify(model)


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.raises(NonFiniteError, match=r"snip: the scores of 0\.weight"):
        sparsefx.sparsify(
            small_net(), algorithm="snip", calibration=DATA, loss_fn=lambda model, batch: loss_of(model, batch) * float("nan")
        )


def test_synflow_without_inputs_is_told() -> None:
    with pytest.raises(OptionError, match="example_inputs"):
        sparsefx.sparsify(small_net(), algorithm="synflow")


def test_grasp_tells_of_an_operation_without_a_second_derivative() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Hardsigmoid(), nn.Linear(16, 16))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match="no second derivative"):
        sparsefx.sparsify(model, algorithm="grasp", calibration=[torch.randn(2, 16)], loss_fn=square_loss)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_grasp_runs_through_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    batch = torch.randn(2, 5, 16)
    sparsefx.sparsify(model, density=0.5, pattern="unstructured", algorithm="grasp", calibration=[batch], loss_fn=square_loss)
    assert len(sparsefx.masks(model)) == 4


def test_grasp_is_the_same_however_its_batches_are_cut() -> None:
    images, labels = torch.cat([batch[0] for batch in DATA]), torch.cat([batch[1] for batch in DATA])
    chosen = []
    for size in (len(images), len(images) // 2):
        cut = list(zip(images.split(size), labels.split(size), strict=True))

        def summed(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        model = small_net().double().eval()
        cut = [(part.double(), target) for part, target in cut]
        sparsefx.sparsify(model, pattern="unstructured", density=0.3, algorithm="grasp", calibration=cut, loss_fn=summed)
        chosen.append(sparsefx.masks(model))
    for name, mask in chosen[0].items():
        assert torch.equal(mask, chosen[1][name]), name
