"""A network of random steps over a list of tensors, and what adds steps to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Choose = Callable[[int], int]


class Net(nn.Module):
    """Runs its steps; each takes tensors made before, by number, and appends what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.steps: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
        self.outputs: list[int] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        values: list[Any] = [x]
        for step, sources in self.steps:
            made = step(self, *(values[source] for source in sources))
            values.extend(made if isinstance(made, (tuple, list)) else [made])
        return [values[number] for number in self.outputs]


class Builder:
    """Adds random steps to a network of images, and keeps channels and sizes of every tensor."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.net = Net()
        self.channels = [4]
        self.sizes = [8]

    def layer(self, module: nn.Module) -> int:
        self.net.layers.append(module)
        return len(self.net.layers) - 1

    def scale(self, *shape: int) -> int:
        self.net.scales.append(nn.Parameter(torch.randn(*shape)))
        return len(self.net.scales) - 1

    def step(self, function: Callable[..., Any], sources: tuple[int, ...], *made: tuple[int, int]) -> int:
        """Add a step that makes tensors of these (channels, size); returns the number of the first."""
        self.net.steps.append((function, sources))
        for channels, size in made:
            self.channels.append(channels)
            self.sizes.append(size)
        return len(self.channels) - len(made)

    def call(self, module: nn.Module, source: int, channels: int, size: int) -> int:
        number = self.layer(module)
        return self.step(lambda net, x: net.layers[number](x), (source,), (channels, size))

    def one(self) -> int:
        """A tensor made before, recent ones more often."""
        last = len(self.channels) - 1
        return max(0, last - self.choose(min(4, last + 1)))

    def alike(self, source: int) -> int:
        """A tensor of the same shape: one that is there, or a new projection of another one."""
        fitting = [
            number
            for number in range(1, len(self.channels))
            if number != source and (self.channels[number], self.sizes[number]) == (self.channels[source], self.sizes[source])
        ]
        if fitting and self.choose(3):
            return fitting[self.choose(len(fitting))]
        same_size = [number for number in range(len(self.channels)) if self.sizes[number] == self.sizes[source]]
        other = same_size[self.choose(len(same_size))]
        return self.call(
            nn.Conv2d(self.channels[other], self.channels[source], 1, bias=bool(self.choose(2))),
            other,
            self.channels[source],
            self.sizes[source],
        )
