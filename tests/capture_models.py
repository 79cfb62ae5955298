"""Small models, each with one thing that makes capture or eligibility hard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bare(nn.Module):
    """Weights that no layer owns, used by functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))
        self.kernel = nn.Parameter(torch.randn(16, 16, 3))
        self.matrix = nn.Parameter(torch.randn(32, 16))

    def forward(self, data: Tensor) -> Tensor:
        data = functional.linear(data, self.weight)
        data = torch.matmul(data, self.matrix)
        return functional.conv1d(data.transpose(1, 2), self.kernel, stride=1, padding=1)


class OneHot(nn.Module):
    """A table of positions that is read by a product with one-hot rows, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 32, 16))
        self.layer = nn.Linear(16, 16)

    def forward(self, positions: Tensor) -> Tensor:
        rows = functional.one_hot(positions.clamp(min=0), num_classes=32).permute(0, 2, 1, 3).to(self.table)
        result: Tensor = self.layer((rows @ self.table).sum(1))
        return result


class Tied(nn.Module):
    """Two layers with one weight, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.again = nn.Linear(16, 16, bias=False)

    def forward(self, data: Tensor) -> Tensor:
        return self.again(self.again(self.second(self.first(data))))


class Disagreeing(nn.Module):
    """One weight, summed along its rows here and along its columns there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, data: Tensor) -> Tensor:
        return self.layer(data) @ self.layer.weight


class Residual(nn.Module):
    """Convolutions with a skip, a depthwise one, a grouped one, and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 1, groups=2)
        self.wide = nn.Conv2d(32, 64, 1, groups=2)
        self.up = nn.ConvTranspose2d(64, 8, 2, stride=2)
        self.drop = nn.Dropout(0.3)

    def forward(self, data: Tensor) -> Tensor:
        data = self.stem(data)
        data = torch.relu(self.norm(self.body(data)) + data)
        return self.up(self.wide(self.grouped(self.drop(self.depthwise(data)))))


class Branching(nn.Module):
    """Branches on data, so that neither torch.export nor torch.fx can capture it; its parts they can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32))
        self.projection = nn.Parameter(torch.randn(48, 32))
        self.packed = nn.Parameter(torch.randn(96, 48))
        self.calls: list[Any] = []

    def forward(self, data: Tensor) -> Tensor:
        data = self.body(data)
        self.last = data
        self.calls.append(data)
        if float(data.detach().sum()) > 1e9:
            data = data * 2
        data = functional.linear(data, self.projection.double().float())
        query, key = self.packed.chunk(2)
        return functional.linear(data, query) + functional.linear(data, key) + torch.rand(())


class Standardised(nn.Conv2d):
    """A convolution by another weight than its parameter: zeros do not stay zeros."""

    def forward(self, data: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return functional.conv2d(data, self.weight - mean, self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    """A linear layer by its parameter times a constant, as in equalised learning rates: zeros stay zeros."""

    def forward(self, data: Tensor) -> Tensor:
        return functional.linear(data, self.weight * 0.5, self.bias)


class Opaque(nn.Linear):
    """A linear layer with a forward of its own that cannot be traced."""

    def forward(self, data: Tensor) -> Tensor:
        if data.shape[0] > 1000:
            return data
        return super().forward(data)


class Words(nn.Module):
    """A language model: embedding, repeated blocks, and a classification head."""

    def __init__(self, classes: int = 32, vocabulary: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.head = nn.Linear(16, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        data = self.embedding(tokens)
        for block in self.blocks:
            data = torch.relu(block(data)) + data
        return self.head(data).softmax(-1)


class Recurrent(nn.Module):
    """LSTM, GRU and attention: weights that layers hold in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, num_layers=2, proj_size=16, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)

    def forward(self, data: Tensor) -> Tensor:
        data = self.lstm(data)[0]
        wide = self.gru(data)[0]
        wide = self.attention(wide, wide, wide, need_weights=False)[0]
        return self.cross(wide, data, data, need_weights=False)[0]
