"""Segmentation by a small U-Net: which pixels of a noisy picture lie in a rectangle.

python benchmarks/workloads/segmentation.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Batch, Workload, main, plain_step
from torch import Tensor, nn
from torch.nn import functional

SIDE = 32


class UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last, self.out = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = self.first(x).relu()
        up = self.up(self.middle(self.down(across).relu()).relu())
        found: Tensor = self.out(self.last(torch.cat([across, up], 1)).relu())
        return found


def batches(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(SIDE)
    while True:
        corner = torch.randint(2, SIDE - 14, (16, 2), generator=generator)
        size = torch.randint(6, 12, (16, 2), generator=generator)
        rows, columns = ((places >= corner[:, i, None]) & (places < (corner + size)[:, i, None]) for i in range(2))
        inside = (rows[:, :, None] & columns[:, None, :]).float().unsqueeze(1)
        yield inside * 0.7 + 0.6 * torch.randn(16, 3, SIDE, SIDE, generator=generator), inside


def loss(model: UNet, batch: Batch) -> Tensor:
    return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


if __name__ == "__main__":
    main(lambda data: Workload("segmentation", UNet, batches, plain_step(loss), loss, lambda b: b[:1], ("first",)))
