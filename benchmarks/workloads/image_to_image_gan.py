"""An image-to-image GAN with two optimizers: colour a line drawing of rectangles (a small pix2pix); measured by L1 error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from common import Batch, Workload, main
from segmentation import batches as shapes
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as entropy
from torch.optim import Adam, Optimizer


def convolutions(*widths: int) -> nn.Sequential:
    """3x3 convolutions with LeakyReLU between."""
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(0.2)))).append(nn.Conv2d(widths[-1], 3, 1))


class Pair(nn.Module):
    """Generator and discriminator; its forward looks at what the one makes with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = convolutions(3, 16, 32, 16), convolutions(6, 16, 32)

    def forward(self, drawing: Tensor) -> Tensor:
        found: Tensor = self.discriminator(torch.cat([drawing, self.generator(drawing)], 1))
        return found


def batches(seed: int) -> Iterator[Batch]:
    for _, inside in shapes(seed):
        edges = (inside - torch.nn.functional.avg_pool2d(inside, 3, 1, 1)).abs().expand(-1, 3, -1, -1)
        yield edges.contiguous(), torch.cat([inside, 1 - inside, 0.5 * inside], 1)


def step(model: Pair, optimizers: Sequence[Optimizer], batch: Batch) -> Tensor:
    drawing, wanted = batch
    made = model.generator(drawing)
    real, fake = (model.discriminator(torch.cat([drawing, picture], 1)) for picture in (wanted, made.detach()))
    for optimizer, loss in (
        (optimizers[1], lambda: entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake))),
        (optimizers[0], lambda: 20 * (made - wanted).abs().mean() + entropy(model(drawing), torch.ones_like(real))),
    ):
        value = loss()
        model.zero_grad()
        value.backward()
        optimizer.step()
    return value.detach()


if __name__ == "__main__":
    error = lambda model, batch: (model.generator(batch[0]) - batch[1]).abs().mean()  # noqa: E731
    two = lambda model: [Adam(part.parameters(), 2e-3) for part in (model.generator, model.discriminator)]  # noqa: E731
    first = ("generator.0", "discriminator.0")
    main(lambda data: Workload("image-to-image GAN", Pair, batches, step, error, lambda b: b[:1], first, two))
