"""What the package itself ships: the demo's network, and small models that use each known layer type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case
from sparsefx.demo import load_digits, small_net


class TaggingLSTM(nn.Module):
    """Tokens to tags through a bidirectional LSTM: an embedding, recurrent weights, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.tags = nn.Linear(128, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        tags: Tensor = self.tags(self.lstm(self.embedding(tokens))[0])
        return tags


def shipped_cases() -> list[Case]:
    """The demo's network, and torch.nn's own Transformer and LSTM."""
    return [
        Case("shipped", "digits_net", "digits_net", small_net, lambda: ((load_digits().test_images[:4],), {})),
        Case(
            "shipped",
            "transformer",
            "transformer",
            lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
            lambda: ((torch.randn(2, 7, 32), torch.randn(2, 5, 32)), {}),
        ),
        Case(
            "shipped",
            "tagging_lstm",
            "lstm",
            TaggingLSTM,
            lambda: ((torch.randint(100, (2, 9)),), {}),
            heads=("tags",),
        ),
    ]
