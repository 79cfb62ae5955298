"""SMALL: parameter counts, couplings, fresh weights, and models that cannot become that narrow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.errors import EligibilityError, OptionError


class Block(nn.Module):
    """A residual block that starts as the identity: its last norm and its scale are zero."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.short = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner * self.scale + self.short(x))


def residual_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 32),
        Block(32, 64),
        Block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


IMAGES = torch.zeros(2, 3, 8, 8)
TOKENS = torch.zeros(2, 5, 32)


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_a_residual_net_has_the_share_of_parameters_and_trains(density: float) -> None:
    model = residual_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = sparsefx.small_baseline(model, density, IMAGES)
    assert abs(size(small) / size(model) - density) <= 0.05 * density
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(small) is type(model)
    assert small.training
    assert small[-1].out_features == 10
    assert set(small.state_dict()) == set(before)
    # One factor for all widths, to the rounding of one channel.
    factors = [small[3].first.out_channels / 32, small[4].first.out_channels / 64, small[5].second.out_channels / 64]
    assert max(factors) - min(factors) <= 1 / 32
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(small(images), torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_an_encoder_has_narrower_feed_forward_layers() -> None:
    model = encoder()
    small = sparsefx.small_baseline(model, 0.5, TOKENS)
    assert abs(size(small) / size(model) - 0.5) <= 0.025
    assert small.layers[0].linear1.in_features == 32
    assert small.layers[0].linear1.out_features == small.layers[1].linear2.in_features < 64
    assert small(torch.randn(2, 5, 32)).shape == (2, 5, 32)


def test_what_widths_cannot_do_is_refused_with_the_reason() -> None:
    with pytest.raises(EligibilityError, match=r"at the nearest. Widths that stay: it meets an input of the model"):
        sparsefx.small_baseline(encoder(), 0.1, TOKENS)


def test_weights_are_fresh_under_a_seed_or_those_that_stay() -> None:
    model = residual_net()
    state = torch.get_rng_state()
    one, two = (sparsefx.small_baseline(model, 0.5, IMAGES, seed=seed) for seed in (1, 2))
    again = sparsefx.small_baseline(model, 0.5, IMAGES, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0].weight, again[0].weight)
    assert not torch.equal(one[0].weight, two[0].weight)
    assert (one[3].norm2.weight == 1).all()
    kept = sparsefx.small_baseline(model, 0.5, IMAGES, fresh=False)
    assert torch.equal(kept[0].weight, model[0].weight[: len(kept[0].weight)])
    assert (kept[3].norm2.weight == 0).all()
    seen: list[nn.Module] = []
    mine = sparsefx.small_baseline(model, 0.5, IMAGES, fresh=seen.append)
    assert seen == [mine]


def test_a_sparsified_model_tells_its_own_share() -> None:
    model = sparsefx.sparsify(residual_net(), pattern="unstructured", density=0.3)
    masks = sparsefx.masks(model)
    used = sum(int(mask.sum()) for mask in masks.values())
    used += size(model) - sum(mask.numel() for mask in masks.values())
    small = sparsefx.small_baseline(model, None, IMAGES)
    assert abs(size(small) - used) <= 0.05 * used
    assert sparsefx.masks(small) == {}
    assert len(sparsefx.masks(model)) == len(masks)


def test_density_one_is_the_model_itself_with_fresh_weights() -> None:
    model = residual_net()
    small = sparsefx.small_baseline(model, 1.0, IMAGES)
    assert size(small) == size(model)
    assert small is not model


@pytest.mark.parametrize("density", [0.0, 1.5, None])
def test_densities_are_checked(density: float | None) -> None:
    with pytest.raises(OptionError, match="density"):
        sparsefx.small_baseline(residual_net(), density, IMAGES)
