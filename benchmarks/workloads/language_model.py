"""A character language model, a small transformer, on Tiny Shakespeare (--data FOLDER) or on a made-up chain of characters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from common import Batch, Workload, main, plain_step
from torch import Tensor, nn
from torch.nn import functional

LENGTH, WIDTH, SYMBOLS = 48, 64, 128


class LanguageModel(nn.Module):
    """Two causal encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, text: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.symbols(text) + self.places, mask=self.mask, is_causal=True))
        return found


def stream(data: str | None, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    if data is not None:
        raw = Path(data, "tinyshakespeare.txt").read_bytes()
        share = slice(0, len(raw) * 9 // 10) if seed < 1000 else slice(len(raw) * 9 // 10, None)
        text = torch.tensor(list(raw[share])).clamp_max(SYMBOLS - 1)
    else:
        chance = torch.rand(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(3)) ** 12
        text = torch.zeros(20_000, dtype=torch.int64)
        for place in range(1, len(text)):
            text[place] = torch.multinomial(chance[text[place - 1]], 1, generator=generator)
    while True:
        starts = torch.randint(0, len(text) - LENGTH, (16, 1), generator=generator) + torch.arange(LENGTH + 1)
        yield text[starts[:, :-1]], text[starts[:, 1:]]


def loss(model: LanguageModel, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


if __name__ == "__main__":
    main(
        lambda data: Workload(
            "language model", LanguageModel, lambda seed: stream(data, seed), plain_step(loss), loss, lambda b: b[:1], ("head",)
        )
    )
