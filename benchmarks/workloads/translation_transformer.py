"""Translation by an encoder-decoder transformer, of the made-up language of translation_lstm.py."""

from __future__ import annotations

import torch
from common import Workload, main, plain_step
from torch import Tensor, nn
from translation_lstm import LENGTH, WIDTH, WORDS, batches, loss


class Translator(nn.Module):
    """One layer of encoder and one of decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.core = nn.Transformer(WIDTH, 4, 1, 1, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.out = nn.Linear(WIDTH, WORDS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        made = self.core(self.source(source) + self.places, self.target(shifted) + self.places, tgt_mask=self.mask)
        found: Tensor = self.out(made)
        return found


if __name__ == "__main__":
    main(
        lambda data: Workload("translation, transformer", Translator, batches, plain_step(loss), loss, lambda b: b[:2], ("out",))
    )
