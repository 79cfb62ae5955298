"""The vision transformer of Dosovitskiy et al. ("An Image is Worth 16x16 Words", 2021) in plain modules, with one product for
queries, keys and values.

Written out so that the benchmarks need no model library on the machine that has the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and a two-layer network, both behind a LayerNorm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        split = self.qkv(self.norm1(tokens)).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(split[0], split[1], split[2])
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        return tokens + self.down(functional.gelu(self.up(self.norm2(tokens))))


class VisionTransformer(nn.Module):
    """In: ``[N, 3, side, side]``; out: ``[N, classes]``, from the first token."""

    def __init__(self, *, side: int, width: int, heads: int, depth: int, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (side // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.first.expand(len(patches), -1, -1), patches), dim=1) + self.places
        scores: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return scores


def vit_large(*, dry: bool) -> VisionTransformer:
    """ViT-L/16 at 224 x 224; in a dry run a tiny one at 32 x 32."""
    if dry:
        return VisionTransformer(side=32, width=64, heads=2, depth=2)
    return VisionTransformer(side=224, width=1024, heads=16, depth=24)
