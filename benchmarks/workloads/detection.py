"""Detection by a small single-shot detector: where a bright rectangle is, and how large, from cells of a grid.

python benchmarks/workloads/detection.py
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from common import Batch, Workload, main, plain_step
from segmentation import SIDE
from segmentation import batches as shapes
from torch import Tensor, nn
from torch.nn import functional

CELL = 8


class Detector(nn.Module):
    """A backbone, and heads for what is there and for boxes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        steps = [(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
        self.backbone = nn.Sequential(*(part for pair in steps for part in pair), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU())
        self.there, self.box = nn.Conv2d(64, 1, 1), nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.backbone(x)
        return self.there(seen).flatten(1), self.box(seen).flatten(2)


def batches(seed: int) -> Iterator[Batch]:
    for picture, inside in shapes(seed):
        rows, columns = (inside.amax((1, dim)) for dim in (3, 2))
        places = torch.arange(SIDE, dtype=torch.float32)
        sizes = torch.stack([rows.sum(1), columns.sum(1)], 1)
        centres = torch.stack([(rows * places).sum(1), (columns * places).sum(1)], 1) / sizes
        cell = (centres // CELL).long()
        yield picture, cell[:, 0] * (SIDE // CELL) + cell[:, 1], torch.cat([centres, sizes], 1) / SIDE


def loss(model: Detector, batch: Batch) -> Tensor:
    there, boxes = model(batch[0])
    found = boxes[torch.arange(len(boxes)), :, batch[1]]
    return functional.cross_entropy(there, batch[1]) + 5 * (found - batch[2]).abs().mean()


if __name__ == "__main__":
    main(lambda data: Workload("detection", Detector, batches, plain_step(loss), loss, lambda b: b[:1], ("backbone.0",)))
