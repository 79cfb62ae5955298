"""Translation by an LSTM encoder and decoder with attention: a made-up language that is spelt backwards in other words.

python benchmarks/workloads/translation_lstm.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Batch, Workload, main, plain_step
from torch import Tensor, nn
from torch.nn import functional

WORDS, LENGTH, WIDTH = 40, 8, 64


class Translator(nn.Module):
    """Attention over the encoder's outputs for every word of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.query, self.mix = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(source))
        hidden, _ = self.decoder(self.target(shifted), state)
        weights = (self.query(hidden) @ memory.mT / WIDTH**0.5).softmax(-1)
        found: Tensor = self.out(self.mix(torch.cat([hidden, weights @ memory], -1)).tanh())
        return found


def batches(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randperm(WORDS - 1, generator=torch.Generator().manual_seed(5)) + 1
    while True:
        source = torch.randint(0, WORDS - 1, (32, LENGTH), generator=generator)
        target = dictionary[source].flip(1)
        yield source, functional.pad(target[:, :-1], (1, 0)), target


def loss(model: Translator, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0], batch[1]).flatten(0, 1), batch[2].flatten())


if __name__ == "__main__":
    main(lambda data: Workload("translation, LSTM", Translator, batches, plain_step(loss), loss, lambda b: b[:2], ("out",)))
