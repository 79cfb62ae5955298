"""SMALL of transformers: residual streams, attention and normalizations become narrower together, and the result trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.errors import EligibilityError

TEXT = torch.zeros(2, 6, dtype=torch.long)


class Classifier(nn.Module):
    """Embeddings, positions for longer texts than the examples, torch's own encoder, and a head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.positions = nn.Parameter(torch.randn(1, 20, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 96, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens) + self.positions[:, : tokens.shape[1]]
        return self.head(self.norm(self.encoder(embedded)).mean(1))


class RMSNorm(nn.Module):
    """As in language models: a mean over channels, and a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Gated(nn.Module):
    """Fused queries, keys and values of four heads, a gated feed-forward block, and norms without a shift."""

    def __init__(self, held: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.first, self.second = RMSNorm(32), RMSNorm(32)
        self.mix, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        self.gate, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(96, 32)
        self.head = nn.Linear(32, 10)
        self.held = held

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, length, _ = x.shape
        parts = self.mix(self.first(x)).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2]).transpose(1, 2).reshape(batch, length, 32)
        x = x + self.out(mixed)
        inner = self.second(x)
        x = x + self.down(F.silu(self.gate(inner)) * self.up(inner))
        return self.head(x.view(batch, length, 32).mean(1) if self.held else x.mean(1))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trains(model: nn.Module, inputs: Tensor) -> None:
    F.cross_entropy(model.train()(inputs), torch.arange(len(inputs))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert model.eval()(inputs).shape == (len(inputs), 10)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_torchs_own_encoder_narrows_with_its_heads(density: float, norm_first: bool) -> None:
    model = Classifier(norm_first)
    small = sparsefx.small_baseline(model, density, TEXT)
    assert abs(size(small) / size(model) - density) <= 0.05 * density
    layer = small.encoder.layers[0]
    width = layer.self_attn.embed_dim
    assert width < 32
    assert width % layer.self_attn.num_heads == 0
    assert layer.self_attn.head_dim == width // 4
    assert small.norm.normalized_shape == (width,)
    assert type(small.norm) is nn.LayerNorm
    assert type(layer.self_attn) is nn.MultiheadAttention
    # Positions that the example inputs do not reach are still there.
    assert small.positions.shape == (1, 20, width)
    assert small.embed.weight.shape == (50, width)
    trains(small, torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0)))
    assert model.encoder.layers[0].self_attn.batch_first


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_norms_of_other_classes_and_fused_attention_narrow(density: float) -> None:
    model = Gated()
    small = sparsefx.small_baseline(model, density, TEXT)
    assert abs(size(small) / size(model) - density) <= 0.05 * density
    width = small.embed.weight.shape[1]
    assert small.first.weight.shape == small.second.weight.shape == (width,)
    assert width < 32
    # The code holds the number of heads and their size.
    assert small.mix.weight.shape == (96, width)
    trains(small, torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0)))


def test_code_that_holds_the_width_keeps_it_and_is_named() -> None:
    small = sparsefx.small_baseline(Gated(held=True), 0.7, TEXT)
    assert small.embed.weight.shape == (50, 32)
    with pytest.raises(EligibilityError, match=r"change of shape .* in Gated"):
        sparsefx.small_baseline(Gated(held=True), 0.1, TEXT)


def test_norms_over_the_channels_of_images_narrow() -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 24, 3), LayerNorm2d(24), nn.GELU(), nn.Conv2d(24, 48, 3), LayerNorm2d(48), nn.GELU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 10))
    images = torch.zeros(2, 3, 28, 28)  # as high as one layer is wide
    small = sparsefx.small_baseline(model, 0.2, images)
    assert abs(size(small) / size(model) - 0.2) <= 0.01
    assert small[1].normalized_shape == (small[0].out_channels,)
    assert small[8].normalized_shape == (small[3].out_channels,)
    trains(small, torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)))


def test_attention_of_other_settings_keeps_its_width() -> None:
    torch.manual_seed(0)

    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
            self.wide, self.head = nn.Linear(32, 256), nn.Linear(256, 10)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(F.relu(self.wide(self.attention(x, x, x)[0])).mean(1))

    model = Extra()
    small = sparsefx.small_baseline(model, 0.7, TEXT)
    assert small.attention.in_proj_weight.shape == (96, 32)
    assert small.wide.out_features < 256
    trains(small, torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0)))
